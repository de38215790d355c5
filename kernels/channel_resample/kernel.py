"""channel_affinity and channel_apply on CUDA.

channel_affinity: R[b] = softmax over j of (sign · E Bᵀ), (C, P) twice -> (C, C). The pixels are split among programs,
so that one image fills the GPU; each writes a float32 tile of partial sums, and a second kernel adds the splits up in a
fixed order and takes the softmax of each row. The partial sums cost traffic, 4·C·C bytes written and read for each
split: `waves` programs for each multiprocessor, and not more, balance that against an idle device.

channel_apply: out[b] = base + gate_scale · (R B) ⊙ σ(M) + skip_scale · B, (C, P) each. A program multiplies a tile of
pixels by R; gate, scales and sums follow in registers.

Prefixes: i_ index, o_ offsets, m_ mask, p_ pointer, b_ loaded block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agln_fast.kernels.launch import LaunchConfig, block, pixel_block, split
from agln_fast.kernels.layout import empty_maps

__all__ = ["channel_affinity", "channel_apply"]


@triton.jit
def _energy_kernel(
    e,
    b,
    partial,  # [B, splits, C, C] float32
    C,
    P,
    SPLIT,
    stride_eb,
    stride_ec,
    stride_ep,
    stride_bb,
    stride_bc,
    stride_bp,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BP: tl.constexpr,
):
    i_tile, i_split, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles_j = tl.cdiv(C, BJ)
    o_i, o_j = i_tile // tiles_j * BI + tl.arange(0, BI), i_tile % tiles_j * BJ + tl.arange(0, BJ)
    o_p = tl.arange(0, BP)
    m_i, m_j = o_i < C, o_j < C
    first = i_split * SPLIT
    last = tl.minimum(first + SPLIT, P)
    p_e = e + i_b * stride_eb + first.to(tl.int64) * stride_ep
    p_b = b + i_b * stride_bb + first.to(tl.int64) * stride_bp
    p_e += o_p[:, None] * stride_ep + o_i[None, :].to(tl.int64) * stride_ec
    p_b += o_p[:, None] * stride_bp + o_j[None, :].to(tl.int64) * stride_bc
    b_acc = tl.zeros([BI, BJ], tl.float32)
    for start in range(first, last, BP):
        m_p = start + o_p < last
        b_e = tl.load(p_e, mask=m_p[:, None] & m_i[None, :], other=0.0)  # [BP, BI]
        b_b = tl.load(p_b, mask=m_p[:, None] & m_j[None, :], other=0.0)  # [BP, BJ]
        b_acc = tl.dot(tl.trans(b_e), b_b, b_acc, input_precision="ieee")
        p_e += BP * stride_ep
        p_b += BP * stride_bp
    row = (i_b * tl.num_programs(1) + i_split) * C * C
    tl.store(partial + row + o_i[:, None] * C + o_j[None, :], b_acc, mask=m_i[:, None] & m_j[None, :])


@triton.jit
def _softmax_kernel(partial, r, sign, C, SPLITS, STEP: tl.constexpr, BC: tl.constexpr):
    i_r, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_c = tl.arange(0, BC)
    m_c = o_c < C
    b_s = tl.zeros([BC], tl.float32)
    for start in range(0, SPLITS, STEP):
        o_t = start + tl.arange(0, STEP)
        p_t = partial + ((i_b * SPLITS + o_t[:, None]) * C + i_r) * C + o_c[None, :]
        b_s += tl.sum(tl.load(p_t, mask=(o_t < SPLITS)[:, None] & m_c[None, :], other=0.0), 0)
    b_s = tl.where(m_c, sign * b_s, float("-inf"))
    b_s = tl.exp(b_s - tl.max(b_s, 0))
    tl.store(r + (i_b * C + i_r) * C + o_c, (b_s / tl.sum(b_s, 0)).to(r.dtype.element_ty), mask=m_c)


@triton.jit
def _apply_kernel(
    r,
    b,
    m,
    base,
    out,
    gate_scale,
    skip_scale,
    C,
    P,
    stride_rb,
    stride_ri,
    stride_rj,
    stride_bb,
    stride_bc,
    stride_bp,
    stride_mb,
    stride_mc,
    stride_mp,
    stride_sb,
    stride_sc,
    stride_sp,
    stride_ob,
    stride_oc,
    stride_op,
    BP: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    HAS_R: tl.constexpr,
    HAS_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_p, i_i, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = i_p.to(tl.int64) * BP
    o_p, o_j = tl.arange(0, BP), tl.arange(0, BJ)
    o_i = i_i * BI + tl.arange(0, BI)
    m_p, m_i = first + o_p < P, o_i < C
    m_pi = m_p[:, None] & m_i[None, :]
    o_pi = o_i[None, :].to(tl.int64)
    p_b = b + i_b * stride_bb + first * stride_bp + o_p[:, None] * stride_bp
    if HAS_R:
        p_r = r + i_b * stride_rb + o_i[None, :] * stride_ri + o_j[:, None] * stride_rj
        b_acc = tl.zeros([BP, BI], tl.float32)
        for j in range(0, C, BJ):
            m_j = j + o_j < C
            p_bj = p_b + (j + o_j)[None, :].to(tl.int64) * stride_bc
            b_bj = tl.load(p_bj, mask=m_p[:, None] & m_j[None, :], other=0.0)  # [BP, BJ]
            b_r = tl.load(p_r, mask=m_j[:, None] & m_i[None, :], other=0.0)  # [BJ, BI]
            b_acc = tl.dot(b_bj, b_r.to(b_bj.dtype), b_acc, input_precision=PRECISION)
            p_r += BJ * stride_rj
        b_b = tl.load(p_b + o_pi * stride_bc, mask=m_pi, other=0.0).to(tl.float32)  # [BP, BI], still in the L1
    else:
        b_b = tl.load(p_b + o_pi * stride_bc, mask=m_pi, other=0.0).to(tl.float32)
        b_acc = b_b
    if HAS_M:
        p_m = m + i_b * stride_mb + first * stride_mp + o_p[:, None] * stride_mp + o_pi * stride_mc
        b_m = tl.load(p_m, mask=m_pi, other=0.0).to(tl.float32)
        b_acc /= 1 + tl.exp(-b_m)
    p_s = base + i_b * stride_sb + first * stride_sp + o_p[:, None] * stride_sp + o_pi * stride_sc
    b_out = tl.load(p_s, mask=m_pi, other=0.0).to(tl.float32) + gate_scale * b_acc + skip_scale * b_b
    p_o = out + i_b * stride_ob + first * stride_op + o_p[:, None] * stride_op + o_pi * stride_oc
    tl.store(p_o, b_out.to(out.dtype.element_ty), mask=m_pi)


def channel_affinity(
    e: Tensor, b: Tensor, sign: float, config: LaunchConfig, dtype: torch.dtype | None = None
) -> Tensor:
    """As the reference; the arguments are checked. `config` sets tiles I, J and P, and into how many splits P falls."""
    e, b = e.flatten(2), b.flatten(2)
    batch, channels, count = e.shape
    bi, bj, bp = (block(n, config.tile[key]) for n, key in ((channels, "I"), (channels, "J"), (count, "P")))
    tiles = triton.cdiv(channels, bi) * triton.cdiv(channels, bj)
    splits, size = split(count, bp, tiles * batch, config)
    partial = e.new_empty(batch, splits, channels, channels, dtype=torch.float32)
    r = e.new_empty(batch, channels, channels, dtype=dtype or torch.float32)
    with torch.cuda.device_of(e):
        _energy_kernel[(tiles, splits, batch)](
            e,
            b,
            partial,
            channels,
            count,
            size,
            *e.stride(),
            *b.stride(),
            BI=bi,
            BJ=bj,
            BP=bp,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        _softmax_kernel[(channels, batch)](
            partial,
            r,
            sign,
            channels,
            splits,
            STEP=min(8, triton.next_power_of_2(splits)),
            BC=triton.next_power_of_2(channels),
            num_warps=4,
        )
    return r


def channel_apply(
    r: Tensor | None,
    b: Tensor,
    m: Tensor | None,
    base: Tensor,
    gate_scale: float,
    skip_scale: float,
    config: LaunchConfig,
) -> Tensor:
    """As the reference; the arguments are checked. `config` sets tiles P, I and J."""
    out = empty_maps(base)
    has_r, has_m = r is not None, m is not None
    b, base, o = b.flatten(2), base.flatten(2), out.flatten(2)
    m = b if m is None else m.flatten(2)
    r = b if r is None else r
    batch, channels, count = b.shape
    bi, bj = block(channels, config.tile["I"]), block(channels, config.tile["J"])
    bp = pixel_block(count, batch * triton.cdiv(channels, bi), config)
    with torch.cuda.device_of(b):
        _apply_kernel[(triton.cdiv(count, bp), triton.cdiv(channels, bi), batch)](
            r,
            b,
            m,
            base,
            o,
            gate_scale,
            skip_scale,
            channels,
            count,
            *r.stride(),
            *b.stride(),
            *m.stride(),
            *base.stride(),
            *o.stride(),
            BP=bp,
            BI=bi,
            BJ=bj,
            HAS_R=has_r,
            HAS_M=has_m,
            PRECISION="ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out
