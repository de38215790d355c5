"""What goes into an engine and what comes out: the one description that export, backends and runtime share."""

from __future__ import annotations

import math
import reprlib
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from agln_fast.errors import ConfigError

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "DeployedNetwork", "IOContract", "Layout", "Output", "Precision", "Resize"]

Layout = Literal["uint8_nhwc", "float_nchw"]
Output = Literal["labels", "logits"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Resize = Literal["stretch", "pad", "slide"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_MINIMUM_SIDE, _MAXIMUM_SIDE = 32, 16384
_LARGEST_BATCH, _MOST_PIXELS = 4096, _MAXIMUM_SIDE**2
_SMALLEST_STD, _LARGEST_STD = 1e-4, 1e4


@dataclass(frozen=True)
class IOContract:
    """Shapes, types and meaning of an engine's input `image` and its output `labels` or `logits`.

    `image` is (B, H, W, 3) uint8 RGB for layout `uint8_nhwc` (the graph normalises), or (B, 3, H, W) float32 RGB,
    already `(value / 255 - mean) / std`, for `float_nchw`. `labels` is (B, H, W) uint8 (int32 above 256 classes);
    `logits` is (B, K, H, W) float32, whatever the precision inside.
    """

    height: int
    width: int
    min_batch: int = 1
    max_batch: int = 1
    layout: Layout = "uint8_nhwc"
    output: Output = "labels"
    resize: Resize = "stretch"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        for side in (self.height, self.width):
            if type(side) is not int or not _MINIMUM_SIDE <= side <= _MAXIMUM_SIDE:
                size = f"{self.height}x{self.width}"
                raise ConfigError(f"size {size}: each side must be from {_MINIMUM_SIDE} to {_MAXIMUM_SIDE} pixels")
        batch = f"batch {self.min_batch}..{self.max_batch}"
        if any(type(end) is not int for end in (self.min_batch, self.max_batch)):
            raise ConfigError(f"{batch}: needs whole numbers")
        if not 1 <= self.min_batch <= self.max_batch <= _LARGEST_BATCH:
            raise ConfigError(f"{batch}: needs 1 <= smallest <= largest <= {_LARGEST_BATCH}")
        if self.max_batch * self.height * self.width > _MOST_PIXELS:
            raise ConfigError(f"{batch} of {self.height}x{self.width}: more than {_MOST_PIXELS} pixels a run")
        for name, value, allowed in (
            ("layout", self.layout, get_args(Layout)),
            ("output", self.output, get_args(Output)),
            ("resize", self.resize, get_args(Resize)),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} {value!r}: must be one of {', '.join(allowed)}")
        # Images are padded with the mean colour: it must be one.
        for name, colour, least, most in (
            ("mean", self.mean, 0, 1),
            ("std", self.std, _SMALLEST_STD, _LARGEST_STD),
        ):
            if len(colour) != 3 or not all(_is_number(value) and least <= value <= most for value in colour):
                asked = f"three numbers from {least:g} to {most:g}, for values in 0..1"
                raise ConfigError(f"{name} needs {asked}; got {reprlib.repr(colour)}")
        if self.resize == "slide" and self.output == "labels":
            raise ConfigError("resize policy 'slide' averages overlapping windows: it needs output 'logits'")

    @property
    def input_shape(self) -> tuple[int | str, ...]:
        """Shape of `image`; the batch is the word "batch" where it may vary."""
        batch: int | str = "batch" if self.min_batch != self.max_batch else self.max_batch
        if self.layout == "uint8_nhwc":
            return batch, self.height, self.width, 3
        return batch, 3, self.height, self.width

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> IOContract:
        """The inverse of `to_dict`."""
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def _is_number(value: Any) -> bool:
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


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
        self.labels_dtype = torch.uint8 if num_classes <= 256 else torch.int32
        device = next(network.parameters()).device
        self.register_buffer("mean", torch.tensor(contract.mean, device=device).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(contract.std, device=device).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """`image` as the contract says -> `labels` or `logits`."""
        logits: Tensor = self.network(self.normalise(image))
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
