"""attention_pool on CUDA: D[b] = Wφ (X · softmax over pixels of (Wθ X), transposed) + bφ; (C, P) -> (M, N).

One pass over X. The pixels are split among programs so that one image fills the GPU; each program keeps a running
maximum, a running sum and an accumulator (online softmax: Milakov and Gimelshein, arXiv:1805.02867), all in float32,
and writes them out. A second kernel merges the splits in a fixed order, so that results are equal from run to run, and
multiplies what it has merged by Wφ. A program of it reads all splits of some descriptors, for some of the outputs: the
fewer outputs, the more often the splits are read, and the fewer descriptors, the more often Wφ is.

Prefixes: i_ index, o_ offsets, m_ mask, p_ pointer, b_ loaded block.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from agln_fast.kernels.launch import LaunchConfig, block, split

__all__ = ["attention_pool"]

_WARPS = 8  # of the projection
_LOADED = 32  # rows of sums that it loads together


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
def _project_kernel(
    partial,
    maxima,
    sums,
    w_phi,
    b_phi,
    descriptors,  # [B, M, N]
    C,
    M,
    N,
    SPLITS,
    stride_wm,
    stride_wc,
    ROWS: tl.constexpr,  # descriptors
    BM: tl.constexpr,
    BC: tl.constexpr,
    BS: tl.constexpr,  # all splits
    STEP: tl.constexpr,  # splits that are loaded together
    AHEAD: tl.constexpr,  # all C channels fit one tile, and Wφ is loaded before anything is waited for
    PRECISION: tl.constexpr,
):
    i_n, i_m, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n, o_m = i_n * ROWS + tl.arange(0, ROWS), i_m * BM + tl.arange(0, BM)
    o_s, o_t, o_c = tl.arange(0, BS), tl.arange(0, STEP), tl.arange(0, BC)
    m_n, m_m, m_s = o_n < N, o_m < M, o_s < SPLITS
    row = i_b * SPLITS * N + tl.minimum(o_n, N - 1)  # beyond the last descriptor it is that one again, and not stored
    o_sn = row[None, :] + o_s[:, None] * N
    b_max = tl.load(maxima + o_sn, mask=m_s[:, None], other=float("-inf"))  # [BS, ROWS]
    b_sum = tl.load(sums + o_sn, mask=m_s[:, None], other=0.0)
    p_w = w_phi + o_m[:, None] * stride_wm
    if AHEAD:
        b_w = tl.load(p_w + o_c[None, :] * stride_wc, mask=m_m[:, None] & (o_c < C)[None, :], other=0.0)  # [BM, BC]
    top = tl.max(b_max, 0)
    total = tl.sum(tl.exp(b_max - top[None, :]) * b_sum, 0)
    b_acc = tl.zeros([BM, ROWS], tl.float32)
    for c in range(0, C, BC):
        m_c = c + o_c < C
        if not AHEAD:
            b_w = tl.load(p_w + (c + o_c)[None, :] * stride_wc, mask=m_m[:, None] & m_c[None, :], other=0.0)
        b_x = tl.zeros([STEP, ROWS, BC], tl.float32)
        for s in range(0, SPLITS, STEP):
            m_t = s + o_t < SPLITS
            o_tn = row[None, :] + (s + o_t)[:, None] * N
            b_share = tl.exp(tl.load(maxima + o_tn, mask=m_t[:, None], other=float("-inf")) - top[None, :])
            p_x = partial + o_tn[:, :, None] * C + (c + o_c)[None, None, :]
            b_x += tl.load(p_x, mask=m_t[:, None, None] & m_c[None, None, :], other=0.0) * b_share[:, :, None]
        b_pooled = tl.sum(b_x, 0) / total[:, None]  # [ROWS, BC]
        b_acc = tl.dot(b_w, tl.trans(b_pooled.to(b_w.dtype)), b_acc, input_precision=PRECISION)
    b_acc += tl.load(b_phi + o_m, mask=m_m, other=0.0).to(tl.float32)[:, None]
    p_d = descriptors + (i_b * M + o_m[:, None]) * N + o_n[None, :]
    tl.store(p_d, b_acc.to(descriptors.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@lru_cache
def _projection_tile(
    splits: int, num_descriptors: int, outputs: int, batch: int, size: int, most: int, processors: int
) -> tuple[int, int]:
    """Descriptors and outputs of a program, at most 16 and `most`, such that the least bytes go through a
    multiprocessor: the sums of all splits, of 4 bytes, and weights of `size` bytes.

    Where no tensor cores multiply, a thread has an output at least: it would hold more of the operands than fit.
    """
    least = 1 if size == 2 else 32 * _WARPS

    def traffic(tile: tuple[int, int]) -> int:
        rows, bm = tile
        programs = batch * triton.cdiv(num_descriptors, rows) * triton.cdiv(outputs, bm)
        waves: int = triton.cdiv(programs, processors)
        return waves * (rows * splits * 4 + bm * size)

    tiles = ((rows, bm) for rows in (1, 2, 4, 8, 16) for bm in (16, 32, 64, 128) if bm <= block(outputs, most))
    return min((tile for tile in tiles if tile[0] * tile[1] >= least), key=traffic)


def attention_pool(x: Tensor, w_theta: Tensor, w_phi: Tensor, b_phi: Tensor, config: LaunchConfig) -> Tensor:
    """As the reference; the arguments are checked. `config` sets tiles N, P, C and M, and into how many splits P
    falls."""
    x = x.flatten(2)
    (batch, channels, count), num_descriptors, outputs = x.shape, len(w_theta), len(w_phi)
    bn, bp, bc = (block(n, config.tile[key]) for n, key in ((num_descriptors, "N"), (count, "P"), (channels, "C")))
    tiles = triton.cdiv(num_descriptors, bn) * triton.cdiv(channels, bc)
    splits, size = split(count, bp, tiles * batch, config)
    descriptors = x.new_empty(batch, outputs, num_descriptors)
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
        rows, bm = _projection_tile(
            splits, num_descriptors, outputs, batch, w_phi.element_size(), config.tile["M"], config.processors
        )
        _project_kernel[(triton.cdiv(num_descriptors, rows), triton.cdiv(outputs, bm), batch)](
            partial,
            maxima,
            sums,
            w_phi,
            b_phi.contiguous(),
            descriptors,
            channels,
            outputs,
            num_descriptors,
            splits,
            *w_phi.stride(),
            ROWS=rows,
            BM=bm,
            BC=bc,
            BS=triton.next_power_of_2(splits),
            STEP=min(triton.next_power_of_2(splits), _LOADED // rows),
            AHEAD=channels <= bc and x.dtype != torch.float32,  # whose products would keep it in registers
            PRECISION="ieee",
            num_warps=_WARPS,
            num_stages=1,
        )
    return descriptors
