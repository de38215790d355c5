"""Where a pixel of a bilinearly resized map comes from, for kernels. It loads Triton."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["corners"]


@triton.jit
def corners(o, source, scale, aligned: tl.constexpr):
    """Source rows (or columns) before and after each target row (or column), and the weight of the latter.

    aligned: whether the corners are; see `agln_fast.decode.Axis`.
    """
    position = scale * o.to(tl.float32)
    if not aligned:
        position = scale * (o.to(tl.float32) + 0.5) - 0.5
    before = tl.minimum(position.to(tl.int32), source - 1)
    after = tl.minimum(before + 1, source - 1)
    return before, after, tl.minimum(tl.maximum(position - before.to(tl.float32), 0.0), 1.0)
