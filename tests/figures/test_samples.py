"""The picture of samples: every image and every mask is on it, in the colours of the classes."""

from __future__ import annotations

import numpy as np
import pytest

from agln_fast.data.classes import ClassSet
from agln_fast.data.dataset import Sample
from agln_fast.errors import ConfigError
from agln_fast.figures.samples import draw_samples

CLASSES = ClassSet("mine", "Mine", ("sky", "road"), ((10, 20, 30), (200, 100, 0)))


def sample(height: int, width: int, label: int, name: str = "x") -> Sample:
    return Sample(np.full((height, width, 3), 77, np.uint8), np.full((height, width), label, np.uint8), name)


def test_image_and_mask_of_each_sample_side_by_side():
    samples = [sample(8, 16, 0, "a"), sample(40, 10, 1, "b" * 40), sample(8, 8, 255, "c")]
    figure = draw_samples(samples, CLASSES, title="my data")
    pictures = [axes for axes in figure.axes if axes.images]
    shown = [axes.images[0].get_array() for axes in pictures]
    assert [array[0, 0].tolist() for array in shown[::2]] == [[77] * 3] * 3
    assert [array[0, 0].tolist() for array in shown[1:4:2]] == [[10, 20, 30], [200, 100, 0]]
    for axes, array in zip(pictures, shown, strict=True):  # as the image is, and none is taller than its row
        box = axes.get_window_extent()
        assert box.height <= box.width * max(1, array.shape[0] / array.shape[1]) * 1.01
        assert box.height / figure.dpi < 1.91
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    for text in (
        "my data",
        "a",
        "16×8",
        f"…{'b' * 29}",
        "1 class",
        "0 classes, 100% ignored",
        "sky",
        "road",
        "ignored",
    ):
        assert text in texts


def test_nothing_to_draw_and_maps_that_do_not_fit():
    with pytest.raises(ConfigError, match="at least one"):
        draw_samples([], CLASSES)
    with pytest.raises(ConfigError, match="class id 2"):
        draw_samples([sample(8, 8, 2)], CLASSES)
