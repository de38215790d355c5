"""A run of the suite as a file: JSON that is read back, and CSV for other programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from agln_fast.bench.race.rows import AblationRow, PipelineRow, Row
from agln_fast.errors import ConfigError, choose
from agln_fast.files import replacing

__all__ = ["ROWS", "Results", "load_results", "save_results", "write_csv"]

ROWS: dict[str, type] = {"networks": Row, "pipeline": PipelineRow, "ablation": AblationRow}
"""What a file may hold -> its rows."""

_PARTS = "rows", "ladder", "scaling"
_KINDS: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}


@dataclass(frozen=True)
class Results:
    """A run of the suite, or of a job.

    machine: what `agln_fast.machine.machine` found.
    command: that measured it, as it was typed.
    date: YYYY-MM-DD.
    rows: contestants by networks; of another `kind` the rows of that.
    ladder: from the best peer of a precision to the whole of what the plan does: each row holds all rungs above it,
        too, and its contestant is the name of the rung.
    scaling: contestants over sizes, and over batches.
    left_out: "what: why" of everything that was asked for and is not in the rows.
    kind: of ROWS.
    """

    machine: dict[str, Any]
    command: str
    date: str
    rows: tuple[Any, ...]
    ladder: tuple[Row, ...] = ()
    scaling: tuple[Row, ...] = ()
    left_out: tuple[str, ...] = ()
    kind: str = "networks"


def save_results(results: Results, path: str | Path) -> None:
    """Write `results` as JSON, whole or not at all; a file there is replaced.

    Raises:
        ConfigError: the file cannot be written.
        ValueError: a number is not finite.
    """
    text = json.dumps(asdict(results), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path, ConfigError) as part:
        part.write_text(text, encoding="utf-8")


def load_results(path: str | Path, kind: str | None = None) -> Results:
    """Read what `save_results` wrote; `kind`, of ROWS, is what it must hold, None for any.

    Raises:
        ConfigError: no such file, no JSON, results of another kind, or not the columns of this version.
    """
    path = Path(path)
    again = "measure again with agln-fast bench"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}; {again}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is damaged, no JSON: {error}; {again}") from error
    expected = {field.name for field in fields(Results)}
    if not isinstance(found, dict) or set(found) != expected:
        raise ConfigError(f"{path}: no results of the suite, which hold {', '.join(sorted(expected))}; {again}")
    if not isinstance(found["machine"], dict) or not all(isinstance(found[key], str) for key in ("command", "date")):
        raise ConfigError(f"{path}: machine, command or date is damaged; {again}")
    of = choose("kind of results", found["kind"], [kind] if kind else ROWS, where=str(path))
    found["left_out"] = tuple(map(str, found["left_out"]))
    for part in _PARTS:
        if not isinstance(found[part], list):
            raise ConfigError(f"{path}: {part} is no list; {again}")
        row_type = ROWS[of] if part == "rows" else Row
        for number, row in enumerate(found[part]):
            if wrong := _wrong(row, row_type):
                raise ConfigError(f"{path}: {part}[{number}]: {wrong}; {again}")
        found[part] = tuple(row_type(**row) for row in found[part])
    return Results(**found)


def write_csv(rows: Sequence[Row], path: str | Path) -> None:
    """Write `rows` as CSV, a column for each field of `Row`, empty where None; whole or not at all.

    Raises:
        ConfigError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    writer.writerows(map(astuple, rows))
    with replacing(path, ConfigError) as part:
        part.write_text(text.getvalue(), encoding="utf-8")


def _wrong(row: Any, row_type: Any) -> str:
    """What makes `row` no row of that type, or an empty string."""
    if not isinstance(row, dict):
        return "is no row"
    columns = {field.name: str(field.type) for field in fields(row_type)}
    if missing := columns.keys() - row.keys():
        return f"without {', '.join(sorted(missing))}"
    if strange := row.keys() - columns.keys():
        return f"with {', '.join(sorted(strange))}, of another version"
    for name, annotation in columns.items():
        kind, _, optional = annotation.partition(" | ")
        # type(), because a bool is an int to isinstance.
        if type(row[name]) not in _KINDS[kind] and not (optional and row[name] is None):
            return f"{name} is {row[name]!r}, not {annotation}"
    return ""
