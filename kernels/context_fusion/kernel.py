"""context_fusion on CUDA: out[b] = A + αM + gate_scale · (R B) ⊙ σ(M) + skip_scale · B, (C, P) each, where
M[b] = D · softmax over descriptors of (Wϕ A + bϕ).

A program takes a tile of pixels. It computes their softmax once and keeps it, P×N, and keeps B, P×C. Then it goes
through the channels of the result slice by slice: M and R B of a slice stay in registers until the slice is stored, so
that neither M nor A + αM is ever in memory.

A slice takes its columns of Dᵀ and Rᵀ, which all programs read from the L2, a stage or two ahead of the products. R as
a whole would fill 128 KiB of shared memory in half precision (C = 256), and M and R B of all channels would fill the
registers. Slices of 32 channels take 20 KiB a stage (N = 64), and B 32 KiB for 64 pixels: on sm90 two blocks fit a
multiprocessor, and one multiplies while the other waits. A and B of a slice are read again, from the L2 and a slice
ahead: Triton cannot take a part of a tile that it holds.

With more descriptors than fit a tile, every slice computes the softmax again, tile by tile with a running maximum and
sum, as `semantic_distribution` does. With more channels, or in float32, which loses digits in long chains of additions,
B is read in chunks along with R.

Prefixes: i_ index, o_ offsets, m_ mask, p_ pointer, b_ loaded block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from agln_fast.kernels.launch import LaunchConfig, block, pixel_block
from agln_fast.kernels.layout import empty_maps

__all__ = ["context_fusion"]


@triton.jit
def _slice(p_x, m_p, o_c, C, stride_xc):
    """Channels `o_c` of a map, [BP, BC]."""
    return tl.load(p_x + o_c[None, :].to(tl.int64) * stride_xc, mask=m_p[:, None] & (o_c < C)[None, :], other=0.0)


@triton.jit
def _energies(
    p_a,  # [BP, 1]
    m_p,
    w_phi,
    b_phi,
    n,
    C,
    N,
    stride_ac,
    stride_wn,
    stride_wc,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Wϕ A + bϕ of the descriptors from `n` on, [BP, BN]; -inf where there is none."""
    o_k, o_n = tl.arange(0, BK), n + tl.arange(0, BN)
    m_n = o_n < N
    b_s = tl.zeros([p_a.shape[0], BN], tl.float32)
    for k in range(0, C, BK):
        m_k = k + o_k < C
        b_a = _slice(p_a, m_p, k + o_k, C, stride_ac)  # [BP, BK]
        p_w = w_phi + o_n[None, :] * stride_wn + (k + o_k)[:, None] * stride_wc
        b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)  # [BK, BN]
        b_s = tl.dot(b_a, b_w, b_s, input_precision=PRECISION)
    b_s += tl.load(b_phi + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    return tl.where(m_n[None, :], b_s, float("-inf"))


@triton.jit
def _fusion_kernel(
    a,
    w_phi,
    b_phi,
    d,
    r,
    b,
    out,
    alpha,
    gate_scale,
    skip_scale,
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
    stride_rb,
    stride_ri,
    stride_rj,
    stride_bb,
    stride_bc,
    stride_bp,
    stride_ob,
    stride_oc,
    stride_op,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,  # channels of a slice
    BJ: tl.constexpr,  # channels that one product with R sums over
    BK: tl.constexpr,  # channels that one product of the energies sums over
    KEEP_S: tl.constexpr,  # all N descriptors fit BN: the softmax is computed once
    KEEP_B: tl.constexpr,  # all C channels fit BJ: B is loaded once for all products
    HAS_R: tl.constexpr,
    GATES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    i_p, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_p, o_n, o_c, o_j = tl.arange(0, BP), tl.arange(0, BN), tl.arange(0, BC), tl.arange(0, BJ)
    first = i_p.to(tl.int64) * BP
    m_p, m_n, m_j = first + o_p < P, o_n < N, o_j < C
    p_a = a + i_b * stride_ab + (first + o_p)[:, None] * stride_ap
    p_b = b + i_b * stride_bb + (first + o_p)[:, None] * stride_bp
    p_o = out + i_b * stride_ob + (first + o_p)[:, None] * stride_op
    d += i_b * stride_db
    r += i_b * stride_rb
    if HAS_R and KEEP_B:
        b_bj = _slice(p_b, m_p, o_j, C, stride_bc)  # [BP, BJ]
    if KEEP_S:
        b_s = _energies(p_a, m_p, w_phi, b_phi, 0, C, N, stride_ac, stride_wn, stride_wc, BN, BK, PRECISION)
        b_e = tl.exp(b_s - tl.max(b_s, 1)[:, None])  # [BP, BN]
        b_sum = tl.sum(b_e, 1)
        b_kept = b_e.to(d.dtype.element_ty)
    b_a_next = _slice(p_a, m_p, o_c, C, stride_ac)
    b_b_next = _slice(p_b, m_p, o_c, C, stride_bc)
    for c in range(0, C, BC):
        b_ac, b_bc = b_a_next, b_b_next
        b_a_next = _slice(p_a, m_p, c + BC + o_c, C, stride_ac)
        b_b_next = _slice(p_b, m_p, c + BC + o_c, C, stride_bc)
        m_c = c + o_c < C
        p_d = d + (c + o_c)[None, :] * stride_dc
        if KEEP_S:
            b_d = tl.load(p_d + o_n[:, None] * stride_dn, mask=m_n[:, None] & m_c[None, :], other=0.0)  # [BN, BC]
            b_m = tl.dot(b_kept, b_d, input_precision=PRECISION)
        else:
            b_max = tl.full([BP], float("-inf"), tl.float32)
            b_sum = tl.zeros([BP], tl.float32)
            b_m = tl.zeros([BP, BC], tl.float32)
            for n in range(0, N, BN):
                b_s = _energies(p_a, m_p, w_phi, b_phi, n, C, N, stride_ac, stride_wn, stride_wc, BN, BK, PRECISION)
                b_next = tl.maximum(b_max, tl.max(b_s, 1))
                b_e = tl.exp(b_s - b_next[:, None])
                b_scale = tl.exp(b_max - b_next)
                b_sum = b_sum * b_scale + tl.sum(b_e, 1)
                m_d = (n + o_n < N)[:, None] & m_c[None, :]
                b_d = tl.load(p_d + (n + o_n)[:, None] * stride_dn, mask=m_d, other=0.0)  # [BN, BC]
                b_m = tl.dot(b_e.to(b_d.dtype), b_d, b_m * b_scale[:, None], input_precision=PRECISION)
                b_max = b_next
        b_m /= b_sum[:, None]
        if not HAS_R:
            b_g = b_bc.to(tl.float32)
        elif KEEP_B:
            p_r = r + (c + o_c)[None, :] * stride_ri + o_j[:, None] * stride_rj
            b_r = tl.load(p_r, mask=m_j[:, None] & m_c[None, :], other=0.0)  # [BJ, BC]
            b_g = tl.dot(b_bj, b_r, input_precision=PRECISION)
        else:
            b_g = tl.zeros([BP, BC], tl.float32)
            for j in range(0, C, BJ):
                m_r = (j + o_j < C)[:, None] & m_c[None, :]
                b_bj = _slice(p_b, m_p, j + o_j, C, stride_bc)  # [BP, BJ]
                p_r = r + (c + o_c)[None, :] * stride_ri + (j + o_j)[:, None] * stride_rj
                b_r = tl.load(p_r, mask=m_r, other=0.0)  # [BJ, BC]
                b_g = tl.dot(b_bj, b_r, b_g, input_precision=PRECISION)
        if GATES:
            b_g /= 1 + tl.exp(-b_m)
        b_o = b_ac.to(tl.float32) + (alpha * b_m + gate_scale * b_g) + skip_scale * b_bc.to(tl.float32)
        p_oc = p_o + (c + o_c)[None, :].to(tl.int64) * stride_oc
        tl.store(p_oc, b_o.to(out.dtype.element_ty), mask=m_p[:, None] & m_c[None, :])


def context_fusion(
    a: Tensor,
    w_phi: Tensor,
    b_phi: Tensor,
    d: Tensor,
    r: Tensor | None,
    b: Tensor,
    alpha: float,
    gate_scale: float,
    skip_scale: float,
    config: LaunchConfig,
    *,
    gates: bool = True,
) -> Tensor:
    """As the reference; the arguments are checked. `config` sets tiles P, N and C, and J and K, of C in the sums."""
    out = empty_maps(a)
    has_r = r is not None
    a, b, o = a.flatten(2), b.flatten(2), out.flatten(2)
    r = b if r is None else r.to(b.dtype)
    (batch, channels, count), num_descriptors = a.shape, w_phi.shape[0]
    sizes = {"N": num_descriptors, "C": channels, "J": channels, "K": channels}
    bn, bc, bj, bk = (block(size, config.tile[key]) for key, size in sizes.items())
    bp = pixel_block(count, batch, config)
    with torch.cuda.device_of(a):
        _fusion_kernel[(triton.cdiv(count, bp), batch)](
            a,
            w_phi,
            b_phi.contiguous(),
            d,
            r,
            b,
            o,
            alpha,
            gate_scale,
            skip_scale,
            channels,
            num_descriptors,
            count,
            *a.stride(),
            *w_phi.stride(),
            *d.stride(),
            *r.stride(),
            *b.stride(),
            *o.stride(),
            BP=bp,
            BN=bn,
            BC=bc,
            BJ=bj,
            BK=bk,
            KEEP_S=num_descriptors <= bn,
            KEEP_B=channels <= bj,
            HAS_R=has_r,
            GATES=gates,
            PRECISION="ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return out
