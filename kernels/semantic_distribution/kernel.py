"""semantic_distribution on CUDA: M[b] = D · softmax over descriptors of (Wϕ A + bϕ), and A + αM; (C, P) -> (C, P).

Attention with the pixels as queries: a program takes a tile of pixels, keeps it, goes through the descriptors tile by
tile with a running maximum and a running sum (online softmax: Milakov and Gimelshein, arXiv:1805.02867), all in
float32, and stores both results. A is read once where all C channels fit one tile; no N×P tensor exists. Where
they do not, or float32 would take too much shared memory, A is read in chunks for the energies, and again for the sum.

Prefixes: i_ index, o_ offsets, m_ mask, p_ pointer, b_ loaded block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agln_fast.kernels.launch import LaunchConfig, block, pixel_block
from agln_fast.kernels.layout import empty_maps

__all__ = ["semantic_distribution"]


@triton.jit
def _distribute_kernel(
    a,
    w_phi,
    b_phi,
    d,
    m,
    enhanced,
    alpha,
    C,
    N,
    P,
    stride_ab,
    stride_ac,
    stride_ap,
    stride_wn,
    stride_wc,
    stride_db,
    stride_dc,
    stride_dn,
    stride_mb,
    stride_mc,
    stride_mp,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BK: tl.constexpr,  # channels that one product of the energies sums over
    WHOLE: tl.constexpr,  # all C channels fit both: A is read once
    PRECISION: tl.constexpr,
):
    i_p, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = i_p.to(tl.int64) * BP
    o_p, o_n, o_k = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, BK)
    o_c = i_c * BC + tl.arange(0, BC)
    m_p, m_c = first + o_p < P, o_c < C
    p_a = a + i_b * stride_ab + first * stride_ap + o_p[:, None] * stride_ap
    b_a = tl.load(p_a + o_c[None, :].to(tl.int64) * stride_ac, mask=m_p[:, None] & m_c[None, :], other=0.0)  # [BP, BC]

    b_max = tl.full([BP], float("-inf"), tl.float32)
    b_sum = tl.zeros([BP], tl.float32)
    b_acc = tl.zeros([BP, BC], tl.float32)
    for n in range(0, N, BN):
        m_n = n + o_n < N
        p_w = w_phi + (n + o_n)[None, :] * stride_wn
        if WHOLE:
            b_w = tl.load(p_w + o_c[:, None] * stride_wc, mask=m_c[:, None] & m_n[None, :], other=0.0)  # [BC, BN]
            b_s = tl.dot(b_a, b_w, input_precision=PRECISION)  # [BP, BN]
        else:
            b_s = tl.zeros([BP, BN], tl.float32)
            for k in range(0, C, BK):
                m_k = k + o_k < C
                b_ak = tl.load(
                    p_a + (k + o_k)[None, :].to(tl.int64) * stride_ac, mask=m_p[:, None] & m_k[None, :], other=0.0
                )
                b_wk = tl.load(p_w + (k + o_k)[:, None] * stride_wc, mask=m_k[:, None] & m_n[None, :], other=0.0)
                b_s = tl.dot(b_ak, b_wk, b_s, input_precision=PRECISION)
        b_s += tl.load(b_phi + n + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_next = tl.maximum(b_max, tl.max(b_s, 1))
        b_e = tl.exp(b_s - b_next[:, None])
        b_scale = tl.exp(b_max - b_next)
        b_sum = b_sum * b_scale + tl.sum(b_e, 1)
        p_d = d + i_b * stride_db + (n + o_n)[:, None] * stride_dn + o_c[None, :] * stride_dc
        b_d = tl.load(p_d, mask=m_n[:, None] & m_c[None, :], other=0.0)  # [BN, BC]
        b_acc = tl.dot(b_e.to(b_d.dtype), b_d, b_acc * b_scale[:, None], input_precision=PRECISION)
        b_max = b_next
    b_m = b_acc / b_sum[:, None]
    o_m = i_b * stride_mb + first * stride_mp + o_p[:, None] * stride_mp + o_c[None, :].to(tl.int64) * stride_mc
    m_m = m_p[:, None] & m_c[None, :]
    tl.store(m + o_m, b_m.to(m.dtype.element_ty), mask=m_m)
    tl.store(enhanced + o_m, (b_a.to(tl.float32) + alpha * b_m).to(m.dtype.element_ty), mask=m_m)


def semantic_distribution(
    a: Tensor, w_phi: Tensor, b_phi: Tensor, d: Tensor, alpha: float, config: LaunchConfig
) -> tuple[Tensor, Tensor]:
    """As the reference; the arguments are checked. `config` sets tiles P, N and C, and K, of C in the energies."""
    m, enhanced = empty_maps(a), empty_maps(a)
    a = a.flatten(2)
    (batch, channels, count), num_descriptors = a.shape, w_phi.shape[0]
    sizes = {"N": num_descriptors, "C": channels, "K": channels}
    bn, bc, bk = (block(size, config.tile[key]) for key, size in sizes.items())
    bp = pixel_block(count, batch * triton.cdiv(channels, bc), config)
    with torch.cuda.device_of(a):
        _distribute_kernel[(triton.cdiv(count, bp), triton.cdiv(channels, bc), batch)](
            a,
            w_phi,
            b_phi.contiguous(),
            d,
            m,
            enhanced,
            alpha,
            channels,
            num_descriptors,
            count,
            *a.stride(),
            *w_phi.stride(),
            *d.stride(),
            *m.flatten(2).stride(),
            BP=bp,
            BN=bn,
            BC=bc,
            BK=bk,
            WHOLE=channels <= min(bc, bk),
            PRECISION="ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return m, enhanced
