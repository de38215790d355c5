"""Run an engine over a dataset and judge it by the ground truth; run two, and see where they differ."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from agln_fast import interruption
from agln_fast.data.classes import ClassSet
from agln_fast.data.dataset import Sample, SegmentationDataset
from agln_fast.figures.flips import Flips
from agln_fast.metrics import SegmentationMetrics
from agln_fast.runtime.augmentation import TestTimeAugmentation
from agln_fast.runtime.result import Result
from agln_fast.runtime.segmenter import Segmenter

__all__ = ["Comparison", "Evaluation", "compare", "evaluate"]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an engine is worth on a dataset.

    engine, device, precision: what ran.
    dataset, split, samples: what it ran on, and how many images.
    class_set: of the dataset.
    tta: the test-time augmentation, or None.
    milliseconds: mean wall-clock time per image, decoding to labels.
    metrics: the counts, and the numbers that follow from them.
    """

    engine: str
    device: str
    precision: str
    dataset: str
    split: str
    samples: int
    class_set: ClassSet
    tta: TestTimeAugmentation | None
    milliseconds: float
    metrics: SegmentationMetrics

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; rates in 0..1, null where one is not defined."""
        metrics = self.metrics
        columns = zip(
            self.class_set.classes, _plain(metrics.iou), _plain(metrics.accuracy), _plain(metrics.share), strict=True
        )
        return {
            "engine": self.engine,
            "device": self.device,
            "precision": self.precision,
            "dataset": self.dataset,
            "split": self.split,
            "samples": self.samples,
            "tta": self.tta and {**asdict(self.tta), "scales": list(self.tta.scales)},
            "milliseconds": round(self.milliseconds, 3),
            "mean_iou": _plain(metrics.mean_iou),
            "pixel_accuracy": _plain(metrics.pixel_accuracy),
            "mean_accuracy": _plain(metrics.mean_accuracy),
            "classes": [dict(zip(("name", "iou", "accuracy", "share"), row, strict=True)) for row in columns],
            "confusion": metrics.matrix.tolist(),
        }


@dataclass(frozen=True, eq=False)
class Comparison:
    """What B makes of a dataset, held against A.

    disagreement: share of the counted pixels with another label, 0..1.
    weighted_disagreement: the same, a pixel weighted by A's margin, 0..1: flips where A was undecided hardly count.
    weight: what the margin is the difference of; "nothing" where A returns labels, and every pixel counts the same.
    worst: the images with the largest weighted disagreement, the worst first; those without any are left out.
    """

    a: Evaluation
    b: Evaluation
    disagreement: float
    weighted_disagreement: float
    weight: Literal["logits", "probabilities", "nothing"]
    worst: tuple[Flips, ...]

    @property
    def iou_difference(self) -> npt.NDArray[np.float64]:
        """IoU of B minus that of A (K,), -1..1; NaN where one of them is."""
        return self.b.metrics.iou - self.a.metrics.iou

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the pictures of the worst images are left out."""
        return {
            "a": self.a.to_dict(),
            "b": self.b.to_dict(),
            "disagreement": _plain(self.disagreement),
            "weighted_disagreement": _plain(self.weighted_disagreement),
            "weight": self.weight,
            "iou_difference": dict(zip(self.a.class_set.classes, _plain(self.iou_difference), strict=True)),
            "worst": [
                {"name": flips.name, "disagreement": flips.share, "weighted_disagreement": flips.weighted_share}
                for flips in self.worst
            ],
        }


def evaluate(
    segmenter: Segmenter,
    dataset: SegmentationDataset,
    *,
    tta: bool | TestTimeAugmentation = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Segment every image of `dataset` and count against its labels, at the image's own size.

    Args:
        tta: test-time augmentation, as in `Segmenter.__call__`.
        progress: a rich progress display that the caller has started.

    Raises:
        ConfigError: engine and dataset have different numbers of classes, or `tta` with an engine that returns labels.
        MissingPackageError: torchmetrics is not installed.
    """
    tally = _Tally(segmenter, dataset, tta)
    for samples in _batches(dataset, segmenter.contract.max_batch, progress):
        tally.count(samples)
    return tally.evaluation()


def compare(
    a: Segmenter,
    b: Segmenter,
    dataset: SegmentationDataset,
    *,
    tta: bool | TestTimeAugmentation = False,
    worst: int = 4,
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate two engines in one pass, and find the pixels on which they disagree; ignored pixels do not count.

    Args:
        worst: how many images to keep for the flip map.
        tta, progress: as in `evaluate`; both engines get the same augmentation.

    Raises:
        ConfigError: as in `evaluate`, for either.
        MissingPackageError: torchmetrics is not installed.
    """
    tallies = _Tally(a, dataset, tta), _Tally(b, dataset, tta)
    kept: list[Flips] = []
    pixels, flipped, weight, weighted = 0, 0, 0.0, 0.0
    for samples in _batches(dataset, max(a.contract.max_batch, b.contract.max_batch), progress):
        results = tallies[0].count(samples, margin=True), tallies[1].count(samples)
        for sample, of_a, of_b in zip(samples, *results, strict=True):
            margin = np.ones(of_a.labels.shape, np.float32) if of_a.margin is None else of_a.margin
            flips = Flips(sample.name, sample.image, sample.labels, of_a.labels, of_b.labels, margin)
            pixels, flipped = pixels + int(flips.counted.sum()), flipped + int(flips.flipped.sum())
            weight += float(margin[flips.counted].sum(dtype=np.float64))
            weighted += float(margin[flips.flipped].sum(dtype=np.float64))
            if flips.flipped.any():
                kept = sorted([*kept, flips], key=lambda flips: (-flips.weighted_share, -flips.share))[:worst]
    kind: Literal["logits", "probabilities", "nothing"] = "probabilities" if tta else "logits"
    return Comparison(
        tallies[0].evaluation(),
        tallies[1].evaluation(),
        flipped / pixels if pixels else math.nan,
        weighted / weight if weight > 0 else 0.0,
        kind if a.contract.output == "logits" else "nothing",
        tuple(kept),
    )


class _Tally:
    """Counts one engine's labels over a dataset."""

    def __init__(self, segmenter: Segmenter, dataset: SegmentationDataset, tta: bool | TestTimeAugmentation) -> None:
        count = len(segmenter.class_set.classes)
        dataset.check_classes(count, f"engine {segmenter.engine.name}")
        self._segmenter, self._dataset = segmenter, dataset
        self._tta = TestTimeAugmentation() if tta is True else tta or None
        self._metrics = SegmentationMetrics(count)
        self._samples, self._milliseconds = 0, 0.0

    def count(self, samples: list[Sample], *, margin: bool = False) -> list[Result]:
        results: list[Result] = self._segmenter([sample.image for sample in samples], self._tta or False, margin=margin)
        for sample, result in zip(samples, results, strict=True):
            self._metrics.update(result.labels, sample.labels)
            self._samples += 1
            self._milliseconds += result.timing.total
        return results

    def evaluation(self) -> Evaluation:
        segmenter, dataset = self._segmenter, self._dataset
        return Evaluation(
            segmenter.engine.name,
            segmenter.device,
            segmenter.precision,
            dataset.class_set.name,
            dataset.split,
            self._samples,
            dataset.class_set,
            self._tta,
            self._milliseconds / max(1, self._samples),
            self._metrics,
        )


def _batches(dataset: SegmentationDataset, size: int, progress: Progress | None) -> Iterator[list[Sample]]:
    task = None if progress is None else progress.add_task("evaluate", total=len(dataset))
    for start in range(0, len(dataset), size):
        interruption.check()
        samples = [dataset[index] for index in range(start, min(start + size, len(dataset)))]
        yield samples
        if progress is not None and task is not None:
            progress.advance(task, len(samples))


def _plain(rates: Any) -> Any:
    """Numbers -> numbers rounded to 6 decimals; NaN, which JSON does not know, -> None."""
    if isinstance(rates, np.ndarray):
        return [_plain(float(rate)) for rate in rates]
    return None if math.isnan(rates) else round(rates, 6)
