"""attention_pool on CUDA: pooled[b] = X · softmax over pixels of (Wθ X), transposed; (C, P) and (N, C) -> (C, N).

One pass over X. The pixels are split among programs so that one image fills the GPU; each program keeps a running
maximum, a running sum and an accumulator (online softmax: Milakov and Gimelshein, arXiv:1805.02867), all in float32,
and writes them out. A second kernel merges the splits in a fixed order, so that results are equal from run to run.

Prefixes: i_ index, o_ offsets, m_ mask, p_ pointer, b_ loaded block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agln_fast.kernels.launch import LaunchConfig, block, split

__all__ = ["attention_pool"]


@triton.jit
def _pool_kernel(
    x,
    w_theta,
    partial,  # [B, splits, N, C] float32
    maxima,  # [B, splits, N] float32
    sums,  # [B, splits, N] float32
    C,
    N,
    P,
    SPLIT,
    stride_xb,
    stride_xc,
    stride_xp,
    stride_wn,
    stride_wc,
    BN: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
    WHOLE: tl.constexpr,  # all C channels fit one tile: X is read once
    PRECISION: tl.constexpr,
):
    i_tile, i_split, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(1)
    tiles_n = tl.cdiv(N, BN)
    i_n, i_c = i_tile % tiles_n, i_tile // tiles_n
    o_n = i_n * BN + tl.arange(0, BN)
    o_c = i_c * BC + tl.arange(0, BC)
    o_p = tl.arange(0, BP)
    o_k = tl.arange(0, BC)
    m_n, m_c = o_n < N, o_c < C
    p_w = w_theta + o_n[:, None] * stride_wn
    first = i_split * SPLIT
    last = tl.minimum(first + SPLIT, P)
    p_x = x + i_b.to(tl.int64) * stride_xb + first.to(tl.int64) * stride_xp

    b_max = tl.full([BN], float("-inf"), tl.float32)
    b_sum = tl.zeros([BN], tl.float32)
    b_acc = tl.zeros([BN, BC], tl.float32)
    if WHOLE:
        b_w = tl.load(p_w + o_c[None, :] * stride_wc, mask=m_n[:, None] & m_c[None, :], other=0.0)  # [BN, BC]
    for start in range(first, last, BP):
        m_p = start + o_p < last
        o_x = o_p[:, None] * stride_xp
        b_x = tl.load(p_x + o_x + o_c[None, :] * stride_xc, mask=m_p[:, None] & m_c[None, :], other=0.0)  # [BP, BC]
        if WHOLE:
            b_s = tl.dot(b_w, tl.trans(b_x), input_precision=PRECISION)  # [BN, BP]
        else:
            b_s = tl.zeros([BN, BP], tl.float32)
            for k in range(0, C, BC):
                m_k = k + o_k < C
                b_wk = tl.load(p_w + (k + o_k)[None, :] * stride_wc, mask=m_n[:, None] & m_k[None, :], other=0.0)
                b_xk = tl.load(p_x + o_x + (k + o_k)[None, :] * stride_xc, mask=m_p[:, None] & m_k[None, :], other=0.0)
                b_s = tl.dot(b_wk, tl.trans(b_xk), b_s, input_precision=PRECISION)
        b_s = tl.where(m_p[None, :], b_s, float("-inf"))
        b_next = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp(b_s - b_next[:, None])
        b_scale = tl.exp(b_max - b_next)
        b_sum = b_sum * b_scale + tl.sum(b_p, 1)
        b_acc = tl.dot(b_p.to(b_x.dtype), b_x, b_acc * b_scale[:, None], input_precision=PRECISION)
        b_max = b_next
        p_x += BP * stride_xp
    row = (i_b * splits + i_split).to(tl.int64) * N
    p_partial = partial + row * C + o_n[:, None] * C + o_c[None, :]
    tl.store(p_partial, b_acc, mask=m_n[:, None] & m_c[None, :])
    if i_c == 0:
        tl.store(maxima + row + o_n, b_max, mask=m_n)
        tl.store(sums + row + o_n, b_sum, mask=m_n)


@triton.jit
def _merge_kernel(partial, maxima, sums, pooled, C, N, SPLITS, BS: tl.constexpr, STEP: tl.constexpr, BC: tl.constexpr):
    i_n, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    o_s = tl.arange(0, BS)
    m_c, m_s = o_c < C, o_s < SPLITS
    row = i_b * SPLITS * N + i_n
    b_max = tl.load(maxima + row + o_s * N, mask=m_s, other=float("-inf"))  # [BS]
    top = tl.max(b_max, 0)
    total = tl.sum(tl.exp(b_max - top) * tl.load(sums + row + o_s * N, mask=m_s, other=0.0), 0)
    b_acc = tl.zeros([BC], tl.float32)
    for start in range(0, SPLITS, STEP):
        o_t = start + tl.arange(0, STEP)
        m_t = o_t < SPLITS
        b_w = tl.exp(tl.load(maxima + row + o_t * N, mask=m_t, other=float("-inf")) - top)  # [STEP]
        p_t = partial + (row + o_t[:, None] * N) * C + o_c[None, :]
        b_acc += tl.sum(tl.load(p_t, mask=m_t[:, None] & m_c[None, :], other=0.0) * b_w[:, None], 0)
    tl.store(pooled + (i_b * N + i_n) * C + o_c, (b_acc / total).to(pooled.dtype.element_ty), mask=m_c)


def attention_pool(x: Tensor, w_theta: Tensor, config: LaunchConfig) -> Tensor:
    """As the reference; the arguments are checked. `config` sets tiles N, P and C, and into how many splits P falls."""
    x = x.flatten(2)
    (batch, channels, count), num_descriptors = x.shape, w_theta.shape[0]
    bn, bp, bc = (block(n, config.tile[key]) for n, key in ((num_descriptors, "N"), (count, "P"), (channels, "C")))
    tiles = triton.cdiv(num_descriptors, bn) * triton.cdiv(channels, bc)
    splits, size = split(count, bp, tiles * batch, config)
    pooled = x.new_empty(batch, num_descriptors, channels)
    partial = x.new_empty(batch, splits, num_descriptors, channels, dtype=torch.float32)
    maxima, sums = x.new_empty(2, batch, splits, num_descriptors, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _pool_kernel[(tiles, splits, batch)](
            x,
            w_theta,
            partial,
            maxima,
            sums,
            channels,
            num_descriptors,
            count,
            size,
            *x.stride(),
            *w_theta.stride(),
            BN=bn,
            BP=bp,
            BC=bc,
            WHOLE=channels <= bc,
            PRECISION="ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        merge = block(channels, 128)
        _merge_kernel[(num_descriptors, triton.cdiv(channels, merge), batch)](
            partial,
            maxima,
            sums,
            pooled,
            channels,
            num_descriptors,
            splits,
            BS=triton.next_power_of_2(splits),
            STEP=min(8, triton.next_power_of_2(splits)),
            BC=merge,
            num_warps=2,
        )
    return pooled.transpose(1, 2)
