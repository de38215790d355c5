"""Samples of any type -> (H, W, 3) uint8, strip by strip: beside the result, memory is needed for one strip only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from agln_fast.errors import ImageError
from agln_fast.runtime.bit_depth import choose_depth

__all__ = ["Box", "Read", "boxes", "from_bytes", "from_floats", "from_integers"]

Box: TypeAlias = tuple[slice, slice]  # rows, columns
Read: TypeAlias = Callable[[Box], npt.NDArray[Any]]  # the samples (h, w) or (h, w, 1 | 3 | 4) of a box

_STRIP = 1 << 17  # pixels: strips that stay in the caches are faster than the whole image at once
_OVERSHOOT = np.float32(1e-3)  # of bicubic and Lanczos resizing, and of rounding


def boxes(height: int, width: int) -> Iterator[Box]:
    """Boxes of at most 131,072 pixels that cover (height, width), row by row."""
    columns = min(width, _STRIP)
    rows = _STRIP // columns
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            yield slice(top, min(top + rows, height)), slice(left, min(left + columns, width))


def from_bytes(
    read: Read, height: int, width: int, image: npt.NDArray[np.uint8] | None = None
) -> npt.NDArray[np.uint8]:
    """uint8 samples -> (H, W, 3): grey is spread over three channels, a fourth one is dropped.

    image: what is filled, (H, W, 3) and C-contiguous; None for a new one.
    """
    if image is None:
        image = np.empty((height, width, 3), np.uint8)
    for box in boxes(height, width):
        strip = read(box)
        image[box] = strip[..., None] if strip.ndim == 2 else strip[..., :3]
    return image


def from_integers(
    read: Read,
    height: int,
    width: int,
    name: str,
    *,
    declared: int | None = None,
    bit_depth: int | None = None,
    wide: bool = False,
    image: npt.NDArray[np.uint8] | None = None,
) -> npt.NDArray[np.uint8]:
    """Samples of 16 or 32 bits -> (H, W, 3) uint8: value * 255 / (2**depth - 1), rounded.

    `declared`, `bit_depth` and `wide` decide about the depth as in `choose_depth`; `image` is as in `from_bytes`, and
    `read` may read what it held before.

    Raises:
        ImageError: a value is outside 0..65535, or as in `choose_depth`.
    """
    low, high = np.inf, -np.inf
    for box in boxes(height, width):
        strip = read(box)
        low, high = min(low, strip.min()), max(high, strip.max())
    if low < 0 or high > 65535:
        raise ImageError(f"{name}: has values from {low} to {high}; whole numbers must be from 0 to 65535")
    largest = 2 ** choose_depth(int(high), name, declared=declared, bit_depth=bit_depth, wide=wide) - 1
    table = ((np.arange(largest + 1) * 510 + largest) // (2 * largest)).astype(np.uint8)
    return from_bytes(lambda box: table[read(box)], height, width, image)


def from_floats(read: Read, height: int, width: int, name: str) -> npt.NDArray[np.uint8]:
    """Floating-point samples in 0..1 -> (H, W, 3) uint8: value * 255, rounded. Up to 1e-3 beyond 0..1 is clamped.

    Raises:
        ImageError: a value is further outside, infinite or NaN.
    """
    low, high, finite = np.inf, -np.inf, True
    for box in boxes(height, width):
        strip = read(box)
        low, high = min(low, float(strip.min())), max(high, float(strip.max()))
        finite = finite and bool(np.isfinite(strip).all())
    if not finite:
        raise ImageError(f"{name}: has values that are NaN or infinite; floating-point images are RGB in 0..1")
    if np.float32(low) < -_OVERSHOOT or np.float32(high) > 1 + _OVERSHOOT:
        if low < -_OVERSHOOT:
            advice = "give it as it was before mean and std were applied"
        else:
            advice = (
                "divide it by 255, or give it as uint8" if high <= 256 else "divide it by its largest possible value"
            )
        raise ImageError(f"{name}: has values from {low:g} to {high:g}, and floating-point images need 0..1; {advice}")

    def scaled(box: Box) -> npt.NDArray[np.uint8]:
        clamped: npt.NDArray[np.float32] = np.clip(read(box), 0, 1)
        return np.rint(clamped * 255).astype(np.uint8)

    return from_bytes(scaled, height, width)
