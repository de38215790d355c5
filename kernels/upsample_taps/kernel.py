"""upsample_taps on CUDA: y = relu(base + bias + the resized, shifted taps of each map); (9C, h, w) -> (C, H, W).

Each program takes a tile of target pixels and a tile of channels, and sums over the maps and their taps in float32:
a tap is read at the four source pixels around its target pixel, so that neither the resized maps nor their shifts ever
exist. The three taps of a row lie between the same source rows, and are summed before they are interpolated between
them. Pixels of a tile lie in a rectangle: most of what they read, they share, and find in the L1. All maps are summed
in one launch; there is a kernel for each number of them.

Prefixes: i_ index, o_ offsets, m_ mask, p_ pointer, b_ loaded block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from agln_fast.kernels.launch import LaunchConfig, block
from agln_fast.kernels.layout import empty_maps

__all__ = ["upsample_taps"]


@triton.jit
def _corners(o, source, scale):
    """Source rows (or columns) before and after each target row (or column), and the weight of the latter."""
    position = scale * o.to(tl.float32)
    before = tl.minimum(position.to(tl.int32), source - 1)
    after = tl.minimum(before + 1, source - 1)
    return before, after, tl.minimum(tl.maximum(position - before.to(tl.float32), 0.0), 1.0)


@triton.jit
def _between(p_tap, o_left, o_right, weight, mask, stride_p):
    """A tap [BP, BC] between source pixels o_left and o_right [BP], the latter of which has the weight [BP]."""
    b_left = tl.load(p_tap + o_left.to(tl.int64)[:, None] * stride_p, mask=mask, other=0.0).to(tl.float32)
    b_right = tl.load(p_tap + o_right.to(tl.int64)[:, None] * stride_p, mask=mask, other=0.0).to(tl.float32)
    return b_left * (1 - weight)[:, None] + b_right * weight[:, None]


@triton.jit
def _upsample_kernel(
    base,
    bias,
    y,
    maps,  # for each coarse map: taps [B, 9 * C, h * w], h, w, scales of y and x, strides
    C,
    H,
    W,
    stride_xb,
    stride_xc,
    stride_xp,
    stride_yb,
    stride_yc,
    stride_yp,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BC: tl.constexpr,
):
    i_tile, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles_x = tl.cdiv(W, BW)
    o_p, o_c = tl.arange(0, BH * BW), i_c * BC + tl.arange(0, BC)
    o_y, o_x = i_tile // tiles_x * BH + o_p // BW, i_tile % tiles_x * BW + o_p % BW
    m_c = o_c < C
    m_y = ((o_y < H) & (o_x < W))[:, None] & m_c[None, :]
    o_target, o_channel = (o_y.to(tl.int64) * W + o_x)[:, None], o_c.to(tl.int64)[None, :]

    b_acc = tl.zeros([BH * BW, BC], tl.float32)
    for i in tl.static_range(len(maps)):
        taps, SOURCE_H, SOURCE_W, scale_y, scale_x, stride_b, stride_c, stride_p = maps[i]
        for dy in range(-1, 2):  # a loop at run time: nine taps unrolled would not fit the registers
            row = o_y + dy
            upper, lower, weight_y = _corners(row, SOURCE_H, scale_y)
            upper, lower = upper * SOURCE_W, lower * SOURCE_W
            m_row = (row >= 0) & (row < H)
            b_upper, b_lower = tl.zeros([BH * BW, BC], tl.float32), tl.zeros([BH * BW, BC], tl.float32)
            for dx in tl.static_range(-1, 2):
                column = o_x + dx
                left, right, weight_x = _corners(column, SOURCE_W, scale_x)
                m_tap = (m_row & (column >= 0) & (column < W))[:, None] & m_c[None, :]
                o_tap = ((3 * dy + dx + 4) * C + o_c).to(tl.int64)[None, :]
                p_tap = taps + i_b * stride_b + o_tap * stride_c
                b_upper += _between(p_tap, upper + left, upper + right, weight_x, m_tap, stride_p)
                b_lower += _between(p_tap, lower + left, lower + right, weight_x, m_tap, stride_p)
            b_acc += b_upper * (1 - weight_y)[:, None] + b_lower * weight_y[:, None]
    b_x = tl.load(base + i_b * stride_xb + o_channel * stride_xc + o_target * stride_xp, mask=m_y, other=0.0)
    b_acc += b_x.to(tl.float32) + tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    p_y = y + i_b * stride_yb + o_channel * stride_yc + o_target * stride_yp
    tl.store(p_y, tl.maximum(b_acc, 0.0).to(y.dtype.element_ty), mask=m_y)


def upsample_taps(base: Tensor, taps: Sequence[Tensor], bias: Tensor, config: LaunchConfig) -> Tensor:
    """As the reference; the arguments are checked. `config` sets tiles H and W of the target, and C."""
    y = empty_maps(base)
    batch, channels, *size = base.shape
    maps = tuple(_source(coarse, size) for coarse in taps)
    (height, width), flat = size, base.flatten(2)
    bh, bw, bc = config.tile["H"], config.tile["W"], block(channels, config.tile["C"])
    with torch.cuda.device_of(base):
        _upsample_kernel[(triton.cdiv(height, bh) * triton.cdiv(width, bw), triton.cdiv(channels, bc), batch)](
            flat,
            bias.contiguous(),
            y,
            maps,
            channels,
            height,
            width,
            *flat.stride(),
            *y.flatten(2).stride(),
            BH=bh,
            BW=bw,
            BC=bc,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y


def _source(coarse: Tensor, size: Sequence[int]) -> tuple[Tensor | float, ...]:
    """What the kernel needs to know of (B, 9C, h, w) taps that are resized to `size`."""
    (h, w), flat = coarse.shape[2:], coarse.flatten(2)
    scale_y, scale_x = ((before - 1) / max(1, after - 1) for before, after in zip((h, w), size, strict=True))
    return flat, h, w, scale_y, scale_x, *flat.stride()
