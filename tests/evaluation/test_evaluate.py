"""Whole evaluations, on images whose every pixel is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from fake_engine import colours, fake_segmenter
from rich.progress import Progress

from agln_fast.data.classes import default_class_set
from agln_fast.data.dataset import IGNORE_INDEX, Sample, SegmentationDataset
from agln_fast.errors import ConfigError
from agln_fast.evaluation.evaluate import compare, evaluate
from agln_fast.runtime.augmentation import TestTimeAugmentation


class Painted(SegmentationDataset):
    """Images whose class is the brightest channel, in the truth `wrong` pixels of the first row say otherwise."""

    split = "val"

    def __init__(self, sizes=((64, 96), (40, 120), (130, 50)), wrong=0, classes=3):
        self.class_set = default_class_set(classes)
        self.sizes, self.wrong = sizes, wrong

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Sample:
        random = np.random.default_rng(index)
        labels = random.integers(0, 3, self.sizes[index], np.uint8)
        image = np.eye(3, dtype=np.uint8)[labels] * 100 + 20
        labels[0, : self.wrong] = (labels[0, : self.wrong] + 1) % 3
        labels[-1] = IGNORE_INDEX
        return Sample(image, labels, f"image {index}")


def _except(place, label):
    """The colours, but at `place` of the frame the class is `label`, by a lead of 7."""

    def function(frame):
        logits = colours(frame).astype(np.float32)
        logits[:, *place] = 0
        logits[label, *place] = 7
        return logits

    return function


@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_every_pixel_of_every_image_counts_once(max_batch):
    data = Painted(wrong=10)
    result = evaluate(fake_segmenter(resize="slide", max_batch=max_batch), data)
    pixels = sum((height - 1) * width for height, width in data.sizes)
    assert result.metrics.matrix.sum() == pixels
    assert result.metrics.pixel_accuracy == (pixels - 30) / pixels
    assert (result.engine, result.device, result.precision) == ("fake-fp32", "cpu", "fp32")
    assert (result.dataset, result.split, result.samples, result.tta) == ("generic_3", "val", 3, None)
    assert result.milliseconds > 0


def test_json_has_all_numbers_and_no_nan():
    data = Painted(((64, 96),), wrong=3, classes=4)
    result = evaluate(fake_segmenter(class_set=default_class_set(4)), data)
    values = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert values["mean_iou"] == pytest.approx(result.metrics.mean_iou, abs=1e-6)
    assert values["pixel_accuracy"] == pytest.approx(1 - 3 / (63 * 96), abs=1e-6)
    assert [row["name"] for row in values["classes"]] == ["class 0", "class 1", "class 2", "class 3"]
    assert values["classes"][3] == {"name": "class 3", "iou": None, "accuracy": None, "share": 0}
    assert values["confusion"] == result.metrics.matrix.tolist()
    assert values["tta"] is None


def test_augmentation_reaches_the_engine_and_the_record():
    data = Painted(((64, 96),))
    segment = fake_segmenter(max_batch=16)
    tta = TestTimeAugmentation((1.0,), base_size=96)
    result = evaluate(segment, data, tta=tta)
    assert segment._backend.batches == [2]
    assert result.metrics.mean_iou == 1
    assert result.to_dict()["tta"] == {"scales": [1.0], "flip": True, "base_size": 96}
    assert evaluate(segment, data, tta=True).tta == TestTimeAugmentation()


def test_progress_reaches_its_end():
    with Progress(disable=True) as progress:
        evaluate(fake_segmenter(max_batch=2), Painted(), progress=progress)
        assert progress.tasks[0].completed == progress.tasks[0].total == 3


def test_classes_must_fit():
    message = "engine fake-fp32 has 3 classes, dataset ade20k has 150"
    with pytest.raises(ConfigError, match=message):
        evaluate(fake_segmenter(), Painted(classes=150))
    with pytest.raises(ConfigError, match=message):
        compare(fake_segmenter(class_set=default_class_set(150)), fake_segmenter(), Painted(classes=150))


def test_disagreement_is_weighted_by_the_margin_of_a():
    """One image; B turns rows 0 and 1 into class 0. A leads by 100 everywhere but in row 1, where it leads by 7."""
    data = Painted(((64, 96),))
    truth = data[0].labels
    a = fake_segmenter(_except((1, slice(None)), 1), name="a")
    b = fake_segmenter(_except((slice(2), slice(None)), 0), name="b")
    comparison = compare(a, b, data)
    flipped = int((truth[0] != 0).sum())  # row 0, and all 96 pixels of row 1; the last row is ignored
    assert comparison.disagreement == (flipped + 96) / (63 * 96)
    assert comparison.weighted_disagreement == pytest.approx((100 * flipped + 7 * 96) / (100 * 62 * 96 + 7 * 96))
    assert comparison.weight == "logits"
    assert [flips.name for flips in comparison.worst] == ["image 0"]
    assert comparison.worst[0].weighted_share == comparison.weighted_disagreement
    # The other way round B, which leads by 7 in both rows, is the one that weighs.
    turned = compare(b, a, data)
    assert turned.disagreement == comparison.disagreement
    assert turned.weighted_disagreement == pytest.approx(7 * (flipped + 96) / (100 * 61 * 96 + 7 * 2 * 96))
    assert np.array_equal(turned.iou_difference, -comparison.iou_difference)
    assert np.array_equal(comparison.iou_difference, evaluate(b, data).metrics.iou - evaluate(a, data).metrics.iou)


def test_ignored_pixels_never_disagree():
    comparison = compare(fake_segmenter(), fake_segmenter(_except((-1, slice(None)), 0)), Painted(((64, 96),)))
    assert comparison.disagreement == comparison.weighted_disagreement == 0
    assert comparison.worst == ()


def test_an_engine_with_labels_weighs_every_pixel_alike():
    data = Painted(((64, 96),))
    comparison = compare(fake_segmenter(output="labels"), fake_segmenter(_except((slice(5), slice(None)), 0)), data)
    assert comparison.weight == "nothing"
    assert comparison.weighted_disagreement == comparison.disagreement > 0


def test_margins_of_probabilities_under_augmentation():
    tta = TestTimeAugmentation((1.0,), base_size=96)
    comparison = compare(fake_segmenter(), fake_segmenter(), Painted(((64, 96),)), tta=tta)
    assert comparison.weight == "probabilities"


def test_the_worst_images_come_first():
    """B errs on as many rows as the darkest pixel of the image says: rows 5, 20, 10 of three images of one size."""

    def rows(frame):
        return _except((slice({5: 5, 6: 20, 7: 10}[int(frame.min())]), slice(None)), 0)(frame)

    class Marked(Painted):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return sample._replace(image=sample.image - 15 + index)

    data = Marked(((64, 96),) * 3)
    comparison = compare(fake_segmenter(), fake_segmenter(rows, max_batch=2), data, worst=2)
    assert [flips.name for flips in comparison.worst] == ["image 1", "image 2"]
    values = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert [row["name"] for row in values["worst"]] == ["image 1", "image 2"]
    assert list(values["iou_difference"]) == ["class 0", "class 1", "class 2"]
    assert values["b"]["engine"] == "fake-fp32"


def test_nothing_to_compare_is_nan():
    class Void(Painted):
        def __getitem__(self, index):
            return super().__getitem__(index)._replace(labels=np.full(self.sizes[index], IGNORE_INDEX, np.uint8))

    comparison = compare(fake_segmenter(), fake_segmenter(), Void(((64, 96),)))
    assert math.isnan(comparison.disagreement)
    assert comparison.to_dict()["disagreement"] is None
