"""mIoU, pixel accuracy and their like, all from one confusion matrix."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agln_fast.data.dataset import IGNORE_INDEX
from agln_fast.errors import ConfigError, MissingPackageError

__all__ = ["SegmentationMetrics"]

_Rates: TypeAlias = npt.NDArray[np.float64]


class SegmentationMetrics:
    """Counts how often a pixel of class i is taken for class j, over any number of images; torchmetrics counts.

    With the confusion matrix n, n[i, j] the number of pixels of true class i with label j:

        iou[k] = n[k, k] / (sum_j n[k, j] + sum_i n[i, k] - n[k, k])      NaN if k is neither in the truth nor predicted
        accuracy[k] = n[k, k] / sum_j n[k, j]                             NaN if k is not in the truth
        pixel_accuracy = sum_k n[k, k] / sum_ij n[i, j]

    Means run over the classes that are not NaN, as in mmsegmentation. All are of all pixels of all images together, not
    means over images. Pixels whose truth is `ignore_index` do not count.
    """

    def __init__(
        self, num_classes: int, *, ignore_index: int = IGNORE_INDEX, matrix: npt.ArrayLike | Tensor | None = None
    ) -> None:
        """
        Args:
            num_classes: K.
            ignore_index: truth of the pixels that do not count.
            matrix: go on from this confusion matrix (K, K).

        Raises:
            ConfigError: `num_classes` is below 1, `ignore_index` is one of the classes, or another shape of `matrix`.
            MissingPackageError: torchmetrics is not installed.
        """
        if num_classes < 1 or 0 <= ignore_index < num_classes:
            raise ConfigError(
                f"{num_classes} classes, ignored is {ignore_index}: needs a class, and an id that is none"
            )
        try:
            from torchmetrics.classification import MulticlassConfusionMatrix
        except ImportError:
            raise MissingPackageError("torchmetrics", "eval") from None
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        # Checked here instead: torchmetrics sorts all pixels for it, and lets some ids pass.
        self._counts = MulticlassConfusionMatrix(num_classes, ignore_index=ignore_index, validate_args=False)
        if matrix is not None:
            counts = torch.as_tensor(matrix, dtype=torch.int64)
            if counts.shape != self._counts.confmat.shape:
                raise ConfigError(f"confusion matrix {tuple(counts.shape)}: must be {num_classes} x {num_classes}")
            self._counts.confmat += counts

    def update(self, labels: npt.ArrayLike | Tensor, truth: npt.ArrayLike | Tensor) -> None:
        """Count the pixels of an image or a batch.

        Args:
            labels: class ids of any shape and integer type; on any device.
            truth: the same, with `ignore_index` where nothing counts.

        Raises:
            ConfigError: shapes that differ, no integers, or an id outside 0..K-1; a label even where it does not count.
        """
        predicted, expected = _integers(labels, "labels"), _integers(truth, "ground truth")
        if predicted.shape != expected.shape:
            raise ConfigError(f"labels {tuple(predicted.shape)}, ground truth {tuple(expected.shape)}: must be equal")
        self._check(predicted, "labels")
        self._check(expected[expected != self.ignore_index], "ground truth")
        self._counts.update(predicted, expected)

    def merge(self, other: SegmentationMetrics) -> None:
        """Add what `other` has counted.

        Raises:
            ConfigError: it counts another number of classes.
        """
        if other.num_classes != self.num_classes:
            raise ConfigError(f"metrics of {other.num_classes} and of {self.num_classes} classes cannot be merged")
        self._counts.merge_state(other._counts)

    @property
    def matrix(self) -> npt.NDArray[np.int64]:
        """The confusion matrix (K, K), pixels: rows are true classes, columns labels."""
        return self._counts.confmat.numpy().astype(np.int64)

    @property
    def iou(self) -> _Rates:
        """Intersection over union of each class (K,), 0..1; NaN where there is no union."""
        matrix = self.matrix
        return _ratio(matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal())

    @property
    def accuracy(self) -> _Rates:
        """Share of each class's pixels that are found (K,), 0..1; NaN where the class has no pixel."""
        matrix = self.matrix
        return _ratio(matrix.diagonal(), matrix.sum(1))

    @property
    def share(self) -> _Rates:
        """Share of the counted pixels that are of each true class (K,), 0..1; NaN without any pixel."""
        matrix = self.matrix
        return _ratio(matrix.sum(1), np.full(self.num_classes, matrix.sum()))

    @property
    def mean_iou(self) -> float:
        """mIoU, 0..1; NaN without any pixel."""
        return _mean(self.iou)

    @property
    def mean_accuracy(self) -> float:
        """Mean of `accuracy`, 0..1; NaN without any pixel."""
        return _mean(self.accuracy)

    @property
    def pixel_accuracy(self) -> float:
        """Share of the counted pixels whose label is right, 0..1; NaN without any pixel."""
        matrix = self.matrix
        return float(_ratio(matrix.trace(), matrix.sum()))

    def _check(self, ids: Tensor, what: str) -> None:
        strange = ids[(ids < 0) | (ids >= self.num_classes)]
        if strange.numel():
            raise ConfigError(f"class id {int(strange[0])} in the {what}: there are {self.num_classes} classes")


def _integers(ids: npt.ArrayLike | Tensor, what: str) -> Tensor:
    if not isinstance(ids, Tensor):
        array = np.asarray(ids)
        # Copied in any case: PyTorch warns of read-only memory, and refuses steps backwards.
        ids = torch.from_numpy(array.astype(np.int64, order="C") if np.issubdtype(array.dtype, np.integer) else array)
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(f"{what}: needs class ids of an integer type, got {str(ids.dtype).removeprefix('torch.')}")
    return ids.detach().cpu().long()


def _ratio(part: Any, whole: Any) -> _Rates:
    part, whole = np.asarray(part, np.float64), np.asarray(whole, np.float64)
    rates: _Rates = np.divide(part, whole, out=np.full(whole.shape, math.nan), where=whole > 0)
    return rates


def _mean(rates: _Rates) -> float:
    known = rates[~np.isnan(rates)]
    return float(known.mean()) if known.size else math.nan
