"""The picture of a confusion matrix."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from agln_fast.data.classes import class_set
from agln_fast.errors import ConfigError, MissingPackageError
from agln_fast.figures.confusion import draw_confusion
from agln_fast.figures.saving import save_figure


def _matrix(count: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.integers(0, 50, (count, count)) + np.diag(random.integers(500, 5000, count))


def test_numbers_are_shares_of_the_row():
    """Rows 3 : 1 and 0 : 0 and 1 : 199: per cent, nothing in an empty row, nothing below half a per cent."""
    figure = draw_confusion(np.array([[3, 1, 0], [0, 0, 0], [1, 0, 999]]), ["a", "b", "c"])
    numbers = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert numbers == {(0, 0): "75", (1, 0): "25", (2, 2): "100"}
    shown = figure.axes[0].images[0].get_array()
    assert shown.mask.tolist() == [[False] * 3, [True] * 3, [False] * 3]
    assert shown[2, 0] == 1 / 1000


def test_rows_are_the_truth_from_top_to_bottom():
    axes = draw_confusion(_matrix(12), class_set("scenes").classes, title="a $title$ of\ntwo lines").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(class_set("scenes").classes)
    assert axes.get_ylabel() == "ground truth"
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


@pytest.mark.parametrize(("name", "most"), [("scenes", 1600), ("ade20k", 4200)])
def test_every_name_lies_on_the_page(name, most, tmp_path):
    classes = class_set(name).classes
    figure = draw_confusion(_matrix(len(classes)), classes, title="x")
    save_figure(figure, tmp_path / "x.png")
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    assert max(picture.shape) < most
    assert picture.std() > 10
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (border == 255).all()
    figure.canvas.draw()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert all(box.y0 > 0 and box.x0 > 0 for box in boxes)
    assert all(left.x1 <= right.x0 for left, right in pairwise(boxes)), "names overlap"


@pytest.mark.parametrize("shape", [(2, 2), (3, 2)], ids=str)
def test_names_must_fit(shape):
    with pytest.raises(ConfigError, match="for 3 class names"):
        draw_confusion(np.zeros(shape, int), ["a", "b", "c"])


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match=r"agln-fast\[eval\]"):
        draw_confusion(_matrix(3), ["a", "b", "c"])
