"""upsample_bilinear on CUDA: (C, h, w) -> (C, H, W).

Each program takes a tile of target pixels and of channels; a thread has several channels, in loads of 16 bytes. What
neighbours share of the source they find in the L1. Prefixes: i_ index, o_ offsets, p_ pointer, b_ loaded block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from agln_fast.decode import axis_scale
from agln_fast.kernels.bilinear import corners
from agln_fast.kernels.launch import LaunchConfig, block
from agln_fast.kernels.layout import empty_maps

__all__ = ["upsample_bilinear"]


@triton.jit
def _resize_kernel(
    x,
    y,
    C,
    SOURCE_H,
    SOURCE_W,
    H,
    W,
    scale_y,
    scale_x,
    stride_xb,
    stride_xc,
    stride_xp,
    stride_yb,
    stride_yc,
    stride_yp,
    BP: tl.constexpr,
    BC: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether the corners are
):
    i_p, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_p, o_c = i_p * BP + tl.arange(0, BP), i_c * BC + tl.arange(0, BC)
    upper, lower, weight_y = corners(o_p // W, SOURCE_H, scale_y, ALIGNED)
    left, right, weight_x = corners(o_p % W, SOURCE_W, scale_x, ALIGNED)
    mask = (o_p < H * W)[:, None] & (o_c < C)[None, :]
    b_wy, b_wx = weight_y[:, None], weight_x[:, None]
    p_x = x + i_b * stride_xb + o_c.to(tl.int64)[None, :] * stride_xc
    o_upper, o_lower = upper.to(tl.int64) * SOURCE_W, lower.to(tl.int64) * SOURCE_W
    b_ul = tl.load(p_x + (o_upper + left)[:, None] * stride_xp, mask=mask, other=0.0).to(tl.float32)  # [BP, BC]
    b_ur = tl.load(p_x + (o_upper + right)[:, None] * stride_xp, mask=mask, other=0.0).to(tl.float32)
    b_ll = tl.load(p_x + (o_lower + left)[:, None] * stride_xp, mask=mask, other=0.0).to(tl.float32)
    b_lr = tl.load(p_x + (o_lower + right)[:, None] * stride_xp, mask=mask, other=0.0).to(tl.float32)
    b_upper = b_ul * (1 - b_wx) + b_ur * b_wx
    b_lower = b_ll * (1 - b_wx) + b_lr * b_wx
    b_y = b_upper * (1 - b_wy) + b_lower * b_wy
    p_y = y + i_b * stride_yb + o_c.to(tl.int64)[None, :] * stride_yc + o_p.to(tl.int64)[:, None] * stride_yp
    tl.store(p_y, b_y.to(y.dtype.element_ty), mask=mask)


def upsample_bilinear(x: Tensor, size: Sequence[int], config: LaunchConfig, *, align_corners: bool = True) -> Tensor:
    """As the reference; the arguments are checked. `config` sets tiles P of the target, and C."""
    y = empty_maps(x, size=size)
    (batch, channels, *source), (height, width) = x.shape, size
    bp, bc = config.tile["P"], block(channels, config.tile["C"])
    flat = x.flatten(2)
    with torch.cuda.device_of(x):
        _resize_kernel[(triton.cdiv(height * width, bp), triton.cdiv(channels, bc), batch)](
            flat,
            y,
            channels,
            *source,
            height,
            width,
            *(axis_scale(*sides, align_corners) for sides in zip(source, size, strict=True)),
            *flat.stride(),
            *y.flatten(2).stride(),
            BP=bp,
            BC=bc,
            ALIGNED=align_corners,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y
