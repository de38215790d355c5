"""separable_conv on CUDA: y[b] = relu(W_pointwise · (X * W_depthwise) + bias); (C, H, W) -> (O, H, W).

Each program filters a tile of pixels, a rectangle, and feeds it to the pointwise product, so that the filtered map
never leaves the chip. A thread has a group of 2x4 pixels, in some channels next to each other: it loads the 4x6 pixels
around them once, three loads for each result in place of nine, and has them all under way together.

Where all channels can be held, they are filtered slice by slice and stay in shared memory, while the pointwise weights
go by in tiles of outputs, the next one being loaded meanwhile: each pixel is filtered once. Where they cannot, a
program has one tile of outputs, and sums over the slices as they come. All sums are float32.

Prefixes: i_ index, o_ offsets, m_ mask, p_ pointer, b_ loaded block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agln_fast.kernels.launch import LaunchConfig, block, pixel_block
from agln_fast.kernels.layout import empty_maps

__all__ = ["separable_conv"]

_GROUP = 8  # pixels, 2x4


@triton.jit
def _add_row(sums, around, p_d, m_c, stride_dt):
    """Add three taps of a row to four pixels next to each other: `around` are these, and the ones before and after."""
    for dx in tl.static_range(3):
        b_d = tl.load(p_d + dx * stride_dt, mask=m_c, other=0.0).to(tl.float32)  # [BG, BC]
        more = ()
        for i in tl.static_range(4):
            more = more + (sums[i] + around[i + dx] * b_d,)
        sums = more
    return sums


@triton.jit
def _pairs(blocks):
    """Each two blocks as one, which has a further dimension of 2."""
    joined = ()
    for i in tl.static_range(len(blocks) // 2):
        joined = joined + (tl.join(blocks[2 * i], blocks[2 * i + 1]),)
    return joined


@triton.jit
def _filter(p_x, w_depthwise, o_c, row, column, C, H, W, stride_xc, stride_xp, stride_dc, stride_dt, BG: tl.constexpr):
    """The channels o_c of groups of pixels that begin at (row, column), filtered: [8 * BG, BC], a group's pixels one
    after the other."""
    BC: tl.constexpr = o_c.shape[0]
    m_c = (o_c < C)[None, :]
    p_x += o_c[None, :].to(tl.int64) * stride_xc
    # As large as the blocks that they are multiplied with: otherwise they would change threads by way of shared memory.
    p_d = w_depthwise + tl.broadcast_to((o_c * stride_dc)[None, :], (BG, BC))
    b_zero = tl.zeros([BG, BC], tl.float32)
    upper, lower = (b_zero, b_zero, b_zero, b_zero), (b_zero, b_zero, b_zero, b_zero)
    for y in tl.static_range(4):
        m_row = (row + (y - 1) >= 0) & (row + (y - 1) < H)
        around = ()
        for x in tl.static_range(6):
            m_x = (m_row & (column + (x - 1) >= 0) & (column + (x - 1) < W))[:, None] & m_c
            b_x = tl.load(p_x + ((y - 1) * W + (x - 1)) * stride_xp, mask=m_x, other=0.0)  # [BG, BC]
            around = around + (b_x.to(tl.float32),)
        if y < 3:
            upper = _add_row(upper, around, p_d + 3 * y * stride_dt, m_c, stride_dt)
        if y > 0:
            lower = _add_row(lower, around, p_d + 3 * (y - 1) * stride_dt, m_c, stride_dt)
    b_f = _pairs(_pairs(_pairs(upper + lower)))[0]  # [BG, BC, and the pixel's number in bits, the lowest first]
    return tl.reshape(tl.permute(b_f, (0, 4, 3, 2, 1)), (8 * BG, BC))


@triton.jit
def _separable_kernel(
    x,
    w_depthwise,
    w_pointwise,
    bias,
    y,
    C,
    OUT,
    H,
    W,
    stride_xb,
    stride_xc,
    stride_xp,
    stride_dc,
    stride_dt,
    stride_po,
    stride_pc,
    stride_yb,
    stride_yo,
    stride_yp,
    BG: tl.constexpr,  # groups of pixels
    GW: tl.constexpr,  # of them, those side by side
    BC: tl.constexpr,
    BO: tl.constexpr,
    HELD: tl.constexpr,  # slices of channels that are held; 0 if there are too many
    PRECISION: tl.constexpr,
):
    i_tile, i_o, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles_x = tl.cdiv(W, 4 * GW)
    first_y, first_x = i_tile // tiles_x * (BG // GW * 2), i_tile % tiles_x * (4 * GW)
    first = first_y.to(tl.int64) * W + first_x
    o_g, o_c = tl.arange(0, BG), tl.arange(0, BC)
    o_row, o_column = o_g // GW * 2, o_g % GW * 4
    row, column = first_y + o_row, first_x + o_column
    p_x = x + i_b * stride_xb + first * stride_xp + (o_row * W + o_column)[:, None] * stride_xp
    p_w = w_pointwise + o_c[:, None] * stride_pc

    held = ()
    for i in tl.static_range(HELD):
        b_f = _filter(
            p_x, w_depthwise, i * BC + o_c, row, column, C, H, W, stride_xc, stride_xp, stride_dc, stride_dt, BG
        )
        held = held + (b_f.to(x.dtype.element_ty),)
        tl.debug_barrier()  # the next slice's loads stay behind it: both slices' would not fit the registers

    o_p = tl.arange(0, 8 * BG)
    o_y, o_x = o_p // 8 // GW * 2 + o_p % 8 // 4, o_p // 8 % GW * 4 + o_p % 4
    m_p = (first_y + o_y < H) & (first_x + o_x < W)
    p_y = y + i_b * stride_yb + first * stride_yp + (o_y * W + o_x)[:, None] * stride_yp
    for o in range(i_o * BO, OUT, tl.num_programs(1) * BO):
        o_o = o + tl.arange(0, BO)
        m_o = o_o < OUT
        b_acc = tl.zeros([8 * BG, BO], tl.float32)
        for i in tl.static_range(HELD):
            m_w = (i * BC + o_c < C)[:, None] & m_o[None, :]
            b_w = tl.load(p_w + i * BC * stride_pc + o_o[None, :] * stride_po, mask=m_w, other=0.0)  # [BC, BO]
            b_acc = tl.dot(held[i], b_w, b_acc, input_precision=PRECISION)
        if HELD == 0:
            for c in range(0, C, BC):
                b_f = _filter(
                    p_x, w_depthwise, c + o_c, row, column, C, H, W, stride_xc, stride_xp, stride_dc, stride_dt, BG
                )
                m_w = (c + o_c < C)[:, None] & m_o[None, :]
                b_w = tl.load(p_w + c * stride_pc + o_o[None, :] * stride_po, mask=m_w, other=0.0)  # [BC, BO]
                b_acc = tl.dot(b_f.to(b_w.dtype), b_w, b_acc, input_precision=PRECISION)
        b_y = b_acc + tl.load(bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
        b_y = tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        p_yo = p_y + o_o[None, :].to(tl.int64) * stride_yo
        tl.store(p_yo, b_y.to(y.dtype.element_ty), mask=m_p[:, None] & m_o[None, :])


def separable_conv(x: Tensor, w_depthwise: Tensor, w_pointwise: Tensor, bias: Tensor, config: LaunchConfig) -> Tensor:
    """As the reference; the arguments are checked.

    `config` sets tiles P (the largest), O, and C, of channels at once, and K, how many can be held. A smaller tile of
    pixels has as many more channels.
    """
    y = empty_maps(x, w_pointwise.shape[0])
    height, width = x.shape[2:]
    x, taps, weight = x.flatten(2), w_depthwise.flatten(1), w_pointwise.flatten(1)
    (batch, channels, count), outputs = x.shape, weight.shape[0]
    bo, holds = block(outputs, config.tile["O"]), channels <= config.tile["K"]
    parts = 1 if holds else triton.cdiv(outputs, bo)
    bp = pixel_block(count, batch * parts, config)
    bc = block(channels, config.tile["C"] * config.tile["P"] // bp)
    groups = bp // _GROUP
    across = 1 << (groups.bit_length() - 1) // 2
    down = groups // across
    tiles = triton.cdiv(height, 2 * down) * triton.cdiv(width, 4 * across)
    with torch.cuda.device_of(x):
        _separable_kernel[(tiles, parts, batch)](
            x,
            taps,
            weight,
            bias.contiguous(),
            y,
            channels,
            outputs,
            height,
            width,
            *x.stride(),
            *taps.stride(),
            *weight.stride(),
            *y.flatten(2).stride(),
            BG=groups,
            GW=across,
            BC=bc,
            BO=bo,
            HELD=triton.cdiv(channels, bc) if holds else 0,
            PRECISION="ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y
