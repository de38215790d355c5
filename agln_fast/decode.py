"""Logits become labels: argmax, resize and type, in NumPy, in the thread that calls it alone.

`upsample_labels` is label_upsample for CPUs: labels = argmax_K(resize(logits)).

Target pixels lie in cells between four source pixels. Where those have the same label L, that is the answer, and no
logits are read: the resize is a convex combination, so a class that is at most L at four corners is at most L between
them, and a class below L, which lost no tie at any corner, is less than L at all four and therefore less between them.
Only the other cells, which are few in label maps of pictures, are interpolated. In float32 such a class may round to a
tie; this gives the exact answer then.

Engines have pools of threads of their own, which wait for work by spinning; a second pool would fight with them for
cores, and does not survive a fork.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

__all__ = ["Axis", "axis_scale", "best_classes", "decode", "labels_dtype", "upsample_labels"]

_STRIP_BYTES = 2**19  # fastest of 64 KiB to 1 MiB: scores stay in the cache of a core, calls are few
_CELLS = 16  # the least that are taken at once: loops run over cells


def axis_scale(source: int, target: int, align_corners: bool = True) -> float:
    """Source positions from one target position to the next along an axis."""
    return (source - 1) / max(1, target - 1) if align_corners else source / target


class Axis(NamedTuple):
    """Where T target positions lie along a source axis of S positions, rounded as in PyTorch.

    With aligned corners target t lies at scale · t; without, at scale · (t + ½) - ½, which may be up to half a position
    before the first one or behind the last one: there it has the value of that.

    There are C = max(1, S - 1) cells, each between a source position and the one after it.
    """

    cell: npt.NDArray[np.intp]
    """[T] the cell that it lies in, which is the source position before it."""
    weight: npt.NDArray[np.float32]
    """[T] from 0, at the position before it, to 1, at the one after it."""
    after: npt.NDArray[np.intp]
    """[C] the source position at the end of each cell."""
    first: npt.NDArray[np.intp]
    """[C] the first target position in each cell."""
    held: npt.NDArray[np.intp]
    """[C] how many are in it."""

    @classmethod
    def between(cls, source: int, target: int, align_corners: bool = True) -> Self:
        scale, shift = np.float32(axis_scale(source, target, align_corners)), np.float32(0 if align_corners else 0.5)
        position = scale * (np.arange(target, dtype=np.float32) + shift) - shift
        cell = np.minimum(position.astype(np.intp), max(0, source - 2))
        cells = np.arange(max(1, source - 1))
        count = np.bincount(cell, minlength=len(cells))
        after = np.minimum(cells + 1, source - 1)
        return cls(cell, np.clip(position - cell, 0, 1).astype(np.float32), after, np.cumsum(count) - count, count)

    def by_count(self) -> list[tuple[int, npt.NDArray[np.intp]]]:
        """(count, the cells that hold so many target positions), without those that hold none."""
        return [(int(count), np.flatnonzero(self.held == count)) for count in np.unique(self.held) if count]


def labels_dtype(num_classes: int) -> str:
    """Of labels, whoever makes them, by name."""
    return "uint8" if num_classes <= 256 else "int32"


def decode(output: npt.NDArray[Any], size: tuple[int, int], *, align_corners: bool = True) -> npt.NDArray[Any]:
    """What an engine gives for one image, logits (K, h, w) or labels (h, w) -> labels (H, W), resampled once.

    Logits are resized, as the network resizes them, then compared; labels are those of the nearest pixels.
    C-contiguous.
    """
    if output.ndim == 3:
        return upsample_labels(output, size, align_corners=align_corners)
    if output.shape == size:
        return np.ascontiguousarray(output)
    nearest = [((np.arange(n) + 0.5) * m / n).astype(np.intp) for n, m in zip(size, output.shape, strict=True)]
    return output[np.ix_(*nearest)]


def best_classes(scores: npt.NDArray[np.floating[Any]]) -> npt.NDArray[Any]:
    """(K, ...) -> (...): the class of the largest score, of `labels_dtype`; the lowest one if there are several.

    An argmax. NumPy's own takes ten times as long over a first axis.
    """
    classes = len(scores)
    # The code of a class is the larger the lower it is, so that the largest code is the lowest class of the best.
    codes = np.arange(classes - 1, -1, -1, dtype=labels_dtype(classes)).reshape(-1, *[1] * (scores.ndim - 1))
    best = np.equal(scores, scores.max(0)).view(np.uint8) * codes
    labels: npt.NDArray[Any] = np.subtract(codes[0], best.max(0), dtype=codes.dtype)
    return labels


@np.errstate(invalid="ignore", over="ignore")
def upsample_labels(logits: npt.NDArray[Any], size: tuple[int, int], *, align_corners: bool = True) -> npt.NDArray[Any]:
    """`label_upsample` of one image, from array to array.

    Args:
        logits: (K, h, w) of any floating-point type, finite. What is not finite gives some label, and no error.
        size: (H, W) of the result, pixels; smaller than (h, w) is allowed.
        align_corners: whether the centres of the outermost pixels meet, or their outer edges.

    Returns:
        (H, W) class ids, C-contiguous, of `labels_dtype`.
    """
    classes, height, width = logits.shape
    flat = np.ascontiguousarray(logits, np.float32).reshape(classes, height * width)
    rows, columns = Axis.between(height, size[0], align_corners), Axis.between(width, size[1], align_corners)
    if size[0] * size[1] < height * width:  # many source pixels lie around no target pixel
        labels = np.empty(size, labels_dtype(classes))
        mixed = np.ones((len(rows.after), len(columns.after)), np.bool_)
    else:
        coarse = _in_strips(flat).reshape(height, width)
        if size == (height, width):
            return coarse
        labels = coarse.take(columns.cell, 1).take(rows.cell, 0)
        mixed = _mixed(coarse, rows, columns)
    for (down, ys), (across, xs) in product(rows.by_count(), columns.by_count()):
        y, x = np.nonzero(mixed[np.ix_(ys, xs)])
        step = max(_CELLS, _STRIP_BYTES // (4 * classes * across))
        for start in range(0, len(y), step):
            o = slice(start, start + step)
            _interpolate(labels, flat, width, rows, columns, ys[y[o]], xs[x[o]], down, across)
    return labels


def _in_strips(flat: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """`best_classes` of (K, P) -> (P)."""
    classes, count = flat.shape
    step = max(1, _STRIP_BYTES // (4 * classes))
    return np.concatenate([best_classes(flat[:, start : start + step]) for start in range(0, count, step)])


def _mixed(coarse: npt.NDArray[Any], rows: Axis, columns: Axis) -> npt.NDArray[np.bool_]:
    """Labels (h, w) of source pixels -> (cells down, cells across): whether the four around a cell differ."""
    upper, lower = coarse[: len(rows.after)], coarse[rows.after]
    left = upper[:, : len(columns.after)]
    mixed: npt.NDArray[np.bool_] = left != upper[:, columns.after]
    mixed |= left != lower[:, : len(columns.after)]
    mixed |= left != lower[:, columns.after]
    return mixed


def _interpolate(
    labels: npt.NDArray[Any],
    flat: npt.NDArray[np.float32],
    width: int,
    rows: Axis,
    columns: Axis,
    y: npt.NDArray[np.intp],
    x: npt.NDArray[np.intp],
    down: int,
    across: int,
) -> None:
    """Write the `labels` of the target pixels in N cells (y, x), each of `down` rows and `across` columns.

    `flat` is the logits (K, h * w), `width` w.
    """
    upper, lower, right = y * width, rows.after[y] * width, columns.after[x]
    at_left, at_right = flat.take(upper + x, 1), flat.take(upper + right, 1)  # [K, N]
    left_slope, right_slope = flat.take(lower + x, 1) - at_left, flat.take(lower + right, 1) - at_right
    target_x = columns.first[x] + np.arange(across)[:, None]  # [X, N]
    weight_x = columns.weight[target_x]
    for row in range(down):
        target_y = rows.first[y] + row  # [N]
        weight_y = rows.weight[target_y]
        start = at_left + left_slope * weight_y  # [K, N]
        slope = at_right + right_slope * weight_y - start
        scores = slope[:, None] * weight_x  # [K, X, N]
        scores += start[:, None]
        labels[target_y, target_x] = best_classes(scores)
