"""The errors of blocks along a network, engines side by side, as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from agln_fast.errors import ConfigError, MissingPackageError
from agln_fast.figures.comparison import EMPTY, FAINT, INK, SERIES
from agln_fast.plan.blocks import SCALES, Block

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from agln_fast.runtime.blocks import EngineBlocks

__all__ = ["draw_blocks"]

_ROW, _WIDTH = 0.165, 4.6  # inches
_LEFT, _RIGHT, _TOP, _BOTTOM = 2.75, 0.65, 0.75, 0.5
_TEXT, _HEADING = 7.5, 9.0  # points
_LEGEND_ROW, _LEGEND_COLUMNS = 0.17, 2
_SMALLEST = 1e-9  # what is drawn of an error


def draw_blocks(engines: Sequence[EngineBlocks], *, title: str) -> Figure:
    """A row for each block, in the order in which they are computed, and a line for each engine: ‖x − r‖₂ / ‖r‖₂.

    A dashed line is the bound of a precision. A ring marks the first block of an engine that is above its bound. Where
    a block is inside a rewrite, the engine has no point, and its line is dotted. An error that is not finite stands at
    the right edge.

    Args:
        engines: of one network; at least one.
        title: stands on top.

    Raises:
        ConfigError: no engine, or engines of different networks.
        MissingPackageError: matplotlib is not installed.
    """
    blocks = [each.block for each in engines[0].errors] if engines else []
    if not blocks or any([each.block for each in engine.errors] != blocks for engine in engines):
        raise ConfigError("a figure of blocks needs engines of one network, one at least")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib", "eval") from None
    legend = _LEGEND_ROW * math.ceil((len(engines) + 1) / _LEGEND_COLUMNS) + 0.1
    tall, high = _ROW * len(blocks), _ROW * len(blocks) + _TOP + _BOTTOM + legend
    wide = _LEFT + _WIDTH + _RIGHT
    figure = Figure(figsize=(wide, high), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((_LEFT / wide, (_BOTTOM + legend) / high, _WIDTH / wide, tall / high))
    _frame(axes, blocks)
    limits = _limits(engines)
    axes.set_xlim(*limits)
    for colour, engine in zip(_colours(len(engines)), engines, strict=True):
        _draw_engine(axes, engine, colour, limits[1])
    for bound, precisions in _bounds(engines):
        axes.axvline(bound, color=INK, linewidth=0.7, linestyle=(0, (4, 3)), zorder=1)
        axes.text(bound, -1.0, f"{bound:.3g}\n{precisions}", ha="center", va="bottom", fontsize=6.5, color=INK)
    axes.plot([], [], "o", markersize=8, color=INK, markerfacecolor="none", label="first block above the bound")
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.02, 0.0), "ncols": _LEGEND_COLUMNS}
    figure.legend(fontsize=_TEXT, frameon=False, labelcolor=INK, handlelength=2.0, **place)
    figure.text(
        0.02, 1 - 0.09 / high, title, fontsize=_HEADING, fontweight="bold", color=INK, va="top", parse_math=False
    )
    return figure


def _frame(axes: Axes, blocks: Sequence[Block]) -> None:
    style: dict[str, Any] = {"fontsize": _TEXT, "color": INK}
    axes.set_xscale("log")
    axes.set_ylim(len(blocks) - 0.5, -0.5)
    axes.set_yticks(range(len(blocks)), [block.title for block in blocks], **style)
    axes.set_xlabel("relative error, ‖x − r‖₂ / ‖r‖₂", **style, labelpad=2)
    axes.tick_params(which="both", labelsize=_TEXT, labelcolor=INK, color=FAINT, length=2, width=0.5, pad=2)
    axes.tick_params(axis="y", length=0)
    for side, spine in axes.spines.items():
        spine.set(linewidth=0.5, color=FAINT, visible=side in ("left", "bottom"))
    axes.grid(axis="x", color="white", linewidth=0.8)
    axes.set_axisbelow(True)
    place = -0.5
    for number, (part, members) in enumerate(groupby(blocks, _part)):
        count = len(list(members))
        axes.axhspan(place, place + count, color=EMPTY if number % 2 == 0 else "#e7e8ec", linewidth=0, zorder=0)
        axes.text(1.015, place + count / 2, part, transform=axes.get_yaxis_transform(), va="center", **style)
        place += count


def _part(block: Block) -> str:
    """Of the network, for the right margin."""
    first, *rest = block.name.split(".")
    if first == "encoder" or block.name == "decoder.reduce":
        return "encoder"
    return SCALES[int(rest[1])] if rest else "head"


def _limits(engines: Sequence[EngineBlocks]) -> tuple[float, float]:
    """Powers of ten around all that is finite, and the bounds."""
    shown = [each.error for engine in engines for each in engine.errors if each.error is not None]
    values = [engine.bound for engine in engines] + [value for value in shown if math.isfinite(value)]
    values = [max(value, _SMALLEST) for value in values]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return 10.0**low, 10.0 ** max(high, low + 1)


def _colours(count: int) -> list[str]:
    return [SERIES[number % len(SERIES)] for number in range(count)]


def _bounds(engines: Sequence[EngineBlocks]) -> Iterator[tuple[float, str]]:
    """Each bound, and whose it is."""
    for bound in sorted({engine.bound for engine in engines}):
        if bound > 0:
            yield bound, ", ".join(dict.fromkeys(engine.precision for engine in engines if engine.bound == bound))


def _draw_engine(axes: Axes, engine: EngineBlocks, colour: str, right: float) -> None:
    drawn = [math.nan if each.error is None else min(max(each.error, _SMALLEST), right) for each in engine.errors]
    rows = np.arange(len(drawn))
    there = ~np.isnan(drawn)
    axes.plot(np.array(drawn)[there], rows[there], ":", color=colour, linewidth=0.7, zorder=2)
    style: dict[str, Any] = {"linewidth": 1.0, "markersize": 2.6, "zorder": 3, "clip_on": False}
    axes.plot(drawn, rows, "o-", color=colour, label=engine.engine, **style)
    if engine.first is not None:
        row = engine.errors.index(engine.first)
        axes.plot(drawn[row], row, "o", markersize=8, color=colour, markerfacecolor="none", zorder=4, clip_on=False)
