"""What goes into an engine and what comes out: the one description that export, backends and runtime share.

It is data, and loads without PyTorch.
"""

from __future__ import annotations

import math
import re
import reprlib
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from agln_fast.errors import ConfigError, choose

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "IOContract",
    "Layout",
    "Output",
    "Resize",
    "parse_batch",
    "parse_size",
]

Layout = Literal["uint8_nhwc", "float_nchw"]
Output = Literal["labels", "logits"]
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
            choose(name, value, allowed)
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

    def whole(self) -> IOContract:
        """As it is, but that where windows would slide over an image all of it is stretched into one."""
        return replace(self, resize="stretch") if self.resize == "slide" else self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> IOContract:
        """The inverse of `to_dict`."""
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def _is_number(value: Any) -> bool:
    return type(value) is int or (isinstance(value, float) and math.isfinite(value))


def parse_size(size: tuple[int, int] | str) -> tuple[int, int]:
    """(height, width) in pixels from itself or from "HxW".

    Raises:
        ConfigError: neither.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", size.strip().lower())
        if match is None:
            raise ConfigError(f"size {size!r}: give height x width in pixels, such as 512x512")
        return int(match[1]), int(match[2])
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise ConfigError(f"size {size!r}: needs two whole numbers, height and width")
    return size[0], size[1]


def parse_batch(batch: int | tuple[int, int] | str) -> tuple[int, int]:
    """(smallest, largest) images a run from a number, from itself, or from "N" or "SMALLEST..LARGEST".

    Raises:
        ConfigError: none of these.
    """
    if isinstance(batch, str):
        match = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", batch.strip())
        if match is None:
            raise ConfigError(f"batch {batch!r}: give a number, or a range such as 1..8")
        return int(match[1]), int(match[2] or match[1])
    ends = (batch, batch) if isinstance(batch, int) else batch
    if not isinstance(ends, tuple | list) or len(ends) != 2 or any(type(end) is not int for end in ends):
        raise ConfigError(f"batch {batch!r}: give a number of images, or the smallest and the largest")
    return ends[0], ends[1]
