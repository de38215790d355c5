"""label_upsample on CUDA: labels = argmax over classes of the bilinearly resized logits; (K, h, w) -> (H, W).

A first kernel takes the argmax of every source pixel. A second one takes tiles of target pixels. Where the four source
pixels around a target pixel have the same label L, that is the answer, and no logits are read: the resize is a convex
combination, so a class that is at most L at four corners is at most L between them, and a class below L, which lost no
tie at any corner, is less than L at all four and therefore less between them. (In float32 such a class may round to a
tie; this kernel then gives the exact answer.) For the other pixels it interpolates the four vectors of logits, tile by
tile of classes, and keeps a running best, so that the resized logits never exist.

Coordinates and interpolation are float32, in the reference's order. Prefixes: i_ index, o_ offsets, m_ mask,
p_ pointer, b_ loaded block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from agln_fast.kernels.label_upsample.reference import empty_labels
from agln_fast.kernels.launch import LaunchConfig, block

__all__ = ["label_upsample"]


@triton.jit
def _better(b_v, b_best, b_label, k):
    """Running argmax: values [BP, BK] of the classes from k on against the best so far; ties keep the lowest class."""
    b_top, i_top = tl.max(b_v, 1, return_indices=True)
    return tl.maximum(b_best, b_top), tl.where(b_top > b_best, k + i_top, b_label)


@triton.jit
def _coarse_kernel(logits, coarse, K, P, stride_b, stride_k, stride_p, BP: tl.constexpr, BK: tl.constexpr):
    i_p, i_b = tl.program_id(0), tl.program_id(1)
    first = i_p * BP
    o_p, o_k = tl.arange(0, BP), tl.arange(0, BK)
    m_p = first + o_p < P
    p_v = logits + i_b.to(tl.int64) * stride_b + first.to(tl.int64) * stride_p
    p_v += o_p[:, None] * stride_p + o_k[None, :] * stride_k
    b_best, b_label = tl.full([BP], float("-inf"), tl.float32), tl.zeros([BP], tl.int32)
    for k in range(0, K, BK):
        m_k = k + o_k < K
        b_v = tl.load(p_v, mask=m_p[:, None] & m_k[None, :], other=float("-inf")).to(tl.float32)  # [BP, BK]
        b_best, b_label = _better(b_v, b_best, b_label, k)
        p_v += BK * stride_k
    tl.store(coarse + i_b.to(tl.int64) * P + first + o_p, b_label, mask=m_p)


@triton.jit
def _corners(o, source, scale):
    """Source rows (or columns) before and after each target row (or column), and the weight of the latter."""
    position = scale * o.to(tl.float32)
    before = tl.minimum(position.to(tl.int32), source - 1)
    after = tl.minimum(before + 1, source - 1)
    return before, after, tl.minimum(tl.maximum(position - before.to(tl.float32), 0.0), 1.0)


@triton.jit
def _fine_kernel(
    logits,
    coarse,  # [B, h, w] int32
    labels,  # [B, H, W]
    K,
    SOURCE_H,
    SOURCE_W,
    TARGET_H,
    TARGET_W,
    scale_y,
    scale_x,
    stride_b,
    stride_k,
    stride_p,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
):
    i_tile, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles_x = tl.cdiv(TARGET_W, BW)
    o_p, o_k = tl.arange(0, BH * BW), tl.arange(0, BK)
    o_y, o_x = i_tile // tiles_x * BH + o_p // BW, i_tile % tiles_x * BW + o_p % BW
    m_p = (o_y < TARGET_H) & (o_x < TARGET_W)
    upper, lower, weight_y = _corners(o_y, SOURCE_H, scale_y)
    left, right, weight_x = _corners(o_x, SOURCE_W, scale_x)
    o_ul, o_ur = upper * SOURCE_W + left, upper * SOURCE_W + right
    o_ll, o_lr = lower * SOURCE_W + left, lower * SOURCE_W + right

    p_coarse = coarse + i_b * SOURCE_H * SOURCE_W
    b_label = tl.load(p_coarse + o_ul, mask=m_p, other=0)
    mixed = b_label != tl.load(p_coarse + o_ur, mask=m_p, other=0)
    mixed |= b_label != tl.load(p_coarse + o_ll, mask=m_p, other=0)
    mixed |= b_label != tl.load(p_coarse + o_lr, mask=m_p, other=0)
    if tl.max(mixed.to(tl.int32), 0) > 0:
        p_v = logits + i_b * stride_b + o_k[None, :] * stride_k
        p_ul, p_ur = p_v + o_ul.to(tl.int64)[:, None] * stride_p, p_v + o_ur.to(tl.int64)[:, None] * stride_p
        p_ll, p_lr = p_v + o_ll.to(tl.int64)[:, None] * stride_p, p_v + o_lr.to(tl.int64)[:, None] * stride_p
        b_best, b_mixed = tl.full([BH * BW], float("-inf"), tl.float32), tl.zeros([BH * BW], tl.int32)
        b_wx, b_wy = weight_x[:, None], weight_y[:, None]
        for k in range(0, K, BK):
            m_k = k + o_k < K
            m_v = mixed[:, None] & m_k[None, :]
            b_ul = tl.load(p_ul, mask=m_v, other=0.0).to(tl.float32)  # [BH*BW, BK]
            b_ur = tl.load(p_ur, mask=m_v, other=0.0).to(tl.float32)
            b_ll = tl.load(p_ll, mask=m_v, other=0.0).to(tl.float32)
            b_lr = tl.load(p_lr, mask=m_v, other=0.0).to(tl.float32)
            b_u = b_ul * (1 - b_wx) + b_ur * b_wx
            b_l = b_ll * (1 - b_wx) + b_lr * b_wx
            b_v = tl.where(m_k[None, :], b_u * (1 - b_wy) + b_l * b_wy, float("-inf"))
            b_best, b_mixed = _better(b_v, b_best, b_mixed, k)
            step = BK * stride_k
            p_ul, p_ur, p_ll, p_lr = p_ul + step, p_ur + step, p_ll + step, p_lr + step
        b_label = tl.where(mixed, b_mixed, b_label)
    p_labels = labels + i_b * TARGET_H * TARGET_W + o_y.to(tl.int64) * TARGET_W + o_x
    tl.store(p_labels, b_label.to(labels.dtype.element_ty), mask=m_p)


def label_upsample(logits: Tensor, size: Sequence[int], config: LaunchConfig) -> Tensor:
    """As the reference; the arguments are checked. `config` sets tiles P and K, and H and W of the target."""
    (batch, classes, *source), (height, width) = logits.shape, size
    labels = empty_labels(logits, size)
    logits = logits.flatten(2)
    count = logits.shape[2]
    coarse = torch.empty(batch, count, dtype=torch.int32, device=logits.device)
    scales = ((before - 1) / max(1, after - 1) for before, after in zip(source, size, strict=True))
    bp, bk = block(count, config.tile["P"]), block(classes, config.tile["K"])
    bh, bw = config.tile["H"], config.tile["W"]
    with torch.cuda.device_of(logits):
        _coarse_kernel[(triton.cdiv(count, bp), batch)](
            logits,
            coarse,
            classes,
            count,
            *logits.stride(),
            BP=bp,
            BK=bk,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        _fine_kernel[(triton.cdiv(height, bh) * triton.cdiv(width, bw), batch)](
            logits,
            coarse,
            labels,
            classes,
            *source,
            *size,
            *scales,
            *logits.stride(),
            BH=bh,
            BW=bw,
            BK=bk,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return labels
