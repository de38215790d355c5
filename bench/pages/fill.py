"""Writes the numbers of a results file into README.md and docs/performance.md, and its figures beside the docs.

    python -m agln_fast.bench.pages.fill RESULTS.json [--check] [--root FOLDER]

Between `<!-- bench:NAME -->` and `<!-- /bench -->` stands what is written; NAME is machine, overview, table, ladder or
scaling. --check writes nothing and ends with status 1 if a page or a figure is not that of the results. Figures are
equal where Matplotlib is of the same version.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from agln_fast.bench.pages.plots import draw_ladder, draw_latency, draw_pareto, draw_scaling
from agln_fast.bench.pages.presentation import (
    NOTES,
    machine_line,
    markdown_ladder,
    markdown_overview,
    markdown_scaling,
    markdown_table,
)
from agln_fast.bench.race.results import Results, load_results
from agln_fast.bench.race.rows import Row
from agln_fast.errors import AglnError, ConfigError, choose
from agln_fast.figures.saving import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FIGURES", "PAGES", "SECTIONS", "fill", "main", "stale"]

PAGES = "README.md", "docs/performance.md"
FIGURES = "docs/images"

_WIDTH = 110  # of a line of the pages


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_long_words=False, break_on_hyphens=False)


def _main_rows(results: Results) -> list[Row]:
    """Those of the size and the number of classes that come first."""
    first = results.rows[0]
    return [
        row
        for row in results.rows
        if (row.size, row.batch, row.num_classes) == (first.size, first.batch, first.num_classes)
    ]


def _is_long(text: str) -> bool:
    return max(map(len, text.splitlines())) > _WIDTH


def _overview(results: Results) -> str:
    """Networks side by side; the unit stands above, where the headings would be too long with it."""
    text = markdown_overview(_main_rows(results))
    return f"Medians in ms; {text.replace(', ms |', ' |')}" if _is_long(text) else text


SECTIONS: dict[str, Callable[[Results], str]] = {
    "machine": lambda results: _wrapped(f"{machine_line(results.machine)}; `{results.command}`, {results.date}."),
    "overview": _overview,
    "table": lambda results: f"{markdown_table(results.rows)}\n\n{_wrapped(NOTES)}",
    "ladder": lambda results: markdown_ladder(results.ladder, _WIDTH),
    "scaling": lambda results: markdown_scaling(results.scaling),
}
"""What stands in each section."""

_NEEDS = {"overview": "rows", "table": "rows", "ladder": "ladder", "scaling": "scaling"}
_OPEN, _CLOSE = re.compile(r"<!-- bench:(\S+) -->"), "<!-- /bench -->"


def fill(text: str, results: Results, name: str = "page") -> str:
    """`text` with what stands between its markers replaced.

    Raises:
        ConfigError: a section that is unknown, has no end, or nothing in the results; `name` says of which page.
    """
    done, position = [], 0
    while marker := _OPEN.search(text, position):
        section = marker[1]
        choose("section", section, SECTIONS, where=name)
        end = text.find(_CLOSE, marker.end())
        following = _OPEN.search(text, marker.end())
        if end < 0 or (following and following.start() < end):
            raise ConfigError(f"{name}: section {section!r} has no end: put {_CLOSE} below it")
        if section in _NEEDS and not getattr(results, _NEEDS[section]):
            raise ConfigError(f"{name}: the results have no {_NEEDS[section]}: measure them, or remove the section")
        done += [text[position : marker.end()], "\n\n", SECTIONS[section](results), "\n\n"]
        position = end
    return "".join([*done, text[position:]])


def stale(results: Results, root: Path) -> dict[str, str]:
    """Name -> what should stand there, of the pages and figures under `root` that differ or are missing.

    Raises:
        ConfigError: a page is missing, or has a section that cannot be filled.
    """
    if missing := [name for name in PAGES if not (root / name).is_file()]:
        raise ConfigError(f"{root}: no {' and no '.join(missing)}: give the checkout as --root")
    wanted = {name: fill((root / name).read_text("utf-8"), results, name) for name in PAGES}
    with tempfile.TemporaryDirectory() as folder:
        for name, figure in _figures(results).items():
            save_figure(figure, Path(folder, name))
            wanted[f"{FIGURES}/{name}"] = Path(folder, name).read_text("utf-8")
    return {
        name: text
        for name, text in wanted.items()
        if not (root / name).exists() or (root / name).read_text("utf-8") != text
    }


def _figures(results: Results) -> dict[str, Figure]:
    """By file name, those for which something was measured."""
    figures = {}
    if results.rows:
        figures["latency.svg"] = draw_latency(results.rows)
    if results.ladder:
        figures["ladder.svg"] = draw_ladder(results.ladder)
    if any(row.miou is not None for row in results.rows):
        figures["pareto.svg"] = draw_pareto(results.rows)
    if results.scaling:
        figures["scaling.svg"] = draw_scaling(results.scaling)
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Update or check; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing, end with status 1 if something is stale")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2], help="the checkout")
    options = parser.parse_args(arguments)
    try:
        results = load_results(options.results, "networks")
        found = stale(results, options.root)
    except AglnError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for name, text in found.items():
        if not options.check:
            (options.root / name).parent.mkdir(exist_ok=True)
            (options.root / name).write_text(text, "utf-8")
        print(f"{name}: {'stale' if options.check else 'written'}")
    if options.check and found:
        print(f"run: python -m agln_fast.bench.pages.fill {options.results}")
    return int(options.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
