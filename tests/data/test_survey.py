"""What a dataset is like, counted by hand; and what a person is warned of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from agln_fast.data.classes import ClassSet
from agln_fast.data.dataset import Sample, SegmentationDataset, SomeSamples
from agln_fast.data.survey import survey
from agln_fast.errors import DatasetError

CLASSES = ClassSet("mine", "Mine", ("sky", "road", "tree"), ((0, 0, 1), (0, 0, 2), (0, 0, 3)))
BROKEN = None


class Given(SegmentationDataset):
    """Samples of label rows; the image is all of `tones[i]`, or of the sample's own number."""

    class_set = CLASSES

    def __init__(self, split: str, masks: Sequence[list[list[int]] | None], tones: Sequence[int] = ()) -> None:
        self.split, self._masks = split, masks
        self._tones = tones or range(len(masks))

    def __len__(self) -> int:
        return len(self._masks)

    def __getitem__(self, index: int) -> Sample:
        mask = self._masks[index]
        if mask is None:
            raise DatasetError(f"file {index} is broken")
        labels = np.array(mask, np.uint8)
        return Sample(np.full((*labels.shape, 3), self._tones[index], np.uint8), labels, f"s{index}")


def test_counts_shares_and_sizes() -> None:
    split = survey({"x": Given("x", [[[0, 0, 1, 255]], [[1, 1], [1, 1], [1, 255]], [[0]]])}).splits["x"]
    assert split.pixels.tolist() == [3, 6, 0]
    assert split.images.tolist() == [2, 2, 0]
    assert split.pixel_shares.tolist() == [3 / 9, 6 / 9, 0]
    assert split.image_shares.tolist() == [2 / 3, 2 / 3, 0]
    assert split.ignored_share == 2 / 11
    assert split.extent() == [(1, 1), (1, 4), (3, 2)]
    assert split.single == ("s1", "s2")


def test_broken_samples_are_told_and_the_others_counted() -> None:
    seen: list[int] = []
    found = survey({"x": Given("x", [BROKEN, [[0, 1, 2]], BROKEN])}, lambda: seen.append(1))
    assert found.bad == ["file 0 is broken", "file 2 is broken"]
    assert len(seen) == 3
    assert found.to_dict()["splits"]["x"]["samples"] == 1
    nothing = survey({"x": Given("x", [BROKEN])})
    assert nothing.to_dict()["splits"]["x"]["sizes"] is None
    assert nothing.splits["x"].pixel_shares.tolist() == [0, 0, 0]


ALL = [[0, 1, 2]]


@pytest.mark.parametrize(
    ("splits", "told"),
    [
        ({"x": Given("x", [[[0, 1]]])}, ["1 of 3 classes are never seen: tree"]),
        (
            {"x": Given("x", [ALL, [[1]], [[255]]])},
            [
                "x: 2 of 3 masks have one class alone, or none: s1, s2",
                "x: images have 2 sizes; 2 of 3 have 1x1",
            ],
        ),
        ({"x": Given("x", [[[0, 1, 2, 255, 255, 255, 255]]])}, ["x: 57% of the pixels are ignored"]),
        ({"val": Given("val", [ALL] * 19, range(19))}, ["val: 19 samples are few, so its mIoU is a rough number"]),
        ({"val": Given("val", [ALL] * 20, range(20))}, []),
        (
            {"train": Given("train", [ALL, ALL], [1, 2]), "test": Given("test", [ALL] * 20, [2, *range(3, 22)])},
            ["1 images are in several splits, which makes scores too good: train: s1 = test: s0"],
        ),
        ({"x": Given("x", [ALL, ALL], [4, 4])}, ["1 images are in one split several times: x: s0 = x: s1"]),
        (
            {"train": Given("train", [[[0, 1]]], [1]), "val": Given("val", [[[0, 2]]] * 20, range(2, 22))},
            [
                "1 classes are in train and not in val, nothing validates them: road",
                "1 classes are in val and not in train, nothing teaches them: tree",
            ],
        ),
    ],
    ids=["never-seen", "one-class-and-sizes", "ignored", "few", "not-few", "across-splits", "within-one", "one-side"],
)  # fmt: skip
def test_warnings(splits: dict[str, SegmentationDataset], told: list[str]) -> None:
    assert sorted(survey(splits).warnings()) == told


def test_equal_bytes_of_another_shape_are_no_duplicate() -> None:
    assert survey({"x": Given("x", [[[0, 1, 2, 0]], [[0, 1], [2, 0]]], [4, 4])}).warnings() == [
        "x: images have 2 sizes; 1 of 2 have 1x4"
    ]


def test_some_samples_are_evenly_spread() -> None:
    dataset = Given("x", [[[0]]] * 10)
    assert [sample.name for sample in SomeSamples(dataset, 4)] == ["s0", "s2", "s5", "s7"]
    assert [sample.name for sample in SomeSamples(dataset, 99)] == [f"s{index}" for index in range(10)]
    assert SomeSamples(dataset, 4)[-1].name == "s7"
