"""Rows of the suite for readers: tables on the screen and in Markdown, ladders, fits of scaling, and comparisons."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from agln_fast.bench.race.results import Results
from agln_fast.bench.race.rows import Row
from agln_fast.errors import ConfigError

__all__ = [
    "NOTES",
    "Case",
    "Change",
    "Fit",
    "Rung",
    "Series",
    "by_case",
    "case_names",
    "compare",
    "comparison_table",
    "differences",
    "digits",
    "ladder_steps",
    "ladders",
    "machine_line",
    "markdown_ladder",
    "markdown_overview",
    "markdown_scaling",
    "markdown_table",
    "overview_table",
    "power_law",
    "row_table",
    "scaling_series",
]

NOTES = (
    "ms: uint8 image to uint8 labels, both in host memory, median; p95: 95th percentile. ratio: how many times as fast "
    "as the best peer of the same precision class, fp32 or less (10th–90th percentile); ≈ 1 where that range holds 1. "
    "MB: peak memory; file MB: what is stored; build s: from the network to an engine that is ready. agreement: labels "
    "equal to the fp32 reference's. mIoU: per cent, on Scenes or what --data names, of the trained networks. "
    "A column that could not be measured for all of a table is left out."
)
"""What the columns of the tables are."""

_COLUMNS = "contestant", "precision", "ms", "p95", "images/s", "ratio", "MB", "file MB", "build s", "agreement", "mIoU"
_HARDWARE = "cpu", "threads", "gpu"  # of a machine; everything else about it is versions
_NOTHING = "–"
_SLOWER = 0.05
_NEUTRAL = 0.02


class Case(NamedTuple):
    """What contestants have in common that may be compared with each other."""

    network: str
    device: str
    size: str
    batch: int
    num_classes: int


def by_case(rows: Iterable[Row]) -> dict[Case, list[Row]]:
    """The rows of each case; order is kept."""
    cases: dict[Case, list[Row]] = {}
    for row in rows:
        cases.setdefault(Case(row.network, row.device, row.size, row.batch, row.num_classes), []).append(row)
    return cases


def case_names(cases: Iterable[Case]) -> tuple[str, dict[Case, str]]:
    """What all cases share, e.g. "cpu, 512x512, batch 1, 59 classes", and each one's network with what they do not."""
    facts = {case: (case.device, case.size, f"batch {case.batch}", f"{case.num_classes} classes") for case in cases}
    varies = [len(set(values)) > 1 for values in zip(*facts.values(), strict=True)]
    shared = [fact for fact, varying in zip(next(iter(facts.values()), ()), varies, strict=True) if not varying]
    own = {case: [fact for fact, varying in zip(facts[case], varies, strict=True) if varying] for case in facts}
    return ", ".join(shared), {case: ", ".join([case.network, *own[case]]) for case in facts}


def digits(number: float) -> str:
    """A positive number with three digits, and none before the point lost: 0.0462, 4.62, 46.2, 462, 4621."""
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}"


def row_table(rows: Sequence[Row]) -> Table:
    """All rows, a section for each case, ours marked; at most 120 columns wide on names of usual length."""
    shared, names = case_names(by_case(rows))
    table = _table(shared, _COLUMNS)
    for case, members in by_case(rows).items():
        table.add_section()
        table.add_row(Text(names[case], "bold"))
        for row in members:
            name, *cells = _cells(row)
            table.add_row(Text(f"{'▸' if row.ours else ' '} {name}"), *cells, style=_style(row.ours))
    return table


def overview_table(rows: Sequence[Row]) -> Table:
    """Networks side by side: a line for each contestant and precision, ms and ratio for each case."""
    shared, headings, lines = _overview(rows)
    table = _table(shared, ("contestant", "precision", *headings))
    for (name, precision, ours), cells in lines.items():
        table.add_row(Text(f"{'▸' if ours else ' '} {name}"), precision, *cells, style=_style(ours))
    return table


def markdown_table(rows: Sequence[Row]) -> str:
    """A table for each case, with its name above; ours in bold. No cell is empty: see NOTES."""
    shared, names = case_names(by_case(rows))
    tables = [shared]
    for case, members in by_case(rows).items():
        lines = [[_bold(name, row.ours), *cells] for row in members for name, *cells in [_cells(row)]]
        tables += [f"{names[case]}:", _markdown(*_without_gaps(_COLUMNS, lines), left=2)]
    return "\n\n".join(filter(None, tables))


def markdown_overview(rows: Sequence[Row]) -> str:
    """Networks side by side, a table for each size and number of classes; ours in bold.

    Whoever did not run on all networks of a table is not in it.
    """
    tables = []
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.size, row.batch, row.num_classes), []).append(row)
    for members in groups.values():
        shared, headings, lines = _overview(members)
        body = [
            [_bold(name, ours), precision, *cells]
            for (name, precision, ours), cells in lines.items()
            if _NOTHING not in cells
        ]
        tables.append(f"{shared}\n\n{_markdown(('contestant', 'precision', *headings), body, left=2)}")
    return "\n\n".join(tables)


def _without_gaps(
    headings: Sequence[str], lines: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Both without the columns in which something is missing."""
    whole = [(name, *column) for name, *column in zip(headings, *lines, strict=True) if _NOTHING not in column]
    heads, *body = zip(*whole, strict=True)
    return heads, body


def machine_line(machine: Mapping[str, Any]) -> str:
    """`agln_fast.machine.machine()` in one line: hardware, then versions; what is not there is left out."""
    threads = machine.get("threads")
    hardware = [machine.get("gpu"), machine.get("cpu"), threads and f"{threads} thread{'s' if threads > 1 else ''}"]
    versions = [f"{name} {value}" for name, value in machine.items() if name not in _HARDWARE and value is not None]
    return "; ".join(filter(None, (", ".join(filter(None, hardware)), ", ".join(versions))))


class Rung(NamedTuple):
    """A row of a ladder. step: times as fast as the rung above, total: as the first; both are 1 for the first.

    rewrites: what it adds; the last rung may stand for several, none of which had an effect of its own.
    """

    rewrites: tuple[str, ...]
    row: Row
    step: float
    total: float
    neutral: bool = False

    @property
    def name(self) -> str:
        """For readers."""
        return f"{'no effect: ' * self.neutral}{', '.join(self.rewrites)}"


def ladders(rows: Iterable[Row]) -> dict[tuple[Case, str], list[Row]]:
    """The rungs of each case and precision."""
    found: dict[tuple[Case, str], list[Row]] = {}
    for case, members in by_case(rows).items():
        for row in members:
            found.setdefault((case, row.precision), []).append(row)
    return found


def ladder_steps(rows: Sequence[Row]) -> list[Rung]:
    """The rungs of one ladder that changed the time by 2 % or more, ratios of medians; the others are one rung, last.

    The last one's time is that of the whole plan.
    """
    first = rows[0]
    rungs, neutral = [Rung((first.contestant,), first, 1.0, 1.0)], []
    for row in rows[1:]:
        step = rungs[-1].row.median_ms / row.median_ms
        if abs(step - 1) < _NEUTRAL:
            neutral.append(row.contestant)
        else:
            rungs.append(Rung((row.contestant,), row, step, first.median_ms / row.median_ms))
    if neutral:
        step = rungs[-1].row.median_ms / rows[-1].median_ms
        rungs.append(Rung(tuple(neutral), rows[-1], step, first.median_ms / rows[-1].median_ms, neutral=True))
    return rungs


def markdown_ladder(rows: Sequence[Row], width: int | None = None) -> str:
    """A table for each precision, a line for each rung: ms, ratios to the rung above and to the first, and quality.

    Rewrites without effect stand below a table whose lines would be longer than `width` with them.
    """
    shared, names = case_names(by_case(rows))
    parts = [shared]
    for (case, precision), members in ladders(rows).items():
        rungs = ladder_steps(members)
        table, last = _ladder_table(rungs, rungs[-1].name), rungs[-1]
        below = ""
        if last.neutral and width is not None and max(map(len, table.splitlines())) > width:
            table = _ladder_table(rungs, "the rest")
            below = textwrap.fill(f"The rest, without effect: {', '.join(last.rewrites)}.", width)
        parts += [f"{names[case]}, {precision}:", table, below]
    return "\n\n".join(filter(None, parts))


def _ladder_table(rungs: Sequence[Rung], last: str) -> str:
    """`last`: what the last rung is called."""
    lines = [
        [_bold(name, row.ours), digits(row.median_ms), f"{rung.step:.2f}", f"{rung.total:.2f}", *_quality(row)]
        for rung, name in zip(rungs, [*(rung.name for rung in rungs[:-1]), last], strict=True)
        for row in [rung.row]
    ]
    headings = "rung", "ms", "step", "total", "MB", "file MB", "build s", "agreement", "mIoU"
    return _markdown(*_without_gaps(headings, lines), left=1)


class Fit(NamedTuple):
    """ms = scale · x^exponent, by least squares in both logarithms; linear: ms per unit of x if the exponent is 1."""

    scale: float
    exponent: float
    r_squared: float
    linear: float

    def __str__(self) -> str:
        return f"exponent {self.exponent:.2f}, R² {self.r_squared:.3f}"


class Series(NamedTuple):
    """One contestant over sizes or batches. x: pixels of an image, or images; fit: None below three points."""

    name: str
    row: Row
    x: tuple[int, ...]
    ms: tuple[float, ...]
    fit: Fit | None


def power_law(x: Sequence[float], ms: Sequence[float]) -> Fit:
    """Fit of at least two different positive x; R² is that of the logarithms."""
    u, v = np.log(np.asarray(x, np.float64)), np.log(np.asarray(ms, np.float64))
    exponent, offset = np.polyfit(u, v, 1)
    left, total = float(((v - exponent * u - offset) ** 2).sum()), float(((v - v.mean()) ** 2).sum())
    r_squared = 1 - left / total if total > 0 else 1.0
    return Fit(math.exp(offset), float(exponent), r_squared, math.exp(float((v - u).mean())))


def scaling_series(rows: Sequence[Row], over: Literal["pixels", "batch"]) -> list[Series]:
    """The contestants over sizes, at the smallest batch, or over batches, at the size that has most of them.

    Those measured at one size, or one batch, alone are left out.
    """
    batches: dict[str, set[int]] = {}
    for row in rows:
        batches.setdefault(row.size, set()).add(row.batch)
    smallest = min((row.batch for row in rows), default=1)
    busiest = max(batches, key=lambda size: len(batches[size]), default="")
    found: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in rows:
        if row.batch == smallest if over == "pixels" else row.size == busiest:
            x = _pixels(row) if over == "pixels" else row.batch
            found.setdefault((row.network, row.contestant, row.precision), {})[x] = row
    several = len({network for network, _, _ in found}) > 1
    lines = []
    for (network, contestant, precision), members in found.items():
        if len(members) > 1:
            x_values, in_order = zip(*sorted(members.items()), strict=True)
            ms = tuple(row.median_ms for row in in_order)
            name = f"{contestant} {precision}" + (f", {network}" if several else "")
            fit = power_law(x_values, ms) if len(members) > 2 else None
            lines.append(Series(name, in_order[0], x_values, ms, fit))
    return lines


def markdown_scaling(rows: Sequence[Row]) -> str:
    """A table over sizes and one over batches: ms, and the power law through them."""
    tables = []
    for over in ("pixels", "batch"):
        if series := scaling_series(rows, over):
            columns = sorted({x for line in series for x in line.x})
            row = series[0].row
            names = {_pixels(other): other.size for other in rows}
            headings = [names[x] if over == "pixels" else f"batch {x}" for x in columns]
            fixed = f"batch {row.batch}" if over == "pixels" else row.size
            body = []
            for line in series:
                ms = dict(zip(line.x, map(digits, line.ms), strict=True))
                fit = (f"{line.fit.exponent:.2f}", f"{line.fit.r_squared:.3f}") if line.fit else (_NOTHING, _NOTHING)
                body.append([_bold(line.name, line.row.ours), *(ms.get(x, _NOTHING) for x in columns), *fit])
            columns_of = (f"ms, {fixed}", *headings, "exponent", "R²")
            tables.append(_markdown(*_without_gaps(columns_of, body), left=1))
    return "\n\n".join(tables)


@dataclass(frozen=True)
class Change:
    """A contestant in two results. old_ms, new_ms: medians, None where it is missing; noise: the larger p95/median - 1
    of the two, 0 where either is missing."""

    case: Case
    contestant: str
    precision: str
    old_ms: float | None
    new_ms: float | None
    noise: float

    @property
    def ratio(self) -> float | None:
        """New time over old: above 1 is slower. None where either is missing."""
        return None if self.old_ms is None or self.new_ms is None else self.new_ms / self.old_ms

    @property
    def verdict(self) -> Literal["new", "gone", "slower", "faster", "same"]:
        """Slower or faster by more than 5 %, and by more than the noise."""
        if self.ratio is None:
            return "new" if self.old_ms is None else "gone"
        threshold = 1 + max(_SLOWER, self.noise)
        return "slower" if self.ratio > threshold else "faster" if self.ratio < 1 / threshold else "same"


def differences(old: Results, new: Results) -> list[str]:
    """What the machines and versions of two results do not share, e.g. "torch 2.12.0, now 2.13.0"."""
    keys = list(dict.fromkeys([*old.machine, *new.machine]))
    both = [(key, old.machine.get(key), new.machine.get(key)) for key in keys]
    return [f"{key} {before or 'none'}, now {now or 'none'}" for key, before, now in both if before != now]


def compare(old: Results, new: Results, *, other_machine: bool = False) -> list[Change]:
    """The rows of two results by case, contestant and precision: those of `old` in order, then the new ones.

    Versions may differ; `differences` says which.

    Args:
        other_machine: compare although processor, threads or GPU differ.

    Raises:
        ConfigError: the machines differ, or a file has two rows for one contestant.
    """
    hardware = [key for key in _HARDWARE if old.machine.get(key) != new.machine.get(key)]
    if hardware and not other_machine:
        told = "; ".join(line for line in differences(old, new) if line.split()[0] in hardware)
        raise ConfigError(f"results of two machines cannot be compared: {told}; measure both on one")
    before, now = _by_key(old.rows), _by_key(new.rows)
    changes = []
    for key in dict.fromkeys([*before, *now]):
        a, b = before.get(key), now.get(key)
        noise = max(row.p95_ms / row.median_ms - 1 for row in (a, b)) if a and b else 0.0
        changes.append(Change(*key, a.median_ms if a else None, b.median_ms if b else None, noise))
    return changes


def comparison_table(changes: Sequence[Change], warnings: Sequence[str] = ()) -> Table:
    """A line for each change, a section for each case; what `differences` found stands below."""
    shared, names = case_names(change.case for change in changes)
    table = _table(shared, ("contestant", "precision", "old ms", "new ms", "new/old", "noise", "verdict"))
    if warnings:
        table.caption = Text(f"not the same: {'; '.join(warnings)}", "bold yellow")
    styles = {"slower": "bold red", "faster": "green", "gone": "yellow", "new": "yellow", "same": ""}
    for case in dict.fromkeys(change.case for change in changes):
        table.add_section()
        table.add_row(Text(names[case], "bold"))
        for change in (change for change in changes if change.case == case):
            old_new = [_NOTHING if ms is None else digits(ms) for ms in (change.old_ms, change.new_ms)]
            noise = _NOTHING if change.ratio is None else f"{change.noise:.0%}"
            cells = [f"  {change.contestant}", change.precision, *old_new, _number(change.ratio, "{:.2f}"), noise]
            table.add_row(*map(Text, cells), change.verdict, style=styles[change.verdict])
    return table


def _by_key(rows: Sequence[Row]) -> dict[tuple[Case, str, str], Row]:
    found: dict[tuple[Case, str, str], Row] = {}
    for case, members in by_case(rows).items():
        for row in members:
            key = case, row.contestant, row.precision
            if key in found:
                named = f"{row.contestant} {row.precision} on {row.network}"
                raise ConfigError(f"two rows for {named}: keep the one to compare with")
            found[key] = row
    return found


def _cells(row: Row) -> list[str]:
    times = [digits(row.median_ms), digits(row.p95_ms), digits(row.images_per_second), _ratio(row)]
    return [row.contestant, row.precision, *times, *_quality(row)]


def _quality(row: Row) -> list[str]:
    """Memory, size, seconds of the build, agreement and mIoU."""
    resources = [_number(value, "{:.0f}") for value in (row.peak_memory_mb, row.size_mb, row.build_s)]
    return [*resources, _number(row.agreement, "{:.3%}"), _number(row.miou, "{:.2f}")]


def _overview(rows: Sequence[Row]) -> tuple[str, list[str], dict[tuple[str, str, bool], list[str]]]:
    """What is shared, a heading for each column, and the cells of each (contestant, precision, ours)."""
    cases = by_case(rows)
    shared, names = case_names(cases)
    found = {(case, row.contestant, row.precision): row for case, members in cases.items() for row in members}
    lines: dict[tuple[str, str, bool], list[str]] = {}
    for name, precision, ours in dict.fromkeys((row.contestant, row.precision, row.ours) for row in rows):
        cells = []
        for case in cases:
            row = found.get((case, name, precision))
            cells += [_NOTHING, _NOTHING] if row is None else [digits(row.median_ms), _ratio(row, spread=False)]
        lines[name, precision, ours] = cells
    return shared, [heading for case in cases for heading in (f"{names[case]}, ms", "ratio")], lines


def _ratio(row: Row, *, spread: bool = True) -> str:
    """ "1" for the best peer itself, "≈ 1", or the ratio with its range."""
    if row.ratio is None:
        return _NOTHING
    if row.ratio_low is None or row.ratio_high is None:
        return f"{row.ratio:.2f}"
    if row.ratio == row.ratio_low == row.ratio_high == 1:
        return "1"
    if row.ratio_low <= 1 <= row.ratio_high:
        return "≈ 1"
    return f"{row.ratio:.2f} ({row.ratio_low:.2f}–{row.ratio_high:.2f})" if spread else f"{row.ratio:.2f}"


def _pixels(row: Row) -> int:
    return math.prod(map(int, row.size.split("x")))


def _number(value: float | None, form: str) -> str:
    return _NOTHING if value is None else form.format(value)


def _bold(text: str, ours: bool) -> str:
    return f"**{text}**" if ours else text


def _style(ours: bool) -> str:
    return "bold cyan" if ours else ""


def _table(title: str, headings: Sequence[str]) -> Table:
    table = Table(title=Text(title), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title_justify="left")
    for heading in headings:
        left = heading in ("contestant", "precision", "verdict")
        # Names of cases, which stand in the first column, are long where sizes differ.
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "contestant")
    return table


def _markdown(headings: Sequence[str], lines: Sequence[Sequence[str]], *, left: int) -> str:
    """A table whose first `left` columns are aligned left."""
    rule = ["---"] * left + ["---:"] * (len(headings) - left)
    body = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *body))
