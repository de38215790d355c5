"""Latency against the rate of requests, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
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
    """A line for each of p50, p90 and p99; both axes are logarithmic.

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
        from matplotlib.ticker import FuncFormatter, NullFormatter
    except ImportError:
        raise MissingPackageError("matplotlib", "load") from None
    figure = Figure(figsize=_SIZE, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name, colour in zip(_SHOWN, SERIES, strict=False):
        points = sorted((rate, percentiles[name]) for rate, percentiles in trials if name in percentiles)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.2, label=name)
    text: dict[str, Any] = {"fontsize": _TEXT, "color": INK}
    if limit_ms is not None:
        axes.axhline(limit_ms, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axes.annotate(f"{limit_ms:g} ms", (0.01, limit_ms), xycoords=("axes fraction", "data"), va="bottom", **text)
    if chosen is not None:
        axes.axvline(chosen, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.annotate(f"{chosen:.0f}/s", (chosen, 0.02), xycoords=("data", "axes fraction"), ha="right", **text)
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
        axis.set_minor_formatter(plain if axis is axes.xaxis and len(trials) > 1 else NullFormatter())
    axes.tick_params(which="both", labelsize=_TEXT - 1, colors=INK)
    for label in axes.get_xticklabels(which="minor"):
        label.set_visible(False)
    axes.set_xlabel("requests a second, Poisson arrivals", **text)
    axes.set_ylabel("latency, ms", **text)
    axes.grid(True, which="major", linewidth=0.4, color=FAINT, alpha=0.4)
    axes.legend(fontsize=_TEXT, frameon=False, labelcolor=INK, loc="upper left")
    axes.set_title(title, fontsize=_HEADING, fontweight="bold", color=INK, loc="left", parse_math=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
