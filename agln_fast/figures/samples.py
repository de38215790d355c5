"""Samples of a dataset beside their masks, to see at a glance whether the two belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from agln_fast.data.classes import ClassSet
from agln_fast.data.dataset import IGNORE_INDEX, Sample
from agln_fast.errors import ConfigError
from agln_fast.figures.comparison import CAPTION, Legend, Page, check_labels, class_colours, panel_height

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_samples"]

_PANEL, _GAP, _BETWEEN = 1.9, 0.06, 0.3
_COLUMNS = 2
_LONGEST = 30  # characters above a picture


def draw_samples(samples: Sequence[Sample], class_set: ClassSet, *, title: str = "") -> Figure:
    """Two samples a row, each an image and its mask in the classes' colours; below, the classes that occur.

    Args:
        samples: of any sizes; small ones are enlarged without blur.
        class_set: names and colours of the classes.
        title: a line above everything.

    Raises:
        ConfigError: no sample, labels of another size than their image, or class ids outside the class set.
        MissingPackageError: matplotlib is not installed.
    """
    if not samples:
        raise ConfigError("a picture of samples needs at least one")
    for sample in samples:
        check_labels(sample.labels, sample.image, class_set)
    page, top = Page(), 0.0
    if title:
        page.text(0, top, title, bold=True)
        top += 0.25
    pitch = 2 * _PANEL + _GAP + _BETWEEN
    for start in range(0, len(samples), _COLUMNS):
        row = samples[start : start + _COLUMNS]
        top += CAPTION
        for column, sample in enumerate(row):
            left, (width, height) = column * pitch, _panel(sample)
            size = f"{sample.image.shape[1]}×{sample.image.shape[0]}"
            page.picture(left, top, width, height, sample.image, _short(sample.name), size)
            colours = class_colours(sample.labels, class_set)
            page.picture(
                left + _PANEL + _GAP, top, width, height, colours, "mask", _describe(sample), interpolation="nearest"
            )
        top += max(_panel(sample)[1] for sample in row) + 2 * _GAP
    legend = Legend(class_set, (sample.labels for sample in samples), 2 * pitch - _BETWEEN)
    legend.draw(page, 0, top + 2 * _GAP)
    return page.figure()


def _panel(sample: Sample) -> tuple[float, float]:
    """Width and height of its panels, which fit into a square."""
    height = panel_height(sample.image, _PANEL)
    return (_PANEL, height) if height <= _PANEL else (_PANEL * _PANEL / height, _PANEL)


def _describe(sample: Sample) -> str:
    labels = sample.labels
    ignored = float((labels == IGNORE_INDEX).mean())
    count = int((np.bincount(labels.reshape(-1), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX] > 0).sum())
    classes = f"{count} class{'' if count == 1 else 'es'}"
    return f"{classes}, {ignored:.0%} ignored" if ignored else classes


def _short(name: str) -> str:
    """Its end, which tells files apart."""
    return name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
