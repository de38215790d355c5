"""separable_conv on CUDA: y[b] = relu(W_pointwise · (X * W_depthwise) + bias); (C, H, W) -> (O, H, W).

Each program takes a tile of pixels and a tile of output channels. It filters one tile of input channels after the other
(nine masked taps, summed in float32) and feeds it to the pointwise product, so that the filtered map never leaves the
chip. Where all output channels fit one tile, every pixel is filtered once.

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
    BP: tl.constexpr,
    BC: tl.constexpr,
    BO: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_p, i_o, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = i_p * BP
    o_p = tl.arange(0, BP)
    o_c = tl.arange(0, BC)
    o_o = i_o * BO + tl.arange(0, BO)
    m_p, m_o = first + o_p < H * W, o_o < OUT
    row, column = (first + o_p) // W, (first + o_p) % W
    p_x = x + i_b.to(tl.int64) * stride_xb + first.to(tl.int64) * stride_xp
    p_x += o_p[:, None] * stride_xp + o_c[None, :] * stride_xc
    p_d = w_depthwise + o_c * stride_dc
    p_w = w_pointwise + o_c[:, None] * stride_pc + o_o[None, :] * stride_po

    b_acc = tl.zeros([BP, BO], tl.float32)
    for c in range(0, C, BC):
        m_c = c + o_c < C
        b_f = tl.zeros([BP, BC], tl.float32)
        for dy in range(-1, 2):  # a loop at run time: nine taps unrolled would not fit the registers
            m_row = m_p & (row + dy >= 0) & (row + dy < H)
            for dx in tl.static_range(-1, 2):
                m_tap = m_row & (column + dx >= 0) & (column + dx < W)
                m_x = m_tap[:, None] & m_c[None, :]
                b_x = tl.load(p_x + (dy * W + dx) * stride_xp, mask=m_x, other=0.0)  # [BP, BC]
                b_d = tl.load(p_d + (3 * dy + dx + 4) * stride_dt, mask=m_c, other=0.0)  # [BC]
                b_f += b_x.to(tl.float32) * b_d.to(tl.float32)[None, :]
        b_w = tl.load(p_w, mask=m_c[:, None] & m_o[None, :], other=0.0)  # [BC, BO]
        b_acc = tl.dot(b_f.to(b_w.dtype), b_w, b_acc, input_precision=PRECISION)
        p_x += BC * stride_xc
        p_d += BC * stride_dc
        p_w += BC * stride_pc
    b_y = tl.maximum(b_acc + tl.load(bias + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :], 0.0)
    p_y = y + i_b.to(tl.int64) * stride_yb + first.to(tl.int64) * stride_yp + o_o[None, :].to(tl.int64) * stride_yo
    tl.store(p_y + o_p[:, None] * stride_yp, b_y.to(y.dtype.element_ty), mask=m_p[:, None] & m_o[None, :])


def separable_conv(x: Tensor, w_depthwise: Tensor, w_pointwise: Tensor, bias: Tensor, config: LaunchConfig) -> Tensor:
    """As the reference; the arguments are checked. `config` sets tiles P (the largest), C and O."""
    y = empty_maps(x, w_pointwise.shape[0])
    height, width = x.shape[2:]
    x, taps, weight = x.flatten(2), w_depthwise.flatten(1), w_pointwise.flatten(1)
    (batch, channels, count), outputs = x.shape, weight.shape[0]
    bc, bo = block(channels, config.tile["C"]), block(outputs, config.tile["O"])
    bp = pixel_block(count, batch * triton.cdiv(outputs, bo), config)
    with torch.cuda.device_of(x):
        _separable_kernel[(triton.cdiv(count, bp), triton.cdiv(outputs, bo), batch)](
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
            BP=bp,
            BC=bc,
            BO=bo,
            PRECISION="ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y
