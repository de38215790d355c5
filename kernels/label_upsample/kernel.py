"""label_upsample on CUDA: labels = argmax over classes of the bilinearly resized logits; (K, h, w) -> (H, W).

Each program takes a tile of target pixels. If all source pixels around it have the same best class L, that is the
answer: the resize is a convex combination, so a class that is at most L at four corners is at most L between them, and
a class below L, which lost no tie at any corner, is less than L at all four and therefore less between them. (In
float32 such a class may round to a tie; this kernel then gives the exact answer.) Otherwise it interpolates, a few
classes at a time, as many as a load of 16 bytes holds: a thread has them all, of its pixel, and keeps the best of each
lane; lanes are compared once, at the end. The resized logits never exist.

That takes logits whose classes are next to each other, in rows that begin at multiples of 16 bytes and may be read up
to such a multiple; of others a copy is made. Coordinates and sums are float32. Prefixes: i_ index, o_ offsets, m_ mask,
p_ pointer, b_ loaded block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from agln_fast.decode import axis_scale
from agln_fast.kernels.bilinear import corners
from agln_fast.kernels.label_upsample.reference import empty_labels
from agln_fast.kernels.launch import LaunchConfig

__all__ = ["label_upsample"]

_LOAD_BYTES = 16
_MOST_AROUND = 128  # source pixels that are looked at to save a tile; where there would be more, it is not tried


@triton.jit
def _better(b_v, o_k, b_top, b_class):
    """The largest value of each lane so far, and its class: b_v [BP, lanes] are those of the classes o_k."""
    better = b_v > b_top
    return tl.where(better, b_v, b_top), tl.where(better, o_k[None, :], b_class)


@triton.jit
def _first(b_top, b_class):
    """[BP, lanes] -> [BP]: the lowest class of those with the largest value."""
    b_equal = b_top == tl.max(b_top, 1)[:, None]
    return tl.min(tl.where(b_equal, b_class, 2147483647), 1)


@triton.jit
def _around(o, first, last, source, scale, ALIGNED: tl.constexpr):
    """Source rows (or columns): the o-th of those that hold all corners of the target rows from first to last."""
    before, _, _ = corners(first, source, scale, ALIGNED)
    _, after, _ = corners(last, source, scale, ALIGNED)
    return tl.minimum(before + o, after)


@triton.jit
def _labels_around(
    p_image,
    K,
    step,
    y,
    x,
    last_y,
    last_x,
    source_h,
    source_w,
    scale_y,
    scale_x,
    BK: tl.constexpr,
    AH: tl.constexpr,
    AW: tl.constexpr,
    LANES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The lowest and the highest label of the source pixels around the target from (y, x) to (last_y, last_x)."""
    o_s, o_k = tl.arange(0, AH * AW), tl.arange(0, BK)
    row = _around(o_s // AW, y, last_y, source_h, scale_y, ALIGNED)
    column = _around(o_s % AW, x, last_x, source_w, scale_x, ALIGNED)
    p_v = p_image + (row.to(tl.int64) * source_w + column)[:, None] * step + o_k[None, :]
    b_top = tl.full([AH * AW, BK], float("-inf"), tl.float32)
    b_class = tl.zeros([AH * AW, BK], tl.int32)
    readable = tl.cdiv(K, LANES) * LANES
    for k in range(0, K, BK):
        b_v = tl.load(p_v + k, mask=(k + o_k < readable)[None, :], other=0.0).to(tl.float32)
        b_v = tl.where((k + o_k < K)[None, :], b_v, float("-inf"))
        b_top, b_class = _better(b_v, k + o_k, b_top, b_class)
    b_label = _first(b_top, b_class)
    return tl.min(b_label, 0), tl.max(b_label, 0)


@triton.jit
def _interpolated(p_ul, p_ur, p_ll, p_lr, w_ul, w_ur, w_ll, w_lr):
    b_upper = tl.load(p_ul).to(tl.float32) * w_ul + tl.load(p_ur).to(tl.float32) * w_ur
    return b_upper + (tl.load(p_ll).to(tl.float32) * w_ll + tl.load(p_lr).to(tl.float32) * w_lr)


@triton.jit
def _labels_between(
    p_image,
    K,
    step,
    o_y,
    o_x,
    source_h,
    source_w,
    scale_y,
    scale_x,
    LANES: tl.constexpr,
    REST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """The best class of each target pixel (o_y, o_x) [BP], interpolated."""
    upper, lower, weight_y = corners(o_y, source_h, scale_y, ALIGNED)
    left, right, weight_x = corners(o_x, source_w, scale_x, ALIGNED)
    w_ul, w_ur = ((1 - weight_y) * (1 - weight_x))[:, None], ((1 - weight_y) * weight_x)[:, None]
    w_ll, w_lr = (weight_y * (1 - weight_x))[:, None], (weight_y * weight_x)[:, None]
    o_upper, o_lower = upper.to(tl.int64) * source_w, lower.to(tl.int64) * source_w
    o_k = tl.arange(0, LANES)
    p_v = p_image + o_k[None, :]
    p_ul, p_ur = p_v + (o_upper + left)[:, None] * step, p_v + (o_upper + right)[:, None] * step
    p_ll, p_lr = p_v + (o_lower + left)[:, None] * step, p_v + (o_lower + right)[:, None] * step
    b_top = tl.full([o_y.shape[0], LANES], float("-inf"), tl.float32)
    b_class = tl.zeros([o_y.shape[0], LANES], tl.int32)
    whole = K // LANES * LANES
    for k in range(0, whole, LANES):
        b_v = _interpolated(p_ul + k, p_ur + k, p_ll + k, p_lr + k, w_ul, w_ur, w_ll, w_lr)
        b_top, b_class = _better(b_v, k + o_k, b_top, b_class)
    if REST:
        b_v = _interpolated(p_ul + whole, p_ur + whole, p_ll + whole, p_lr + whole, w_ul, w_ur, w_ll, w_lr)
        b_v = tl.where((whole + o_k < K)[None, :], b_v, float("-inf"))
        b_top, b_class = _better(b_v, whole + o_k, b_top, b_class)
    return _first(b_top, b_class)


@triton.jit
def _label_kernel(
    logits,  # [B, h, w] rows of K
    labels,  # [B, H, W]
    K,
    steps,  # from a row to the next, in LANES
    stride_b,  # in LANES
    SOURCE_H,
    SOURCE_W,
    TARGET_H,
    TARGET_W,
    scale_y,
    scale_x,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BK: tl.constexpr,
    AROUND_H: tl.constexpr,  # source pixels around a tile, at most; 0 for too many
    AROUND_W: tl.constexpr,
    LANES: tl.constexpr,
    REST: tl.constexpr,  # whether K is no multiple of LANES
    ALIGNED: tl.constexpr,  # whether the corners are
):
    i_tile, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles_x = tl.cdiv(TARGET_W, BW)
    y, x = i_tile // tiles_x * BH, i_tile % tiles_x * BW
    last_y, last_x = tl.minimum(y + BH, TARGET_H) - 1, tl.minimum(x + BW, TARGET_W) - 1
    o_p = tl.arange(0, BH * BW)
    o_y, o_x = y + o_p // BW, x + o_p % BW
    m_p = (o_y <= last_y) & (o_x <= last_x)
    p_labels = labels + i_b * TARGET_H * TARGET_W + o_y.to(tl.int64) * TARGET_W + o_x
    p_image, step = logits + i_b * stride_b * LANES, steps * LANES

    lowest, highest = 0, 1
    if AROUND_H > 0:
        lowest, highest = _labels_around(
            p_image,
            K,
            step,
            y,
            x,
            last_y,
            last_x,
            SOURCE_H,
            SOURCE_W,
            scale_y,
            scale_x,
            BK,
            AROUND_H,
            AROUND_W,
            LANES,
            ALIGNED,
        )
    if lowest == highest:
        tl.store(p_labels, tl.full([BH * BW], lowest, tl.int32).to(labels.dtype.element_ty), mask=m_p)
    else:
        b_label = _labels_between(
            p_image, K, step, o_y, o_x, SOURCE_H, SOURCE_W, scale_y, scale_x, LANES, REST, ALIGNED
        )
        tl.store(p_labels, b_label.to(labels.dtype.element_ty), mask=m_p)


def label_upsample(logits: Tensor, size: Sequence[int], config: LaunchConfig, *, align_corners: bool = True) -> Tensor:
    """As the reference; the arguments are checked. `config` sets tiles H and W of the target, and K."""
    (batch, classes, *source), (height, width) = logits.shape, size
    labels = empty_labels(logits, size)
    lanes = _LOAD_BYTES // logits.element_size()
    rows = _in_rows(logits, lanes)
    scales = [axis_scale(*sides, align_corners) for sides in zip(source, size, strict=True)]
    bh, bw = config.tile["H"], config.tile["W"]
    around = [_side(block, scale) for block, scale in zip((bh, bw), scales, strict=True)]
    if around[0] * around[1] > _MOST_AROUND:
        around = [0, 0]
    with torch.cuda.device_of(logits):
        _label_kernel[(triton.cdiv(height, bh) * triton.cdiv(width, bw), batch)](
            rows,
            labels,
            classes,
            rows.stride(2) // lanes,
            rows.stride(0) // lanes,
            *source,
            *size,
            *scales,
            BH=bh,
            BW=bw,
            BK=config.tile["K"],
            AROUND_H=around[0],
            AROUND_W=around[1],
            LANES=lanes,
            REST=classes % lanes > 0,
            ALIGNED=align_corners,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return labels


def _in_rows(logits: Tensor, lanes: int) -> Tensor:
    """(B, K, h, w) -> (B, h, w, K), each row of which may be read up to a multiple of `lanes`, and begins at one."""
    rows = logits.permute(0, 2, 3, 1)
    batch, height, width, classes = rows.shape
    padded = -(-classes // lanes) * lanes
    *apart, step, adjacent = rows.stride()
    room = rows.untyped_storage().nbytes() // rows.element_size() - rows.storage_offset()
    last = sum((size - 1) * stride for size, stride in zip(rows.shape[:3], rows.stride(), strict=False))
    if (
        adjacent == 1
        and apart[1] == width * step
        and step >= padded
        and step % lanes == apart[0] % lanes == rows.data_ptr() % _LOAD_BYTES == 0
        and last + padded <= room
    ):
        return rows
    copy = rows.new_empty(batch, height, width, padded)[..., :classes]
    return copy.copy_(rows)


def _side(block: int, scale: float) -> int:
    """Source rows around `block` target rows at most, rounded up to a power of two; one more for what is rounded."""
    return 1 << (int((block - 1) * scale) + 2).bit_length()
