"""Parameters and multiply-adds of a network, part by part, counted without running it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from agln_fast.models.config import ModelConfig
from agln_fast.models.networks import SegmentationNetwork

__all__ = ["Complexity", "complexity"]


@dataclass(frozen=True)
class Complexity:
    """Cost of one part of a network for one image.

    parameters: weights and biases, running statistics not counted.
    convolution: multiply-adds of convolutions, which is what the paper's Table VIII counts.
    matmul: multiply-adds of matrix products, which is what the attention steps are.
    """

    part: str
    parameters: int
    convolution: int
    matmul: int


def complexity(config: ModelConfig, height: int, width: int) -> list[Complexity]:
    """Cost of every part at an input of `height` x `width`; the last row, "total", is the whole network.

    Counted by PyTorch's `FlopCounterMode` on the meta device: no weights are allocated.
    """
    with torch.device("meta"):
        network = SegmentationNetwork(config).eval()
        image = torch.empty(1, 3, height, width)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(image)
    counts = counter.get_flop_counts()

    def flops(path: str, module: nn.Module) -> Counter[str]:
        if path in counts:
            return Counter({str(operator): count for operator, count in counts[path].items()})
        # A ModuleList is never called itself: its members are.
        return sum((flops(f"{path}.{name}", child) for name, child in module.named_children()), Counter())

    def row(part: str, path: str, module: nn.Module) -> Complexity:
        by_operator = flops(path, module)
        convolution = sum(count for operator, count in by_operator.items() if "convolution" in operator)
        parameters = sum(parameter.numel() for parameter in module.parameters())
        # FlopCounterMode counts a multiply-add as two operations.
        return Complexity(part, parameters, convolution // 2, (by_operator.total() - convolution) // 2)

    root = type(network).__name__
    parts = [
        (f"{group}.{name}", child)
        for group in ("encoder", "decoder")
        if (module := getattr(network, group)) is not None
        for name, child in module.named_children()
    ]
    rows = [row(part, f"{root}.{part}", module) for part, module in [*parts, ("classifier", network.classifier)]]
    return [*rows, row("total", "Global", network)]
