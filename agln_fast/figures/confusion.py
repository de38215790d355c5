"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from agln_fast.errors import ConfigError, MissingPackageError
from agln_fast.figures.comparison import EMPTY, FAINT, INK

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_confusion"]

_NUMBERS = 30  # the most classes whose cells have room for a number
_LONGEST_NAME = 22
_TICKS = (0, 0.01, 0.05, 0.2, 0.5, 1)


def draw_confusion(matrix: npt.NDArray[np.int64], classes: Sequence[str], *, title: str = "") -> Figure:
    """Row k shows what becomes of the pixels of class k: the share of them that gets each label.

    The colour goes with the square root of the share, so that a confusion of 1 % is visible; up to 30 classes, numbers
    say per cent. A class without pixels has an empty row.

    Args:
        matrix: (K, K) pixels, rows are true classes, columns labels.
        classes: K names.
        title: lines above.

    Raises:
        ConfigError: shapes that do not fit.
        MissingPackageError: matplotlib is not installed.
    """
    count = len(classes)
    if matrix.shape != (count, count) or not count:
        raise ConfigError(f"confusion matrix of shape {matrix.shape} for {count} class names")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib", "eval") from None
    cell, font = (0.42, 8.0) if count <= _NUMBERS else (0.105, 5.5)
    side = max(3.0, cell * count)
    names = [name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…" for name in classes]
    room = 0.5 + 0.0095 * font * max(map(len, names))  # of the names, inches
    heading = 0.2 * (title.count("\n") + 1) if title else 0
    width, height = room + side + 0.95, 0.3 + heading + side + room
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((room / width, room / height, side / width, side / height), facecolor=EMPTY)

    pixels = matrix.sum(1, keepdims=True)
    shares = np.ma.masked_where(np.broadcast_to(pixels == 0, matrix.shape), matrix / np.maximum(pixels, 1))
    picture = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest", aspect="equal")
    if count <= _NUMBERS:
        for (i, j), share in np.ndenumerate(shares.filled(0)):
            if share >= 0.005:
                colour = "white" if share > 0.4 else INK
                axes.text(j, i, f"{share:.0%}"[:-1], ha="center", va="center", fontsize=font - 1, color=colour)
    style: dict[str, Any] = {"fontsize": font, "color": INK, "parse_math": False}
    axes.set_xticks(range(count), names, rotation=90, **style)
    axes.set_yticks(range(count), names, **style)
    axes.tick_params(length=0, pad=3)
    between = np.arange(1, count) - 0.5
    for lines in (axes.hlines, axes.vlines):
        lines(between, -0.5, count - 0.5, colors="white", linewidth=0.06 * font)
    for spine in axes.spines.values():
        spine.set(linewidth=0.5, color=FAINT)
    larger = 9.0 if count <= _NUMBERS else 14.0
    axes.set_xlabel("label", fontsize=larger, color=INK)
    axes.set_ylabel("ground truth", fontsize=larger, color=INK)
    if title:
        axes.set_title(title, fontsize=larger, color=INK, loc="left", pad=8, parse_math=False)

    bar = figure.add_axes(((room + side + 0.15) / width, room / height, 0.14 / width, side / height))
    scale = figure.colorbar(picture, cax=bar, ticks=_TICKS)
    scale.ax.set_yticklabels([f"{tick:.0%}" for tick in _TICKS], fontsize=max(7.0, font), color=INK)
    scale.ax.tick_params(length=2, color=FAINT)
    scale.outline.set(linewidth=0.5, edgecolor=FAINT)
    return figure
