"""The argmax at full size of logits at a quarter of it."""

from __future__ import annotations

from torch import Tensor, nn

from agln_fast.plan.network import PlannedNetwork

__all__ = ["LowResolutionLogits"]


class LowResolutionLogits(nn.Module):
    """Normalised image (B, 3, H, W) -> logits (B, K, h, w) before the last resize, which the backend makes up for.

    Exact because the resize is a convex combination of the four corners of a cell, computed where it is asked for: the
    K·H·W resized logits need not exist together.
    """

    def __init__(self, network: PlannedNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network.logits(x)
