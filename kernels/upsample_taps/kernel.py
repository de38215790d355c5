"""upsample_taps on CUDA: y = relu(base + bias + the resized, shifted taps of each map); (9C, h, w) -> (C, H, W).

Each program takes some columns and channels and walks down a segment of the target's rows. The three taps of a row lie
between the same source rows. So a source row is resized and shifted along x once, the three taps of each dy are summed,
and target rows are interpolated between the two such sums that lie around them, which stay in registers until the walk
passes them: six loads for each sum, instead of thirty-six for each map at every pixel. All sums are float32. All maps
are summed in one launch; there is a kernel for each number of them.

Prefixes: i_ index, o_ offsets, m_ mask, p_ pointer, b_ loaded block.
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

__all__ = ["upsample_taps"]

_FEWEST_ROWS = 4


@triton.jit
def _sums(p_map, row, o_x, o_c, m_c, C, W, source_w, scale_x, stride_c, stride_p):
    """A source row resized along x, its taps shifted by their dx and summed: a block [BW, BC] for each dy."""
    p_row = p_map + row.to(tl.int64) * source_w * stride_p + (o_c.to(tl.int64) * stride_c)[None, :]
    b_sum = tl.zeros([o_x.shape[0], o_c.shape[0]], tl.float32)
    sums = b_sum, b_sum, b_sum
    for dx in range(3):
        column = o_x + (dx - 1)
        left, right, weight = corners(column, source_w, scale_x, True)
        m_tap = ((column >= 0) & (column < W))[:, None] & m_c[None, :]
        p_left, p_right = p_row + (left * stride_p)[:, None], p_row + (right * stride_p)[:, None]
        b_weight = weight[:, None]
        more = ()
        for dy in tl.static_range(3):
            o_tap = ((3 * dy + dx) * C).to(tl.int64) * stride_c
            b_left = tl.load(p_left + o_tap, mask=m_tap, other=0.0).to(tl.float32)
            b_right = tl.load(p_right + o_tap, mask=m_tap, other=0.0).to(tl.float32)
            more = more + (sums[dy] + b_left * (1 - b_weight) + b_right * b_weight,)
        sums = more
    return sums


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
    first = i_tile // tiles_x * BH
    o_x, o_c = i_tile % tiles_x * BW + tl.arange(0, BW), i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m_y = (o_x < W)[:, None] & m_c[None, :]
    o_channel = o_c.to(tl.int64)[None, :]
    p_x, p_y = base + i_b * stride_xb + o_channel * stride_xc, y + i_b * stride_yb + o_channel * stride_yc
    b_bias = tl.load(bias + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]

    start = tl.maximum(first - 1, 0)
    walk = ()  # for each map: a source row, its sums, and those of the row after it
    for i in tl.static_range(len(maps)):
        taps, source_h, source_w, scale_y, scale_x, stride_b, stride_c, stride_p = maps[i]
        upper, lower, _ = corners(start, source_h, scale_y, True)
        p_map = taps + i_b * stride_b
        above = _sums(p_map, upper, o_x, o_c, m_c, C, W, source_w, scale_x, stride_c, stride_p)
        below = _sums(p_map, lower, o_x, o_c, m_c, C, W, source_w, scale_x, stride_c, stride_p)
        walk = walk + ((upper, above, below),)
    # What is summed so far for the rows t - 1 and t: row t of a tap with dy is added to row t - dy of the target.
    b_last, b_row = tl.zeros([BW, BC], tl.float32), tl.zeros([BW, BC], tl.float32)
    for step in range(tl.minimum(first + BH, H) + 1 - start):
        t = start + step
        inside = tl.where(t < H, 1.0, 0.0)
        b_next = tl.zeros([BW, BC], tl.float32)
        walked = ()
        for i in tl.static_range(len(maps)):
            taps, source_h, source_w, scale_y, scale_x, stride_b, stride_c, stride_p = maps[i]
            row, above, below = walk[i]
            upper, lower, weight = corners(t, source_h, scale_y, True)
            while row < upper:
                row += 1
                above = below
                p_map, after = taps + i_b * stride_b, tl.minimum(row + 1, source_h - 1)
                below = _sums(p_map, after, o_x, o_c, m_c, C, W, source_w, scale_x, stride_c, stride_p)
            # Behind the last row is nothing. (To choose sums instead of weights takes registers that there are not.)
            weight_above, weight_below = inside * (1 - weight), inside * weight
            b_next += above[0] * weight_above + below[0] * weight_below
            b_row += above[1] * weight_above + below[1] * weight_below
            b_last += above[2] * weight_above + below[2] * weight_below
            walked = walked + ((row, above, below),)
        walk = walked
        if t > first:
            o_target = ((t - 1).to(tl.int64) * W + o_x)[:, None]
            b_x = tl.load(p_x + o_target * stride_xp, mask=m_y, other=0.0).to(tl.float32)
            b_y = tl.maximum(b_last + b_x + b_bias, 0.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(p_y + o_target * stride_yp, b_y.to(y.dtype.element_ty), mask=m_y)
        b_last, b_row = b_row, b_next


def upsample_taps(base: Tensor, taps: Sequence[Tensor], bias: Tensor, config: LaunchConfig) -> Tensor:
    """As the reference; the arguments are checked. `config` sets tiles H (the largest) and W of the target, and C."""
    y = empty_maps(base)
    batch, channels, *size = base.shape
    maps = tuple(_source(coarse, size) for coarse in taps)
    (height, width), flat = size, base.flatten(2)
    bh, bw, bc = config.tile["H"], config.tile["W"], block(channels, config.tile["C"])
    columns = triton.cdiv(width, bw) * triton.cdiv(channels, bc) * batch
    while bh > _FEWEST_ROWS and triton.cdiv(height, bh) * columns < config.processors:
        bh //= 2  # shorter walks begin more often, and keep more of the device busy
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
    return flat, h, w, *map(axis_scale, (h, w), size), *flat.stride()
