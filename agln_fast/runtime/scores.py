"""Scores (K, H, W) of classes, in strips of rows that stay in the cache: resized, compared, made probabilities.

All of it is NumPy in the calling thread, for the reason that `kernels.label_upsample.cpu` gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from agln_fast.decode import Axis

__all__ = ["Scores", "lead", "resized", "softmax", "strips"]

Scores: TypeAlias = npt.NDArray[np.float32]
_STRIP_BYTES = 2**19


def strips(scores: Scores) -> Iterator[Scores]:
    """(K, H, W) -> views (K, rows, W), from top to bottom."""
    classes, height, width = scores.shape
    for rows in _rows(classes, height, width):
        yield scores[:, rows]


def resized(logits: npt.NDArray[Any], size: tuple[int, int]) -> Iterator[Scores]:
    """(K, h, w) -> strips (K, rows, W) of (K, H, W), from top to bottom: bilinear, align_corners=True."""
    classes, source_height, source_width = logits.shape
    down, across = Axis.between(source_height, size[0]), Axis.between(source_width, size[1])
    before, after = across.cell, across.after[across.cell]
    for rows in _rows(classes, *size):
        upper = down.cell[rows]
        lower = down.after[upper]
        band = logits[:, upper[0] : lower[-1] + 1].astype(np.float32, copy=False)
        left = band.take(before, 2)
        band = left + (band.take(after, 2) - left) * across.weight
        upper_rows = band.take(upper - upper[0], 1)
        yield upper_rows + (band.take(lower - upper[0], 1) - upper_rows) * down.weight[rows, None]


def lead(scores: Scores) -> Scores:
    """(K, ...) -> (...): the largest score minus the next one; 0 for a single class."""
    if len(scores) == 1:
        return np.zeros(scores.shape[1:], np.float32)
    best, second = np.maximum(scores[0], scores[1]), np.minimum(scores[0], scores[1])
    for score in scores[2:]:
        np.maximum(second, np.minimum(best, score), out=second)
        np.maximum(best, score, out=best)
    best -= second
    return cast(Scores, best)


def softmax(scores: Scores) -> Scores:
    """(K, ...) -> (K, ...), over the classes."""
    exponentials: Scores = np.exp(scores - scores.max(0))
    exponentials /= exponentials.sum(0)
    return exponentials


def _rows(classes: int, height: int, width: int) -> Iterator[slice]:
    step = max(1, _STRIP_BYTES // (4 * classes * width))
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))
