"""Latency against the rate of requests, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from agln_fast.errors import ConfigError, MissingPackageError
from agln_fast.figures.comparison import FAINT, INK, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_load"]

_SIZE = 6.4, 3.8  # inches
_TEXT, _HEADING = 8.0, 9.0  # points
_SHOWN = "p50", "p90", "p99"


def draw_load(
    trials: Sequence[tuple[float, dict[str, float]]],
    *,
    title: str,
    limit_ms: float | None = None,
    chosen: float | None = None,
) -> Figure:
    """A line for each of p50, p90 and p99, of several runs at a rate their mean; latency is logarithmic.

    Args:
        trials: offered rate, requests a second, and percentiles of latency in milliseconds by name; at least one.
        title: stands on top.
        limit_ms: drawn as a dashed line. chosen: the rate that holds it, drawn as a dotted one.

    Raises:
        ConfigError: no trial.
        MissingPackageError: matplotlib is not installed.
    """
    if not trials:
        raise ConfigError("a figure of load needs runs at a rate, one at least")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
    except ImportError:
        raise MissingPackageError("matplotlib", "load") from None
    figure = Figure(figsize=_SIZE, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_yscale("log")
    text: dict[str, Any] = {"fontsize": _TEXT, "color": INK}
    for name, colour in zip(_SHOWN, SERIES, strict=False):
        measured: dict[float, list[float]] = {}
        for rate, percentiles in trials:
            if name in percentiles:
                measured.setdefault(rate, []).append(percentiles[name])
        points = sorted((rate, fmean(values)) for rate, values in measured.items())
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.2)
            axes.annotate(
                name, points[-1], (6, 0), textcoords="offset points", va="center", fontsize=_TEXT, color=colour
            )
    if limit_ms is not None:
        axes.axhline(limit_ms, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(f"{limit_ms:g} ms", (0.01, limit_ms), xycoords=("axes fraction", "data"), va="bottom", **text)
    if chosen is not None:
        axes.axvline(chosen, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(f"{chosen:.3g}/s ", (chosen, 0.02), xycoords=("data", "axes fraction"), ha="right", **text)
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(labelsize=_TEXT - 1, colors=INK)
    axes.set_xlabel("requests a second, Poisson arrivals", **text)
    axes.set_ylabel("latency, ms", **text)
    axes.grid(True, which="major", linewidth=0.4, color=FAINT, alpha=0.4)
    axes.set_title(title, fontsize=_HEADING, fontweight="bold", color=INK, loc="left", parse_math=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
