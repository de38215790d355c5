"""Feature maps as matrices: pixels × channels, which is how channels_last lies in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["empty_maps", "maps", "pixels", "wide"]


def wide(x: Tensor) -> Tensor:
    """At least float32: sums and softmaxes are never taken in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, P, C) with P = H·W; a view in either memory format, a copy of anything that is in neither."""
    return x.flatten(2).transpose(1, 2)


def empty_maps(like: Tensor, channels: int | None = None, size: Sequence[int] | None = None) -> Tensor:
    """Uninitialised (B, channels, H, W) of `like`'s dtype and device, and but for what is given of its shape;
    channels_last where its channels are adjacent."""
    memory_format = torch.channels_last if like.stride(1) == 1 else torch.contiguous_format
    shape = like.shape[0], like.shape[1] if channels is None else channels, *(like.shape[2:] if size is None else size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def maps(y: Tensor, like: Tensor) -> Tensor:
    """(B, P, C) -> (B, C, H, W) with the spatial size and the dtype of `like`, laid out as `empty_maps` has it."""
    out = empty_maps(like, y.shape[2])
    result = y.transpose(1, 2).view(out.shape)
    return result if (result.stride(), result.dtype) == (out.stride(), out.dtype) else out.copy_(result)
