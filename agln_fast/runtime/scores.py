"""Scores (K, H, W) of classes, in strips of rows that stay in the cache: resized, compared, made probabilities.

They are NumPy's arrays, computed with in the calling thread for the reason that `agln_fast.decode` gives; or PyTorch's,
on the GPU where an engine left them, so that of many windows and scales only labels are copied to the host.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from agln_fast.decode import Axis, best_classes, labels_dtype

__all__ = [
    "Scores",
    "classes_of",
    "joined",
    "lead",
    "mirrored",
    "on_host",
    "placed",
    "resized",
    "softmax",
    "strips",
    "zeros",
]

Scores: TypeAlias = Any
"""float32, of NumPy or PyTorch. The functions here are the ones that work on both."""

_STRIP_BYTES = 2**19
_DEVICE_STRIP_BYTES = 2**28  # a GPU has no such cache, and each call costs microseconds


def strips(scores: Scores) -> Iterator[Scores]:
    """(K, H, W) -> views (K, rows, W), from top to bottom."""
    for rows in _rows(scores, scores.shape[1:]):
        yield scores[:, rows]


def resized(logits: Scores, size: tuple[int, int], *, align_corners: bool = True) -> Iterator[Scores]:
    """(K, h, w) -> strips (K, rows, W) of (K, H, W), from top to bottom: bilinear, as the network resizes."""
    sides = zip(logits.shape[1:], size, strict=True)
    down, across = (Axis.between(source, target, align_corners) for source, target in sides)
    before, after = across.cell, across.after[across.cell]
    for rows in _rows(logits, size):
        upper = down.cell[rows]
        lower = down.after[upper]
        band = placed(logits[:, upper[0] : lower[-1] + 1], logits)
        left = _taken(band, before, 2)
        band = left + (_taken(band, after, 2) - left) * placed(across.weight, logits)
        upper_rows = _taken(band, upper - upper[0], 1)
        lower_rows = _taken(band, lower - upper[0], 1)
        yield upper_rows + (lower_rows - upper_rows) * placed(down.weight[rows, None], logits)


def classes_of(scores: Scores) -> npt.NDArray[Any]:
    """(K, ...) -> (...) on the host: the class of the largest score, as `agln_fast.decode.best_classes`."""
    if isinstance(scores, np.ndarray):
        return best_classes(scores)
    dtype = getattr(_library(scores), labels_dtype(len(scores)))
    return on_host(scores.argmax(0).to(dtype))


def lead(scores: Scores) -> Scores:
    """(K, ...) -> (...): the largest score minus the next one; 0 for a single class."""
    if len(scores) == 1:
        return scores[0] * 0
    library = _library(scores)
    best, second = library.maximum(scores[0], scores[1]), library.minimum(scores[0], scores[1])
    for score in scores[2:]:
        second = library.maximum(second, library.minimum(best, score))
        best = library.maximum(best, score)
    return best - second


def softmax(scores: Scores) -> Scores:
    """(K, ...) -> (K, ...), over the classes."""
    library = _library(scores)
    exponentials = library.exp(scores - library.amax(scores, 0))
    exponentials /= exponentials.sum(0)
    return exponentials


def zeros(shape: tuple[int, ...], like: Scores) -> Scores:
    """float32, where `like` is."""
    library = _library(like)
    return library.zeros(shape, dtype=library.float32, device=like.device)


def placed(values: Any, like: Scores) -> Scores:
    """As float32, where `like` is; not copied if it is that."""
    library = _library(like)
    return library.asarray(values, dtype=library.float32, device=like.device)


def joined(parts: list[Scores], axis: int) -> Scores:
    """One behind the other along `axis`."""
    return _library(parts[0]).concatenate(parts, axis)


def mirrored(scores: Scores) -> Scores:
    """(..., W), from right to left."""
    return _library(scores).flip(scores, (-1,))


def on_host(values: Any) -> npt.NDArray[Any]:
    """As NumPy's."""
    return values if isinstance(values, np.ndarray) else cast(npt.NDArray[Any], values.cpu().numpy())


def _taken(values: Scores, positions: npt.NDArray[np.intp], axis: int) -> Scores:
    if isinstance(values, np.ndarray):
        return values.take(positions, axis)
    return values.index_select(axis, _library(values).asarray(positions, device=values.device))


def _library(scores: Scores) -> Any:
    """NumPy, or PyTorch, which is there already if an array of its is: nothing here imports it."""
    return np if isinstance(scores, np.ndarray) else sys.modules["torch"]


def _rows(scores: Scores, size: tuple[int, int]) -> Iterator[slice]:
    height, width = size
    strip = _STRIP_BYTES if isinstance(scores, np.ndarray) else _DEVICE_STRIP_BYTES
    step = max(1, strip // (4 * len(scores) * width))
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))
