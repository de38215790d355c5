"""bias_relu on CUDA: y[b] = relu(x + bias + residual), (C, P) each.

Each program takes a tile of pixels and channels, long where elements are next to each other in memory: a thread has
several of them, in loads and stores of 16 bytes. Prefixes: i_ index, o_ offsets, p_ pointer, b_ loaded block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agln_fast.kernels.launch import LaunchConfig, block
from agln_fast.kernels.layout import empty_maps

__all__ = ["bias_relu"]


@triton.jit
def _bias_relu_kernel(
    x,
    bias,
    residual,
    y,
    C,
    P,
    stride_xb,
    stride_xc,
    stride_xp,
    stride_rb,
    stride_rc,
    stride_rp,
    stride_yb,
    stride_yc,
    stride_yp,
    BP: tl.constexpr,
    BC: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    i_p, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_p, o_c = i_p * BP + tl.arange(0, BP), i_c * BC + tl.arange(0, BC)
    mask = (o_p < P)[:, None] & (o_c < C)[None, :]
    b_bias = tl.load(bias + o_c, mask=o_c < C, other=0.0).to(tl.float32)[None, :]
    o_p, o_c = o_p.to(tl.int64)[:, None], o_c.to(tl.int64)[None, :]
    b_x = tl.load(x + i_b * stride_xb + o_p * stride_xp + o_c * stride_xc, mask=mask, other=0.0)  # [BP, BC]
    b_y = b_x.to(tl.float32) + b_bias
    if HAS_RESIDUAL:
        b_r = tl.load(residual + i_b * stride_rb + o_p * stride_rp + o_c * stride_rc, mask=mask, other=0.0)
        b_y += b_r.to(tl.float32)
    p_y = y + i_b * stride_yb + o_p * stride_yp + o_c * stride_yc
    tl.store(p_y, tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL).to(y.dtype.element_ty), mask=mask)


def bias_relu(x: Tensor, bias: Tensor, residual: Tensor | None = None, *, config: LaunchConfig) -> Tensor:
    """As the reference; the arguments are checked.

    `config` sets tile C, of pixels where those are adjacent, and P times C, the elements of a tile.
    """
    y = empty_maps(x)
    has_residual = residual is not None
    x, flat = x.flatten(2), y.flatten(2)
    r = x if residual is None else residual.flatten(2)
    batch, channels, count = x.shape
    elements = config.tile["P"] * config.tile["C"]
    if flat.stride(1) == 1:
        bc = block(channels, config.tile["C"])
        bp = elements // bc
    else:
        bp = block(count, config.tile["C"])
        bc = elements // bp
    with torch.cuda.device_of(x):
        _bias_relu_kernel[(triton.cdiv(count, bp), triton.cdiv(channels, bc), batch)](
            x,
            bias.contiguous(),
            r,
            flat,
            channels,
            count,
            *x.stride(),
            *r.stride(),
            *flat.stride(),
            BP=bp,
            BC=bc,
            HAS_RESIDUAL=has_residual,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y
