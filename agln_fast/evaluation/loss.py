"""What an engine loses against the fp32 reference network on a dataset, and how sure that is.

With masks it is mIoU: `score` of the reference minus that of the engine. Without masks it is agreement with the
reference, a pixel weighted by how sure the reference is of it. Both are the mean over columns k of

    sum_i hits[i, k] / sum_i sizes[i, k]        over images i, without the columns whose sizes are all zero

With masks a column is a class: its intersection and its union, pixels. Without there is one: the weight of the pixels
with the reference's label, and of all. The weight of a pixel is the reference's largest softmax probability minus its
second largest, 0..1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from agln_fast import interruption
from agln_fast.artefact import Artefact
from agln_fast.data.dataset import IGNORE_INDEX, SegmentationDataset
from agln_fast.decode import best_classes
from agln_fast.engines import open_engine
from agln_fast.manifest import Accuracy, EngineRecord
from agln_fast.metrics import SegmentationMetrics
from agln_fast.runtime.images import fit, pack
from agln_fast.runtime.scores import lead, softmax
from agln_fast.runtime.segmenter import Segmenter

__all__ = ["Counts", "Yardstick", "bootstrap", "has_masks", "yardstick"]

_RESAMPLES = 2000
_INTERVAL = 2.5, 97.5  # percentiles

_Rates = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Counts:
    """What an engine got right, image by image: `hits` and `sizes`, each (N, K) float64."""

    hits: _Rates
    sizes: _Rates

    def score(self, times: npt.NDArray[np.integer[Any]] | None = None) -> _Rates:
        """The score, 0..1, where image i counts `times[..., i]` times, None for once: of the shape of the rest.

        1 where no column has a size: there is nothing to get wrong.
        """
        times = np.ones(len(self.hits), np.int64) if times is None else times
        hits, sizes = times @ self.hits, times @ self.sizes
        known = sizes > 0
        rates = np.divide(hits, sizes, out=np.zeros_like(hits), where=known)
        count = known.sum(-1)
        mean: _Rates = np.divide(rates.sum(-1), count, out=np.ones(count.shape), where=count > 0)
        return mean


def bootstrap(reference: Counts, engine: Counts, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of the loss in percentage points: its percentiles over 2000 resamples of the images.

    Both are resampled alike, with replacement; the same seed gives the same interval.
    Source: Efron, Bootstrap Methods: Another Look at the Jackknife, Annals of Statistics 1979; percentile method.
    """
    count = len(reference.hits)
    random = np.random.default_rng(seed)
    times = random.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    losses = 100 * (reference.score(times) - engine.score(times))
    low, high = np.percentile(losses, _INTERVAL)
    return float(low), float(high)


def has_masks(dataset: SegmentationDataset) -> bool:
    """Whether any of its pixels has a class."""
    return any((sample.labels != IGNORE_INDEX).any() for sample in dataset)


class Yardstick(ABC):
    """The reference's counts on a dataset, to hold engines against; each engine is run once.

    measure, dataset, split, images: as in `Accuracy`. score: the reference's, 0..1.
    """

    measure: Literal["mIoU", "agreement"]

    def __init__(self, dataset: SegmentationDataset, threads: int | None) -> None:
        self.dataset, self.split, self.images = dataset.class_set.name, dataset.split, len(dataset)
        self._threads = threads
        self._reference: Counts

    @property
    def score(self) -> float:
        return float(self._reference.score())

    def accuracy(self, artefact: Artefact) -> Accuracy:
        """What `artefact` loses.

        Raises:
            BackendError: it cannot run here, or not to its end.
        """
        counts = self.counts(artefact)
        score = float(counts.score())
        low, high = bootstrap(self._reference, counts)
        return Accuracy(
            self.measure,
            self.dataset,
            self.split,
            self.images,
            reference=self.score,
            score=score,
            loss=100 * (self.score - score),
            low=low,
            high=high,
            backend=artefact.kind,
        )

    @abstractmethod
    def counts(self, artefact: Artefact) -> Counts:
        """Run an engine over the images."""


def yardstick(
    artefact: Artefact, dataset: SegmentationDataset, *, masks: bool, threads: int | None = None
) -> Yardstick:
    """By mIoU with masks, by agreement without; `artefact` is the fp32 reference network, which is run here.

    Raises:
        MissingPackageError: torchmetrics is not installed, and there are masks.
        BackendError, ImageError, DatasetError: the network, or an image, cannot be used.
    """
    return _ByMasks(artefact, dataset, threads) if masks else _ByAgreement(artefact, dataset, threads)


class _ByMasks(Yardstick):
    """At the images' own size, as `evaluate` counts."""

    measure = "mIoU"

    def __init__(self, artefact: Artefact, dataset: SegmentationDataset, threads: int | None) -> None:
        super().__init__(dataset, threads)
        self._samples = dataset
        self._reference = self.counts(artefact)

    def counts(self, artefact: Artefact) -> Counts:
        dataset, classes = self._samples, artefact.model.num_classes
        opened = open_engine(artefact, threads=self._threads)
        hits, sizes = [], []
        record, aligned = EngineRecord.of(artefact, "cpu"), artefact.model.align_corners
        with Segmenter(record, opened, artefact.contract, dataset.class_set, align_corners=aligned) as segmenter:
            for sample in dataset:
                interruption.check()
                metrics = SegmentationMetrics(classes)
                metrics.update(segmenter(sample.image).labels, sample.labels)
                matrix = metrics.matrix
                hits.append(matrix.diagonal())
                sizes.append(matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
        return Counts(np.array(hits, np.float64), np.array(sizes, np.float64))


class _ByAgreement(Yardstick):
    """At the engine's size, without padding; what would slide over an image sees all of it, as in the verification."""

    measure = "agreement"

    def __init__(self, artefact: Artefact, dataset: SegmentationDataset, threads: int | None) -> None:
        super().__init__(dataset, threads)
        contract = artefact.contract
        self._contract = contract.whole()
        self._samples = dataset
        self._labels: list[npt.NDArray[Any]] = []
        self._weights: list[npt.NDArray[np.float16]] = []  # all images' at once: half the memory
        logits = replace(artefact, contract=replace(contract, output="logits"))
        for output in self._outputs(logits):
            self._labels.append(best_classes(output))
            self._weights.append(lead(softmax(output)).astype(np.float16))
        sizes = np.array([[weights.sum(dtype=np.float64)] for weights in self._weights])
        self._reference = Counts(sizes, sizes)

    def counts(self, artefact: Artefact) -> Counts:
        hits = []
        for output, labels, weights in zip(self._outputs(artefact), self._labels, self._weights, strict=True):
            found = output if artefact.contract.output == "labels" else best_classes(output)
            hits.append([weights[found == labels].sum(dtype=np.float64)])
        return Counts(np.array(hits), self._reference.sizes)

    def _outputs(self, artefact: Artefact) -> Iterator[npt.NDArray[Any]]:
        """What an engine gives for each image; a batch is one image, as often as it must be there."""
        with open_engine(artefact, threads=self._threads) as engine:
            for sample in self._samples:
                interruption.check()
                frame, place = fit(sample.image, self._contract)
                output = engine.run(pack([frame] * self._contract.min_batch, self._contract))[0]
                yield output[..., place.top : place.top + place.height, place.left : place.left + place.width]
