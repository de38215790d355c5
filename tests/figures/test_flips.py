"""The picture of the pixels on which two engines disagree."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from agln_fast.data.classes import class_set
from agln_fast.errors import ConfigError, MissingPackageError
from agln_fast.figures.flips import Flips, _map, draw_flips
from agln_fast.figures.saving import save_figure

CLASSES = class_set("scenes")


@pytest.fixture
def flips() -> Flips:
    """64x96; A is right. B errs in rows 10 to 19, where A leads by 2 on the left half and 6 on the right; else by 4."""
    random = np.random.default_rng(0)
    truth = np.repeat(np.repeat(random.integers(0, 12, (4, 6), np.uint8), 16, 0), 16, 1)
    b = truth.copy()
    b[10:20] = (b[10:20] + 1) % 12
    margin = np.full(truth.shape, 4, np.float32)
    margin[10:20, :48], margin[10:20, 48:] = 2, 6
    return Flips("scene", random.integers(0, 256, (64, 96, 3), np.uint8), truth, truth.copy(), b, margin)


def test_shares(flips):
    """10 of 64 rows; weighted as well, for the mean lead in them is 4. Ignored pixels leave both sums."""
    assert flips.share == flips.weighted_share == 10 / 64
    truth = flips.truth.copy()
    truth[10:15], truth[:, :48] = 255, 255
    ignored = replace(flips, truth=truth)
    assert ignored.share == 5 / 59
    assert ignored.weighted_share == 5 * 6 / (54 * 4 + 5 * 6)


def test_shares_of_nothing(flips):
    nothing = replace(flips, truth=np.full_like(flips.truth, 255))
    assert nothing.share == nothing.weighted_share == 0
    assert replace(flips, margin=np.zeros_like(flips.margin)).weighted_share == 0


def test_flips_are_darker_where_a_was_sure(flips):
    picture = _map(flips, 6.0).astype(int)
    assert picture.shape == (64, 96, 3)
    unsure, sure = picture[15, 10], picture[15, 90]
    assert sure.sum() < unsure.sum() - 100
    assert (np.ptp(np.delete(picture, range(10, 20), 0), 2) == 0).all(), "grey elsewhere"
    assert (np.ptp(picture[10:20], 2) > 60).all(), "no grey among the flips"


def test_a_single_pixel_of_a_large_image_is_not_lost():
    shape = 1000, 1200
    labels, margin = np.zeros(shape, np.uint8), np.ones(shape, np.float32)
    b = labels.copy()
    b[501, 799] = 1
    flips = Flips("large", np.zeros((*shape, 3), np.uint8), labels, labels, b, margin)
    picture = _map(flips, 1.0)
    assert picture.shape == (334, 400, 3)
    assert np.argwhere(np.ptp(picture.astype(int), 2) > 0).tolist() == [[501 // 3, 799 // 3]]


def test_the_page_names_engines_and_numbers(flips, tmp_path):
    title = "torch against openvino\n0.1% of the pixels"
    figure = draw_flips([flips, flips], CLASSES, a="torch", b="openvino", title=title, margin="difference of logits")
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    for word in (
        "torch against openvino",
        "0.1% of the pixels",
        "torch",
        "openvino",
        "margin of torch",
        "ground truth",
    ):
        assert word in words
    assert words.count("15.62% of the pixels, 15.62% weighted") == 2
    assert "difference of logits, 0 to 6" in words
    save_figure(figure, tmp_path / "flips.png")
    picture = np.asarray(Image.open(tmp_path / "flips.png").convert("RGB"))
    assert picture.std() > 20
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (border == 255).all()


def test_engines_that_agree_can_be_drawn(flips):
    figure = draw_flips([replace(flips, b=flips.a)], CLASSES)
    assert "0% of the pixels, 0% weighted" in [text.get_text() for axes in figure.axes for text in axes.texts]


def test_what_cannot_be_drawn(flips):
    with pytest.raises(ConfigError, match="at least one image"):
        draw_flips([], CLASSES)
    with pytest.raises(ConfigError, match="sizes must be equal"):
        draw_flips([replace(flips, b=flips.b[:-1])], CLASSES)
    with pytest.raises(ConfigError, match="class id 12 in the labels"):
        draw_flips([replace(flips, a=np.full_like(flips.a, 12))], CLASSES)


def test_without_matplotlib(flips, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"agln-fast\[eval\]"):
        draw_flips([flips], CLASSES)
