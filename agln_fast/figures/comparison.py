"""Segmentations side by side, in the manner of Fig. 6; and the page that pictures are laid out on.

Lengths are inches, `left` and `top` are measured from the top left corner of the page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from agln_fast.data.classes import ClassSet
from agln_fast.data.dataset import IGNORE_INDEX
from agln_fast.errors import ConfigError, MissingPackageError
from agln_fast.metrics import SegmentationMetrics
from agln_fast.runtime.images import ImageArray
from agln_fast.runtime.result import Labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "Example",
    "Legend",
    "Page",
    "check_labels",
    "class_colours",
    "describe_score",
    "draw_comparison",
    "main_errors",
    "panel_height",
]

INK, FAINT, EMPTY = "#202124", "#76787e", "#f1f1f3"
SERIES = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
"""Colours of lines side by side: those of Okabe and Ito, which colour-blind readers can tell apart."""

CAPTION = 0.32
"""Height of the two lines above a picture."""

_MARGIN, _GAP = 0.2, 0.12
_PANEL = 2.2
_TITLE_SIZE, _CAPTION_SIZE, _REMARK_SIZE = 9, 8, 7  # points
_IGNORED = (236, 236, 238)
_LONGEST_NAME = 22
_Mask: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Example:
    """A row of the comparison.

    image: (H, W, 3) uint8 RGB.
    truth: (H, W) class ids, IGNORE_INDEX where there is none; None if nobody labelled the image.
    predictions: (H, W) class ids, one map per network.
    name: stands above the image.
    """

    image: ImageArray
    truth: Labels | None
    predictions: Sequence[Labels]
    name: str = "input"


def draw_comparison(
    examples: Sequence[Example],
    networks: Sequence[str],
    class_set: ClassSet,
    *,
    alpha: float = 1.0,
    contours: bool = True,
    title: str = "",
) -> Figure:
    """A row per example: input, ground truth, and what each network sees, as Fig. 6; below, the classes that occur.

    Above a prediction stand its mIoU and pixel accuracy on that image.

    Args:
        examples: the rows; images may differ in size, and small ones are enlarged without blur.
        networks: the names of the columns, in the order of `Example.predictions`.
        class_set: names and colours of the classes.
        alpha: from 0, the image alone, to 1, the colours alone.
        contours: whether white dashed lines mark the larger regions where a network is wrong (`main_errors`).
        title: a line above everything.

    Raises:
        ConfigError: no example, as many predictions as names nowhere, maps of another size than their image, class ids
            outside the class set, or `alpha` outside 0..1.
        MissingPackageError: matplotlib is not installed.
    """
    if not examples:
        raise ConfigError("a comparison needs at least one example")
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha {alpha}: must be from 0 to 1")
    for example in examples:
        if len(example.predictions) != len(networks):
            raise ConfigError(f"{example.name}: {len(example.predictions)} predictions for {len(networks)} networks")
        for labels in _maps(example):
            check_labels(labels, example.image, class_set)

    page = Page()
    width = _PANEL * (2 + len(networks)) + _GAP * (1 + len(networks))
    top = 0.0
    if title:
        page.text(0, top, title)
        top += 0.25
    for example in examples:
        height = panel_height(example.image, _PANEL)
        lefts = (column * (_PANEL + _GAP) for column in range(2 + len(networks)))
        top += CAPTION
        size = f"{example.image.shape[1]}×{example.image.shape[0]}"
        page.picture(next(lefts), top, _PANEL, height, example.image, example.name, size)
        if example.truth is None:
            page.note(next(lefts), top, _PANEL, height, "no ground truth")
        else:
            colours = class_colours(example.truth, class_set, example.image, alpha)
            page.picture(next(lefts), top, _PANEL, height, colours, "ground truth", interpolation="nearest")
        for name, labels, left in zip(networks, example.predictions, lefts, strict=True):
            colours = class_colours(labels, class_set, example.image, alpha)
            remark, wrong = "", None
            if example.truth is not None:
                remark = describe_score(example.truth, labels, len(class_set.classes))
                wrong = main_errors(example.truth, labels) if contours else None
            page.picture(left, top, _PANEL, height, colours, name, remark, outline=wrong, interpolation="nearest")
        top += height + _GAP
    legend = Legend(class_set, chain.from_iterable(map(_maps, examples)), width)
    legend.draw(page, 0, top + _GAP)
    return page.figure()


def _maps(example: Example) -> list[Labels]:
    return [*([] if example.truth is None else [example.truth]), *example.predictions]


def check_labels(labels: Labels, image: ImageArray, class_set: ClassSet) -> None:
    """Refuse a map (H, W) that does not lie on `image` (H, W, 3), or has ids that are neither classes nor ignored.

    Raises:
        ConfigError: it is so.
    """
    if labels.shape != image.shape[:2]:
        raise ConfigError(f"labels of shape {labels.shape} on an image of shape {image.shape}: sizes must be equal")
    known = len(class_set.classes)
    strange = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= known))]
    if strange.size:
        raise ConfigError(f"class id {strange[0]} in the labels: class set {class_set.name!r} has {known} classes")


def class_colours(
    labels: Labels, class_set: ClassSet, image: ImageArray | None = None, alpha: float = 1.0
) -> ImageArray:
    """(H, W) class ids -> (H, W, 3) uint8 RGB, blended over `image` (H, W, 3); ignored pixels are light grey."""
    table = np.full((max(IGNORE_INDEX + 1, len(class_set.palette)), 3), _IGNORED, np.uint8)
    table[: len(class_set.palette)] = class_set.palette
    colours = table[labels]
    if image is None or alpha == 1:
        return colours
    return np.array(Image.blend(Image.fromarray(image), Image.fromarray(colours), alpha))


def describe_score(truth: Labels, labels: Labels, num_classes: int) -> str:
    """mIoU and pixel accuracy of one image, in words."""
    metrics = SegmentationMetrics(num_classes)
    metrics.update(labels, truth)
    if math.isnan(metrics.pixel_accuracy):
        return "nothing is labelled"
    return f"mIoU {metrics.mean_iou:.1%}, pixels {metrics.pixel_accuracy:.1%}"


def main_errors(truth: Labels, labels: Labels) -> _Mask:
    """(H, W) bool: the larger regions where `labels` contradicts `truth`.

    It is the opening of the set of wrong pixels with a square of 1/24 of the shorter side, at least 3 pixels: errors
    that are thinner, such as a class boundary that is off by a few pixels, do not count.
    """
    wrong = (truth != IGNORE_INDEX) & (truth != labels)
    side = min(max(3, min(wrong.shape) // 24), *wrong.shape)
    inside = _window_sums(wrong, side) == side**2
    errors: _Mask = _window_sums(np.pad(inside, side - 1), side) > 0
    return errors


def _window_sums(mask: _Mask, side: int) -> npt.NDArray[np.int64]:
    """How many pixels of `mask` (H, W) are True in each window: (H - side + 1, W - side + 1)."""
    sums = np.pad(mask.cumsum(0, np.int64).cumsum(1), ((1, 0), (1, 0)))
    windows: npt.NDArray[np.int64] = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side]
    windows += sums[:-side, :-side]
    return windows


def panel_height(image: ImageArray, width: float) -> float:
    """Height of a panel that shows `image` (H, W, 3) at this width; panoramas and towers do not fill theirs."""
    ratio: float = image.shape[0] / image.shape[1]
    return width * min(max(ratio, 0.3), 2.5)


class Page:
    """A figure whose size follows from what is laid on it."""

    def __init__(self) -> None:
        self._boxes: list[tuple[float, float, float, float, Callable[[Axes], object]]] = []

    def _place(self, left: float, top: float, width: float, height: float, draw: Callable[[Axes], object]) -> None:
        self._boxes.append((left, top, width, height, draw))

    def picture(
        self,
        left: float,
        top: float,
        width: float,
        height: float,
        pixels: npt.NDArray[Any],
        caption: str,
        remark: str = "",
        *,
        outline: _Mask | None = None,
        **options: Any,
    ) -> None:
        """(h, w, 3) colours, or (h, w) numbers under a colour map, with two lines above; `options` are of `imshow`."""

        def draw(axes: Axes) -> None:
            axes.imshow(pixels, **options)
            for spine in axes.spines.values():
                spine.set(linewidth=0.5, color=FAINT)
            if outline is not None and outline.any():
                _draw_outline(axes, outline)
            for text, height, size, colour in (
                (caption, 11.5, _CAPTION_SIZE, INK),
                (remark, 3, _REMARK_SIZE, FAINT),
            ):
                place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
                axes.annotate(text, (0, 1), xytext=(0, height), fontsize=size, color=colour, parse_math=False, **place)

        self._place(left, top, width, height, draw)

    def note(self, left: float, top: float, width: float, height: float, text: str) -> None:
        """An empty cell that says why it is empty."""

        def draw(axes: Axes) -> None:
            axes.set_facecolor(EMPTY)
            for spine in axes.spines.values():
                spine.set_visible(False)
            axes.text(0.5, 0.5, text, fontsize=_REMARK_SIZE, color=FAINT, ha="center", va="center")

        self._place(left, top, width, height, draw)

    def text(self, left: float, top: float, text: str, *, bold: bool = False, faint: bool = False) -> None:
        """Lines of text; `top` is that of the first."""

        def draw(axes: Axes) -> None:
            axes.set_axis_off()
            style: dict[str, Any] = {"weight": "bold", "fontsize": _TITLE_SIZE} if bold else {"fontsize": _REMARK_SIZE}
            colour = FAINT if faint else INK
            axes.text(0, 1, text, color=colour, va="top", linespacing=1.5, parse_math=False, **style)

        self._place(left, top, 0.1, 0.1, draw)

    def swatch(self, left: float, top: float, side: float, colour: tuple[int, int, int], name: str) -> None:
        """A square in a class's colour, and its name beside it."""

        def draw(axes: Axes) -> None:
            axes.set_facecolor("#{:02x}{:02x}{:02x}".format(*colour))
            for spine in axes.spines.values():
                spine.set(linewidth=0.5, color=FAINT)
            axes.text(1.5, 0.45, name, fontsize=_REMARK_SIZE, color=INK, va="center", parse_math=False)

        self._place(left, top, side, side, draw)

    def figure(self) -> Figure:
        """Draw everything.

        Raises:
            MissingPackageError: matplotlib is not installed.
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError:
            raise MissingPackageError("matplotlib", "eval") from None
        page_width = max(left + width for left, _, width, _, _ in self._boxes) + 2 * _MARGIN
        page_height = max(top + height for _, top, _, height, _ in self._boxes) + 2 * _MARGIN
        figure = Figure(figsize=(page_width, page_height), facecolor="white")
        FigureCanvasAgg(figure)
        for left, top, width, height, draw in self._boxes:
            bottom = page_height - _MARGIN - top - height
            box = (_MARGIN + left) / page_width, bottom / page_height, width / page_width, height / page_height
            draw(figure.add_axes(box, xticks=[], yticks=[]))
        return figure


def _draw_outline(axes: Axes, mask: _Mask) -> None:
    """White dashes on a dark line around the True pixels of `mask` (H, W): visible on every colour."""
    height, width = mask.shape
    x, y = np.arange(-1, width + 1), np.arange(-1, height + 1)
    padded = np.pad(mask, 1).astype(np.float64)
    axes.contour(x, y, padded, levels=[0.5], colors=INK, linewidths=1.6)
    axes.contour(x, y, padded, levels=[0.5], colors="white", linewidths=0.9, linestyles="dashed")
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


class Legend:
    """The classes that occur in some maps, in columns of equal width; the class with the most pixels first."""

    _PITCH, _SIDE = 0.2, 0.12

    def __init__(self, class_set: ClassSet, maps: Iterable[Labels], width: float, rows: int = 6) -> None:
        """`maps`: (H, W) class ids each; `width`: of the legend; `rows`: the most there may be."""
        size = max(IGNORE_INDEX + 1, len(class_set.classes))
        counts = sum((np.bincount(labels.reshape(-1), minlength=size) for labels in maps), np.zeros(size, np.int64))
        largest_first = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
        self.names = [class_set.classes[i] if i < len(class_set.classes) else "ignored" for i in largest_first]
        shown = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in self.names]
        self._pitch = 0.4 + 0.062 * max(map(len, shown))
        self._columns = max(1, int(width / self._pitch))
        colours = class_colours(np.array(largest_first, np.int32)[None], class_set)[0]
        room = self._columns * rows
        entries = [
            (name, (int(red), int(green), int(blue))) for name, (red, green, blue) in zip(shown, colours, strict=True)
        ]
        self._rest = len(entries) - room + 1 if len(entries) > room else 0
        self._entries = entries[: room - 1] if self._rest else entries

    def draw(self, page: Page, left: float, top: float) -> None:
        """Lay it on the page."""
        for index, (name, colour) in enumerate(self._entries):
            row, column = divmod(index, self._columns)
            page.swatch(left + column * self._pitch, top + row * self._PITCH, self._SIDE, colour, name)
        if self._rest:
            row, column = divmod(len(self._entries), self._columns)
            page.text(left + column * self._pitch, top + row * self._PITCH, f"+ {self._rest} more", faint=True)
