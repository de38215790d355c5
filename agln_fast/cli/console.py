"""What all verbs share on the screen: the consoles, progress bars and JSON output."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from agln_fast.errors import printable

__all__ = ["Json", "err", "out", "print_json", "print_wide", "progress_bar", "shown"]

_LONGEST = 4000  # characters of a line that others wrote

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]


def print_json(values: Any) -> None:
    """Write `values` to standard output as indented JSON."""
    typer.echo(json.dumps(values, indent=2))


def shown(text: object) -> str:
    """Text of others for a rich console: no markup in it counts, and no escape sequence reaches the terminal."""
    return escape("\n".join(printable(line, _LONGEST) for line in str(text).split("\n")))


def print_wide(table: Table) -> None:
    """Print a table of many columns 120 wide or more, which a narrower terminal wraps: no cell is cut."""
    Console(width=max(120, out.width)).print(table)


class _Rate(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        """As one line."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "")


def progress_bar(unit: str = "", *, remaining: bool = False, rate: bool = False) -> Progress:
    """A progress display on standard error, if that is a terminal; standard output is left to the result.

    unit: what is counted, e.g. "images".
    remaining: show the time that is left, too, for what takes hours.
    rate: show how many a second.
    """
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *((TextColumn(unit),) if unit else ()),
        *((_Rate(),) if rate else ()),
        TimeElapsedColumn(),
        *((TextColumn("left"), TimeRemainingColumn()) if remaining else ()),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
