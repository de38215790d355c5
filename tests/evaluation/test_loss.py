"""What an engine loses: by the definitions, on counts and images that are written down here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from agln_fast.data.classes import ClassSet
from agln_fast.data.dataset import IGNORE_INDEX, Sample, SegmentationDataset
from agln_fast.engines import KINDS, open_engine
from agln_fast.engines.echo import Echo
from agln_fast.evaluation.loss import Counts, bootstrap, has_masks, yardstick
from agln_fast.metrics import SegmentationMetrics

CLASSES = ClassSet("five", "five", tuple("abcde"), tuple((i, i, i) for i in range(5)))


class Listed(SegmentationDataset):
    """Images of noise, with the masks that are given."""

    class_set, split = CLASSES, "val"

    def __init__(self, masks):
        self._masks = masks

    def __len__(self):
        return len(self._masks)

    def __getitem__(self, index):
        image = np.random.default_rng(range(len(self))[index]).integers(0, 256, (64, 96, 3), np.uint8)
        return Sample(image, self._masks[index], str(index))


def _counts(*rows):
    hits, sizes = zip(*rows, strict=True)
    return Counts(np.array(hits, float), np.array(sizes, float))


def test_the_score_is_the_mean_over_classes_of_all_images_together():
    """Not the mean over images; a class that is nowhere does not count."""
    counts = _counts(([1, 0, 0], [2, 0, 4]), ([5, 0, 1], [6, 0, 4]))
    assert counts.score() == pytest.approx((6 / 8 + 1 / 8) / 2)
    assert counts.score(np.array([2, 0])) == pytest.approx((2 / 4 + 0) / 2)
    assert counts.score(np.array([[1, 1], [2, 0]])).tolist() == pytest.approx([0.4375, 0.25])


def test_where_nothing_counts_nothing_is_lost():
    assert _counts(([0.0], [0.0])).score() == 1


def test_the_interval_is_that_of_resampled_images():
    """Against resamples drawn one by one: which images, then the loss of them together."""
    random = np.random.default_rng(5)
    sizes = random.integers(50, 100, (30, 4)).astype(float)
    reference = Counts(sizes * 0.9, sizes)
    engine = Counts(sizes * random.uniform(0.7, 0.95, (30, 4)), sizes)
    losses = []
    for _ in range(4000):
        some = random.integers(0, 30, 30)
        parts = [(counts.hits[some].sum(0) / counts.sizes[some].sum(0)).mean() for counts in (reference, engine)]
        losses.append(100 * (parts[0] - parts[1]))
    low, high = bootstrap(reference, engine)
    # The ends of such intervals scatter by some percent of their length.
    assert (low, high) == pytest.approx(np.percentile(losses, [2.5, 97.5]), abs=0.06 * (high - low))
    assert bootstrap(reference, engine) == (low, high)


def test_an_engine_that_is_the_reference_loses_nothing_for_sure():
    counts = _counts(([3, 4], [5, 9]), ([1, 0], [5, 2]))
    assert bootstrap(counts, counts) == (0, 0)


def test_one_image_has_an_interval_without_length():
    reference, engine = _counts(([3.0], [4.0])), _counts(([2.0], [4.0]))
    assert bootstrap(reference, engine) == (25, 25)


def test_masks_are_looked_for_behind_the_first_image():
    empty, some = np.full((64, 96), IGNORE_INDEX, np.uint8), np.full((64, 96), IGNORE_INDEX, np.uint8)
    some[0, 0] = 2
    assert has_masks(Listed([empty, some]))
    assert not has_masks(Listed([empty, empty]))


def _flipped(artefact, monkeypatch, rows):
    """An engine that gives the reference's labels, but for the next class in its first rows."""

    def shown(frame):
        with open_engine(artefact) as engine:
            labels = engine.run(frame[None])[0].astype(int)
        labels[:rows] = (labels[:rows] + 1) % 5
        return -np.abs(np.arange(5)[:, None, None] - labels)

    monkeypatch.setitem(KINDS, "echo", Echo(shown))
    return replace(artefact, name="echo-fp32", kind="echo")


def test_with_masks_it_is_the_difference_of_miou(bundle, monkeypatch):
    artefact = bundle.artefact("torch-fp32")
    masks = [np.random.default_rng(9 + i).integers(0, 5, (64, 96), np.uint8) for i in range(3)]
    masks[1][:20] = IGNORE_INDEX
    dataset = Listed(masks)
    other = _flipped(artefact, monkeypatch, 30)
    found = yardstick(artefact, dataset, masks=True).accuracy(other)
    scores = []
    for each in (artefact, other):
        metrics = SegmentationMetrics(5)
        with open_engine(each) as engine:
            for sample in dataset:
                metrics.update(engine.run(sample.image[None])[0], sample.labels)
        scores.append(metrics.mean_iou)
    assert (found.reference, found.score) == pytest.approx(scores)
    assert found.loss == pytest.approx(100 * (scores[0] - scores[1]))
    assert found.low <= found.loss <= found.high
    assert (found.measure, found.dataset, found.split, found.images) == ("mIoU", "five", "val", 3)
    assert found.backend == "echo"


def test_without_masks_a_pixel_counts_by_how_sure_the_reference_is_of_it(bundle, monkeypatch):
    """Softmax probabilities written out, of the logits of the same network."""
    artefact = bundle.artefact("torch-fp32")
    dataset = Listed([np.full((64, 96), IGNORE_INDEX, np.uint8)] * 2)
    found = yardstick(artefact, dataset, masks=False).accuracy(_flipped(artefact, monkeypatch, 7))
    logits = replace(artefact, contract=replace(artefact.contract, output="logits"))
    wrong = total = 0.0
    with open_engine(logits) as engine:
        for sample in dataset:
            scores = engine.run(sample.image[None])[0].astype(np.float64)
            probabilities = np.exp(scores) / np.exp(scores).sum(0)
            second, first = np.sort(probabilities, 0)[-2:]
            wrong += (first - second)[:7].sum()
            total += (first - second).sum()
    assert (found.measure, found.reference, found.images) == ("agreement", 1, 2)
    assert found.loss == pytest.approx(100 * wrong / total, rel=1e-3)  # weights are kept in half precision


def test_padding_is_no_part_of_the_agreement(bundle, monkeypatch):
    """A picture half as high as the engine's input: what differs below it is not seen."""
    artefact = replace(bundle.artefact("torch-fp32"), contract=replace(bundle.manifest.contract, resize="pad"))

    class Wide(Listed):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return Sample(sample.image[:32], sample.labels[:32], sample.name)

    dataset = Wide([np.full((64, 96), IGNORE_INDEX, np.uint8)])

    def shown(frame):
        with open_engine(artefact) as engine:
            labels = engine.run(frame[None])[0].astype(int)
        labels[32:] = (labels[32:] + 1) % 5
        return -np.abs(np.arange(5)[:, None, None] - labels)

    monkeypatch.setitem(KINDS, "echo", Echo(shown))
    other = replace(artefact, name="echo-fp32", kind="echo")
    assert yardstick(artefact, dataset, masks=False).accuracy(other).loss == 0
