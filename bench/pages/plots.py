"""The suite's figures, 7.16 inches wide (two columns of a journal): latency, ladder, Pareto, scaling.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart. Sizes are inches, fonts 8 and 9 points.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agln_fast.bench.pages.presentation import (
    Rung,
    Series,
    by_case,
    case_names,
    digits,
    ladder_steps,
    ladders,
    scaling_series,
)
from agln_fast.bench.race.rows import Row
from agln_fast.errors import ConfigError, MissingPackageError
from agln_fast.figures.comparison import FAINT, INK, SERIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_ladder", "draw_latency", "draw_pareto", "draw_scaling"]

OURS = "#D55E00"
_PEER = "#75787d"
_DARKEST, _LIGHTEST = 0.36, 0.78  # grey levels of peers
_MARKERS = "osD^vP*"
_PRECISIONS = {"fp32": "#0072B2", "tf32": "#56B4E9", "bf16": "#D55E00", "fp16": "#E69F00", "int8": "#009E73"}
# The longest prefix first.
_FAMILIES = {"agln_lite": ("AGLN-Lite", "^"), "agln": ("AGLN", "s"), "fpn": ("FPN", "o"), "fcn8s": ("FCN-8s", "D")}
_DASHED: dict[str, Any] = {"linewidth": 0.8, "linestyle": (0, (4, 3))}
_TABLE_VIII = Path(__file__).with_name("table_viii.json")

_WIDTH = 7.16
_TEXT, _HEADING = 8.0, 9.0  # points
_NUMBER = 0.42  # beyond a bar, for its number
_BAR = 0.19  # from one bar to the next
_LONGEST_RUNG = 44  # letters of a line


def draw_latency(rows: Sequence[Row]) -> Figure:
    """A bar for each contestant of each case, the fastest on top, fp32 left and reduced precision right; ms at the end.

    Ours are in colour, each peer has its shade of grey throughout. A thin line goes from the median to the 95th
    percentile. Each panel has a scale of its own, from 0.

    Raises:
        ConfigError: no rows.
        MissingPackageError: matplotlib is not installed.
    """
    halves = [[row for row in rows if (row.precision == "fp32") == full] for full in (True, False)]
    titles = "fp32", "reduced precision"
    panels = [(title, half) for title, half in zip(titles, halves, strict=True) if half]
    if not panels:
        raise ConfigError("a figure of latencies needs at least one row")
    shared, names = case_names(by_case(rows))
    greys = _greys(rows)
    # A case has as many lines in one panel as in the other, so that its headings stand on one level.
    lines = {case: 1 + max(len(by_case(half).get(case, [])) for _, half in panels) for case in by_case(rows)}
    height = _BAR * (sum(lines.values()) + 0.3 * (len(lines) - 1))
    top, bottom = 0.5, 0.62
    figure = _figure(_WIDTH, top + height + bottom)
    rooms = [0.14 + max(_inches(_label(row, title != "fp32")) for row in half) for title, half in panels]
    width, left = (_WIDTH - sum(rooms) - 0.2 * len(panels)) / len(panels), 0.05
    for (title, half), room in zip(panels, rooms, strict=True):
        axes = _axes(figure, left + room, top, width, height)
        position, ticks = 0.0, {}
        for case, count in lines.items():
            members = sorted(by_case(half).get(case, []), key=lambda row: row.median_ms)
            axes.text(-room / width, position, names[case], transform=_rows(axes), **_words(bold=True))
            for number, row in enumerate(members, 1):
                y = position + number
                axes.barh(y, row.median_ms, 0.72, color=OURS if row.ours else greys[row.contestant])
                axes.plot([row.median_ms, row.p95_ms], [y, y], color=INK, linewidth=0.8, solid_capstyle="butt")
                _end(axes, max(row.median_ms, row.p95_ms), y, digits(row.median_ms), bold=row.ours)
                ticks[y] = _label(row, title != "fp32")
            position += count + 0.3
        _bars(axes, ticks, position - 0.3)
        axes.set_xlim(0, max(row.p95_ms for row in half) * width / (width - _NUMBER))
        axes.set_xlabel("ms", fontsize=_TEXT, color=INK, labelpad=2)
        _title(axes, title)
        left += room + width + 0.2
    _caption(figure, shared)
    patches = {"ours": _patch(OURS), "peers": _patch(_PEER), "median to 95th percentile": _line(INK, linewidth=0.8)}
    _legend(figure, patches, columns=3)
    return figure


def draw_ladder(rows: Sequence[Row]) -> Figure:
    """From the best peer down, a bar for each rung, and at its end ms, and how many times as fast as the rung above and
    as the peer; a panel for each case and precision.

    Raises:
        ConfigError: no rows.
        MissingPackageError: matplotlib is not installed.
    """
    if not rows:
        raise ConfigError("a ladder needs at least one row")
    shared, names = case_names(by_case(rows))
    panels = {f"{names[case]}, {kind}": ladder_steps(members) for (case, kind), members in ladders(rows).items()}
    heights = [_BAR * 1.25 * (len(rungs) + 0.2) for rungs in panels.values()]
    gap, top = 0.65, 0.5
    figure = _figure(_WIDTH, top + sum(heights) + gap * (len(heights) - 1) + 0.45)
    labels = {rung.name: _rung_label(rung) for rungs in panels.values() for rung in rungs}
    room = 0.14 + max(_inches(line) for label in labels.values() for line in label.split("\n"))
    for (title, rungs), height in zip(panels.items(), heights, strict=True):
        width = _WIDTH - room - 1.3
        axes = _axes(figure, room, top, width, height)
        top += height + gap
        for y, rung in enumerate(rungs):
            row = rung.row
            axes.barh(y, row.median_ms, 0.7, color=OURS if row.ours else _PEER)
            _end(axes, row.median_ms, y, digits(row.median_ms), bold=True)
            for right, ratio in ((0.6, rung.step), (1.2, rung.total)):
                words = f"×{ratio:.2f}"
                axes.text(1 + right / width, y, words, transform=_rows(axes), ha="right", **_words(bold=right > 1))
        for right, words in ((0.6, "step"), (1.2, "total")):
            style = _words(bold=False, colour=FAINT)
            axes.text(1 + right / width, -0.95, words, transform=_rows(axes), ha="right", **style)
        _bars(axes, {y: labels[rung.name] for y, rung in enumerate(rungs)}, len(rungs) - 0.4, first=-0.6)
        axes.set_xlim(0, max(rung.row.median_ms for rung in rungs) * width / (width - _NUMBER))
        axes.set_xlabel("ms", fontsize=_TEXT, color=INK, labelpad=2)
        _title(axes, title)
    _caption(figure, shared)
    return figure


def _rung_label(rung: Rung) -> str:
    """On two lines at most: those without effect are counted where their names take more."""
    lines = textwrap.wrap(rung.name, _LONGEST_RUNG)
    return f"{len(rung.rewrites)} more, no effect" if rung.neutral and len(lines) > 2 else "\n".join(lines)


def draw_pareto(rows: Sequence[Row]) -> Figure:
    """Left: latency against mIoU of the trained networks, each its own, the line through what nothing beats in both.
    Right: Table VIII.

    Markers are families, on both sides; colours precisions; peers are hollow. Rows without mIoU are left out.

    Raises:
        ConfigError: no row has mIoU.
        MissingPackageError: matplotlib is not installed.
    """
    points = [(row, row.median_ms, row.miou) for row in rows if row.miou is not None]
    measured = [row for row, _, _ in points]
    if not points:
        raise ConfigError("a figure of latency and mIoU needs rows with mIoU")
    height, top = 2.9, 0.32
    figure = _figure(_WIDTH, top + height + 1.0)
    axes = _axes(figure, 0.58, top, 2.85, height)
    front = _front([(ms, miou) for _, ms, miou in points])
    axes.plot(*zip(*front, strict=True), color=FAINT, linewidth=0.8, drawstyle="steps-post", zorder=1)
    for row, ms, miou in sorted(points, key=lambda point: point[0].ours):
        colour = _PRECISIONS.get(row.precision, INK)
        face = colour if row.ours else "white"
        marker = _family(row.network)[1]
        axes.plot(ms, miou, marker, color=colour, markerfacecolor=face, markersize=5, markeredgewidth=1)
    axes.set_xscale("log")
    _log_ticks(axes.xaxis)
    axes.margins(y=0.08)
    axes.set_xlabel(f"ms, {case_names(by_case(measured))[0]}", fontsize=_TEXT, color=INK)
    axes.set_ylabel("mIoU, %", fontsize=_TEXT, color=INK)
    _title(axes, "(a) measured")
    _draw_table_viii(figure, 4.05, top, height)
    families = dict(_family(row.network) for row in measured) | dict(_FAMILIES.values())
    precisions = [name for name in _PRECISIONS if any(row.precision == name for row in measured)]
    precisions += sorted({row.precision for row in measured} - set(precisions))
    entries = {name: _line(INK, marker=marker, linestyle="") for name, marker in families.items()}
    entries |= {name: _patch(_PRECISIONS.get(name, INK)) for name in precisions}
    entries["peer"] = _line(INK, marker="o", linestyle="", markerfacecolor="white")
    entries["Pareto front"] = _line(FAINT, linewidth=0.8)
    _legend(figure, entries, columns=-(-len(entries) // 2))
    return figure


def draw_scaling(rows: Sequence[Row]) -> Figure:
    """ms over the pixels of an image, and over the images of a batch, both axes logarithmic.

    Dashed: the line of exponent 1 through the points. The legends have the exponent and R² of the power law.

    Raises:
        ConfigError: nothing was measured at two sizes or batches.
        MissingPackageError: matplotlib is not installed.
    """
    overs: tuple[Literal["pixels", "batch"], ...] = ("pixels", "batch")
    panels = [(over, series) for over in overs if (series := scaling_series(rows, over))]
    if not panels:
        raise ConfigError("a figure of scaling needs one contestant at two sizes or batches")
    names = list(dict.fromkeys(line.name for _, series in panels for line in series))
    each, top, height = _WIDTH / len(panels), 0.5, 2.5
    figure = _figure(_WIDTH, top + height)
    entries = [[_fit(line, each - 0.6) for line in series] for _, series in panels]
    lines = max(1 + sum(1 + entry.count("\n") for entry in column) for column in entries)
    figure.set_size_inches(_WIDTH, top + height + 0.6 + 0.165 * lines)
    for i, ((over, series), column) in enumerate(zip(panels, entries, strict=True)):
        width = each - 0.75
        axes = _axes(figure, i * each + 0.58, top, width, height)
        for line, entry in zip(series, column, strict=True):
            number = names.index(line.name) % len(SERIES)
            colour, face = SERIES[number], SERIES[number] if line.row.ours else "white"
            style: dict[str, Any] = {
                "linewidth": 1.0,
                "marker": _MARKERS[number],
                "markersize": 4.5,
                "markerfacecolor": face,
            }
            axes.plot(line.x, line.ms, color=colour, label=entry, **style)
            if line.fit:
                axes.plot(line.x, [line.fit.linear * x for x in line.x], color=colour, zorder=1, **_DASHED)
        axes.plot([], [], color=FAINT, label="exponent 1 through the points", **_DASHED)
        axes.set_xscale("log")
        axes.set_yscale("log")
        _log_ticks(axes.yaxis)
        _log_ticks(axes.xaxis)
        ticks = sorted({x for line in series for x in line.x})
        shown = _apart(ticks, width)
        sides = {x: f"{round(x**0.5)}²" if over == "pixels" else str(x) for x in shown}
        axes.set_xticks(ticks, [sides.get(x, "") for x in ticks], fontsize=_TEXT, color=INK)
        unit = f"pixels of an image, batch {series[0].row.batch}"
        axes.set_xlabel(unit if over == "pixels" else f"images of {series[0].row.size} in a batch", fontsize=_TEXT)
        axes.set_ylabel("ms", fontsize=_TEXT, color=INK, labelpad=2)
        _title(axes, f"({'ab'[i]}) over {'sizes' if over == 'pixels' else 'batches'}")
        place: dict[str, Any] = {
            "loc": "upper left",
            "bbox_to_anchor": (-0.5 / width, -0.48 / height),
            "borderaxespad": 0,
        }
        axes.legend(fontsize=_TEXT, frameon=False, labelcolor=INK, handlelength=2.2, **place)
    networks = dict.fromkeys(line.row.network for _, series in panels for line in series)
    _caption(figure, ", ".join([*networks, case_names(by_case(rows))[0]]))
    return figure


def _apart(ticks: Sequence[int], width: float) -> list[int]:
    """Of ticks on a logarithmic axis so many inches wide those whose labels have room, the last one first."""
    shown = [ticks[-1]]
    inch = width / math.log(ticks[-1] / ticks[0])
    for tick in reversed(ticks):
        if math.log(shown[-1] / tick) * inch > _NUMBER:
            shown.append(tick)
    return shown


def _draw_table_viii(figure: Figure, left: float, top: float, height: float) -> None:
    """A row of panels for each dataset: GFLOPs and parameters against mIoU."""
    table = json.loads(_TABLE_VIII.read_text(encoding="utf-8"))["rows"]
    datasets = "PASCAL Context", "ADE20K", "PASCAL VOC 2012"
    quantities = {"gflops": "GFLOPs", "parameters_m": "parameters, 10⁶"}
    gap, between = 0.26, 0.14
    each, width = height / len(datasets) - gap, (_WIDTH - left - 0.1 - between) / 2
    for i, dataset in enumerate(datasets):
        for j, (quantity, name) in enumerate(quantities.items()):
            axes = _axes(figure, left + j * (width + between), top + gap + i * (each + gap), width, each)
            for row in table:
                axes.plot(row[quantity], row[dataset], _family(row["family"])[1], color=INK, markersize=5)
            axes.margins(x=0.14, y=0.22)
            axes.locator_params(axis="y", nbins=3, min_n_ticks=2)
            axes.locator_params(axis="x", nbins=4)
            last = i == len(datasets) - 1
            axes.tick_params(labelbottom=last, labelleft=j == 0)
            if last:
                axes.set_xlabel(name, fontsize=_TEXT, color=INK)
            if j == 0:
                axes.set_title(f"{dataset}, mIoU, %", fontsize=_TEXT, color=INK, loc="left", pad=3)
    _text(figure, left, top - 0.18, "(b) Table VIII of the paper, ResNet-101", bold=True)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(ms, mIoU) of those that no other beats in one and equals in the other, by ms."""
    front: list[tuple[float, float]] = []
    for ms, miou in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or miou > front[-1][1]:
            front.append((ms, miou))
    return front


def _family(network: str) -> tuple[str, str]:
    """Name and marker; a network of no known family is its own."""
    return next((found for prefix, found in _FAMILIES.items() if network.startswith(prefix)), (network, "P"))


def _greys(rows: Sequence[Row]) -> dict[str, str]:
    """A shade for each peer, the first the darkest."""
    peers = list(dict.fromkeys(row.contestant for row in rows if not row.ours))
    step = (_LIGHTEST - _DARKEST) / max(1, len(peers) - 1)
    return {name: f"{_DARKEST + i * step:.3f}" for i, name in enumerate(peers)}


def _label(row: Row, precise: bool) -> str:
    return f"{row.contestant} {row.precision}" if precise else row.contestant


def _fit(line: Series, width: float) -> str:
    """Name and fit, in two lines if one is wider than so many inches."""
    if line.fit is None:
        return line.name
    entry = f"{line.name}: {line.fit}"
    return entry if _inches(entry) < width else f"{line.name}\n{line.fit}"


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib", "eval") from None
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in inches, from the top left corner."""
    whole, high = figure.get_size_inches()
    axes = figure.add_axes((left / whole, 1 - (top + height) / high, width / whole, height / high))
    axes.tick_params(which="both", labelsize=_TEXT, labelcolor=INK, color=FAINT, length=2.5, width=0.6, pad=2)
    for side, spine in axes.spines.items():
        spine.set(linewidth=0.6, color=FAINT, visible=side in ("left", "bottom"))
    axes.grid(color="#e4e5e7", linewidth=0.5)
    axes.set_axisbelow(True)
    return axes


def _bars(axes: Axes, names: dict[float, str], last: float, first: float = -0.6) -> None:
    """What axes of horizontal bars, one a unit, from the top down, have in common."""
    axes.set_yticks(list(names), list(names.values()), fontsize=_TEXT, color=INK, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(last, first)
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=5)


def _rows(axes: Axes) -> Any:
    """Across the axes in their own width, down in the rows of bars."""
    return axes.get_yaxis_transform()


def _words(*, bold: bool, colour: str = INK) -> dict[str, Any]:
    return {
        "fontsize": _TEXT,
        "fontweight": "bold" if bold else "normal",
        "color": colour,
        "va": "center",
        "parse_math": False,
    }


def _end(axes: Axes, x: float, y: float, words: str, *, bold: bool) -> None:
    """Words beyond the end of a bar."""
    axes.annotate(words, (x, y), (3, 0), textcoords="offset points", **_words(bold=bold))


def _title(axes: Axes, words: str) -> None:
    axes.set_title(words, fontsize=_HEADING, fontweight="bold", color=INK, loc="left", pad=6, parse_math=False)


def _text(figure: Figure, left: float, top: float, words: str, *, bold: bool = False) -> None:
    """Words on the page; left and top in inches."""
    width, height = figure.get_size_inches()
    style = _words(bold=bold) | {"va": "top", "fontsize": _HEADING if bold else _TEXT}
    figure.text(left / width, 1 - top / height, words, **style)


def _caption(figure: Figure, words: str) -> None:
    _text(figure, 0.05, 0.05, words)


def _legend(figure: Figure, entries: dict[str, Any], *, columns: int) -> None:
    """At the foot of the page."""
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="lower center",
        ncols=columns,
        fontsize=_TEXT,
        frameon=False,
        labelcolor=INK,
        borderaxespad=0.2,
        columnspacing=1.6,
    )


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour)


def _line(colour: str, **style: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, **{"markersize": 5.0, **style})


def _inches(words: str) -> float:
    """Width of words at 8 points."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), words, size=_TEXT).get_extents().width) / 72


def _log_ticks(axis: Any) -> None:
    """Ticks at 1, 2 and 5, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
