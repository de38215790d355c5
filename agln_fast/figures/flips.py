"""Where two engines disagree: the pixels that flip from one class to another, weighted by how sure the first was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from agln_fast.data.classes import ClassSet
from agln_fast.data.dataset import IGNORE_INDEX
from agln_fast.errors import ConfigError, MissingPackageError
from agln_fast.figures.comparison import (
    CAPTION,
    Legend,
    Page,
    check_labels,
    class_colours,
    describe_score,
    panel_height,
)
from agln_fast.runtime.images import ImageArray
from agln_fast.runtime.result import Labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Flips", "draw_flips"]

_PANEL, _GAP = 2.0, 0.12
_COLUMNS = 5
_MAP_PIXELS = 400  # of a panel at 200 dpi: finer pixels would fall through the raster
_COLOURS = "YlOrRd"
_LIGHTEST = 0.25  # of the colour map: below, yellow is hard to tell from the paper


@dataclass(frozen=True, eq=False)
class Flips:
    """An image through two engines.

    image: (H, W, 3) uint8 RGB.
    truth: (H, W) class ids or IGNORE_INDEX, where nothing counts.
    a, b: (H, W) class ids.
    margin: (H, W) float32, how far A's first class is ahead of its second; ones where A cannot tell.
    """

    name: str
    image: ImageArray
    truth: Labels
    a: Labels
    b: Labels
    margin: npt.NDArray[np.float32]

    @property
    def counted(self) -> npt.NDArray[np.bool_]:
        """(H, W): the pixels that are not ignored."""
        return np.asarray(self.truth != IGNORE_INDEX)

    @property
    def flipped(self) -> npt.NDArray[np.bool_]:
        """(H, W): the counted pixels on which A and B disagree."""
        return np.asarray(self.counted & (self.a != self.b))

    @property
    def share(self) -> float:
        """Flipped pixels, of the counted ones, 0..1."""
        return float(self.flipped.sum() / max(1, self.counted.sum()))

    @property
    def weighted_share(self) -> float:
        """The same, each pixel weighted by its margin, 0..1; 0 where all margins are."""
        total = float(self.margin[self.counted].sum(dtype=np.float64))
        return float(self.margin[self.flipped].sum(dtype=np.float64)) / total if total > 0 else 0.0


def draw_flips(
    rows: Sequence[Flips], class_set: ClassSet, *, a: str = "A", b: str = "B", title: str = "", margin: str = "weight"
) -> Figure:
    """A row per image: the image, ground truth, A, B, and the flipped pixels coloured by A's margin.

    A flip where A was all but undecided is pale, one where it was sure is dark; the scale is one for all rows. Where an
    image has more pixels than a panel, a dot shows the largest margin beneath it, so that no flip is lost.

    Args:
        rows: the images.
        class_set: names and colours of the classes.
        a, b: names of the engines.
        title: lines above everything.
        margin: what the margin is, e.g. "difference of logits".

    Raises:
        ConfigError: no image, maps of another size than their image, or class ids outside the class set.
        MissingPackageError: matplotlib is not installed.
    """
    if not rows:
        raise ConfigError("a flip map needs at least one image")
    for row in rows:
        for labels in (row.truth, row.a, row.b):
            check_labels(labels, row.image, class_set)
    page = Page()
    width = _COLUMNS * _PANEL + (_COLUMNS - 1) * _GAP
    top = 0.0
    if title:
        for line in title.splitlines():
            page.text(0, top, line, bold=top == 0, faint=top > 0)
            top += 0.19
        top += 0.06
    # A few sure pixels must not make all others pale.
    margins = np.concatenate([row.margin[row.flipped] for row in rows])
    most = float(np.quantile(margins, 0.99)) if margins.size else 0.0
    most = most if most > 0 else 1.0
    num_classes = len(class_set.classes)
    for row in rows:
        height = panel_height(row.image, _PANEL)
        lefts = [column * (_PANEL + _GAP) for column in range(_COLUMNS)]
        top += CAPTION
        page.picture(lefts[0], top, _PANEL, height, row.image, row.name, f"{row.image.shape[1]}×{row.image.shape[0]}")
        for left, name, labels in ((lefts[1], "ground truth", row.truth), (lefts[2], a, row.a), (lefts[3], b, row.b)):
            remark = "" if labels is row.truth else describe_score(row.truth, labels, num_classes)
            colours = class_colours(labels, class_set)
            page.picture(left, top, _PANEL, height, colours, name, remark, interpolation="nearest")
        remark = f"{_percent(row.share)} of the pixels, {_percent(row.weighted_share)} weighted"
        page.picture(lefts[4], top, _PANEL, height, _map(row, most), "flipped", remark, interpolation="nearest")
        top += height + _GAP
    left = (_COLUMNS - 1) * (_PANEL + _GAP)
    scale = _colours(np.linspace(0, 1, 256)[None])
    page.picture(left, top + CAPTION, _PANEL, 0.1, scale, f"margin of {a}", f"{margin}, 0 to {most:.2g}", aspect="auto")
    Legend(class_set, chain.from_iterable((row.truth, row.a, row.b) for row in rows), left - _GAP).draw(
        page, 0, top + _GAP
    )
    # The page is as wide as its panels whatever the legend holds.
    page.text(width - 0.1, top, "")
    return page.figure()


def _map(row: Flips, most: float) -> ImageArray:
    """(h, w, 3): a pale grey image, and on it the flipped pixels in the colour of their margin."""
    height, width = row.flipped.shape
    block = -(-max(height, width) // _MAP_PIXELS)
    weight = np.where(row.flipped, np.clip(row.margin / most, 0, 1), -1).astype(np.float32)
    padded = np.pad(weight, ((0, -height % block), (0, -width % block)), constant_values=-1)
    rows, columns = padded.shape[0] // block, padded.shape[1] // block
    largest = padded.reshape(rows, block, columns, block).max((1, 3))
    grey = Image.fromarray(row.image).convert("L").resize((columns, rows), Image.Resampling.BILINEAR)
    pale = (215 + np.asarray(grey, np.float32) * (40 / 255)).astype(np.uint8)
    return np.where((largest >= 0)[..., None], _colours(np.maximum(largest, 0)), pale[..., None])


def _colours(weight: npt.NDArray[np.floating[Any]]) -> ImageArray:
    """(h, w) in 0..1 -> (h, w, 3) uint8."""
    try:
        import matplotlib
    except ImportError:
        raise MissingPackageError("matplotlib", "eval") from None
    colours = matplotlib.colormaps[_COLOURS](_LIGHTEST + (1 - _LIGHTEST) * weight, bytes=True)
    return np.asarray(colours, np.uint8)[..., :3]


def _percent(share: float) -> str:
    return "0%" if share == 0 else f"{share:.2%}" if share >= 0.0001 else "<0.01%"
