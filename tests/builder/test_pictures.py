"""Which pictures are for what."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from agln_fast.builder import judge
from agln_fast.builder.pictures import Pictures, Unlabelled
from agln_fast.contract import IOContract
from agln_fast.data.classes import default_class_set
from agln_fast.data.dataset import IGNORE_INDEX
from agln_fast.data.scenes import Scenes
from agln_fast.errors import ConfigError, ImageError


@pytest.fixture
def folder(tmp_path):
    """Ten pictures, each of one grey value, which is ten times its number."""
    for index in range(10):
        Image.fromarray(np.full((40, 50, 3), 10 * index, np.uint8)).save(tmp_path / f"{index}.png")
    return tmp_path


def _greys(frames):
    return [int(frame[0, 0, 0]) // 10 for frame in frames]


def _judged(pictures):
    return [int(sample.image[0, 0, 0]) // 10 for sample in pictures.judged]


@pytest.mark.parametrize(
    ("count", "calibrated"),
    [(None, [0, 2, 4, 6, 8]), (1, [0]), (3, [0, 3, 6]), (9, [0, 1, 2, 3, 4, 5, 6, 7, 8])],
    ids=["half of a small dataset", "one", "spread evenly", "all but one"],
)
def test_what_is_calibrated_on_is_not_judged_by(count, calibrated, folder):
    pictures = Pictures(Unlabelled(folder), count)
    assert _greys(pictures.frames(IOContract(64, 64))) == calibrated
    assert sorted(_judged(pictures) + calibrated) == list(range(10))


def test_blocks_are_ranked_on_what_is_not_judged_by(folder):
    pictures = Pictures(Unlabelled(folder))
    ranked = [int(sample.image[0, 0, 0]) // 10 for sample in pictures.calibrated_on(3)]
    assert ranked == [0, 2, 6]
    assert not set(ranked) & set(_judged(pictures))


def test_agreement_remembers_no_more_than_fits(folder, monkeypatch):
    """Three bytes for each pixel of the reference: of many images some are judged by, evenly spread."""
    monkeypatch.setattr(judge, "_MOST_BYTES", 3 * 64 * 64 * 5)
    monkeypatch.setattr(judge, "yardstick", lambda reference, dataset, **_: dataset)
    pictures = Pictures(Unlabelled(folder), calibrates=False)
    reference = SimpleNamespace(contract=IOContract(64, 64))
    judged = judge.Judge(pictures, default_class_set(3), reference, [], 0.5, None, None).yardstick
    assert [int(sample.image[0, 0, 0]) // 10 for sample in judged] == [0, 2, 4, 6, 8]


def test_images_beside_their_masks_are_no_images_without_masks(folder):
    Image.new("L", (50, 40)).save(folder / "3.bmp")
    with pytest.raises(ConfigError, match=r"3\.bmp and 3\.png have one name; if one is the mask of the other, put"):
        Unlabelled(folder)


def test_without_calibration_all_are_judged_by(folder):
    assert _judged(Pictures(Unlabelled(folder), calibrates=False)) == list(range(10))


def test_a_large_dataset_is_calibrated_on_128():
    assert Pictures(Scenes("val")).number == 250 // 2
    assert Pictures(Scenes("train")).number == 128
    assert Pictures().number == 128


def test_some_are_spread_over_what_is_judged(folder):
    pictures = Pictures(Unlabelled(folder), calibrates=False)
    assert _greys(pictures.samples(IOContract(64, 64), 4)) == [0, 2, 5, 7]
    assert len(pictures.samples(IOContract(64, 64), 40)) == 10


def test_frames_are_what_comes_to_the_engine(folder):
    """Padded where the contract pads; the whole picture where windows slide over it."""
    for resize, below in (("stretch", 10), ("pad", 124), ("slide", 10)):
        contract = replace(IOContract(96, 64, output="logits"), resize=resize)
        frame = Pictures(Unlabelled(folder)).frames(contract)[1] // 2
        assert frame.shape == (96, 64, 3)
        assert frame[0, 0].tolist() == [10] * 3
        assert frame[-1, 0, 0] == pytest.approx(below, abs=70 if resize == "pad" else 0)


def test_images_without_masks_have_no_pixel_that_counts(folder):
    sample = Unlabelled(folder)[2]
    assert (sample.labels == IGNORE_INDEX).all()
    assert sample.labels.shape == sample.image.shape[:2] == (40, 50)
    assert sample.name == "2.png"
    with pytest.raises(ImageError):
        Unlabelled(folder / "none" / "*.png")


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (0, "calibration on 0 images: must be a whole number of at least 1"),
        (-3, "calibration on -3 images: must be a whole number of at least 1"),
        (2.5, "calibration on 2.5 images: must be a whole number of at least 1"),
        (float("nan"), "calibration on nan images: must be a whole number of at least 1"),
        (10, "calibration on 10 images: there are 10, and one at least must be left to judge by"),
        (11, "calibration on 11 images: there are 10, and one at least"),
    ],
)
def test_counts_that_cannot_be(count, message, folder):
    with pytest.raises(ConfigError, match=message):
        Pictures(Unlabelled(folder), count)


def test_other_sets_that_are_too_small(folder):
    with pytest.raises(ConfigError, match=r"calibration on 2001 images: there are 2000$"):
        Pictures(None, 2001)
    with pytest.raises(ConfigError, match="int8 needs two images at least"):
        Pictures(Unlabelled(folder / "3.png"))
    assert len(Pictures(Unlabelled(folder / "3.png"), calibrates=False).judged) == 1
