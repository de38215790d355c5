"""The module that engines are exported from: a network between the two ends that an `IOContract` describes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from agln_fast.contract import IOContract
from agln_fast.decode import labels_dtype
from agln_fast.kernels.label_upsample import label_upsample
from agln_fast.plan.network import InferenceNetwork

__all__ = ["DeployedNetwork"]


class DeployedNetwork(nn.Module):
    """A segmentation network behind an `IOContract`: this very module is what engines are exported from.

    Input and output are those of the contract. The network runs in the dtype of its own parameters; normalisation is
    done in float32 before, and the output is converted after.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, contract: IOContract, num_classes: int) -> None:
        """`network` maps (B, 3, H, W) to logits (B, K, H, W) with K = `num_classes`; it is not copied."""
        super().__init__()
        self.network = network
        self.contract = contract
        self.labels_dtype = getattr(torch, labels_dtype(num_classes))
        device = next(network.parameters()).device
        self.register_buffer("mean", torch.tensor(contract.mean, device=device).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(contract.std, device=device).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """`image` as the contract says -> `labels` or `logits`."""
        network, x = self.network, self.normalise(image)
        if (
            self.contract.output == "labels"
            and isinstance(network, InferenceNetwork)
            and network.attention == "kernels"
        ):
            # The logits (B, K, H, W) never exist.
            size = self.contract.height, self.contract.width
            return label_upsample(network.logits(x), size, align_corners=network.align_corners).to(self.labels_dtype)
        logits: Tensor = network(x)
        if self.contract.output == "logits":
            return logits.float()
        # TensorRT converts only floating-point tensors to uint8; the detour is exact up to 2^24.
        return logits.argmax(1).float().to(self.labels_dtype)

    def normalise(self, image: Tensor) -> Tensor:
        """`image` as the contract says -> what the network takes, (B, 3, H, W) in the dtype of its parameters."""
        if self.contract.layout == "uint8_nhwc":
            # Converted before it is transposed: TensorRT transposes no uint8.
            image = (image.float().permute(0, 3, 1, 2) / 255 - self.mean) / self.std
        return image.to(next(self.network.parameters()).dtype)
