"""Feature maps as matrices: pixels × channels, which is how channels_last lies in memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["maps", "pixels", "wide"]


def wide(x: Tensor) -> Tensor:
    """At least float32: sums and softmaxes are never taken in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, P, C) with P = H·W; a view in either memory format, a copy of anything that is in neither."""
    return x.flatten(2).transpose(1, 2)


def maps(y: Tensor, like: Tensor) -> Tensor:
    """(B, P, C) -> (B, C, H, W) with the spatial size, the dtype and the memory format of `like`."""
    result = y.transpose(1, 2).view(like.shape[0], y.shape[2], *like.shape[2:])
    out = torch.empty_like(like)
    return result if result.stride() == out.stride() and result.dtype == out.dtype else out.copy_(result)
