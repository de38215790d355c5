"""A JSON file of measurements that is complete after each row: whatever ends the run, what was measured is kept."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import torch

from agln_fast.errors import ConfigError
from agln_fast.files import replacing

__all__ = ["DEVICE_LOST", "Report", "describe", "device_is_lost"]

Row = dict[str, Any]

# Exit status (EX_TEMPFAIL): no later call of this process can use the device, a new process goes on with what is left.
DEVICE_LOST = 75


class Report:
    """Rows by case and contestant, in the order in which they came first, beside facts about the whole run.

    A row holds at least `case` and `contestant`; `error` where it failed, `left_out` with the reason where nobody
    tried. A file that is there is continued, so that a new process can go on where the last one died.
    """

    def __init__(self, path: Path | None, **facts: Any) -> None:
        """`path`: None to keep the rows in memory; `facts`: machine, precision, …; a fact of the file is kept."""
        self._path = path
        self._rows: dict[tuple[str, str], Row] = {}
        self.facts = facts
        if path is not None and path.exists():
            written = json.loads(path.read_text())
            self._rows = {(row["case"], row["contestant"]): row for row in written.pop("rows")}
            self.facts = {**facts, **written}

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    def row(self, case: str, contestant: str) -> Row | None:
        """What came of it, if it was tried."""
        row = self._rows.get((case, contestant))
        return None if row is None or "left_out" in row else row

    def put(self, row: Row) -> None:
        """Add the row, in the place of an earlier one of the same case and contestant, and write the file."""
        self._rows[row["case"], row["contestant"]] = row
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        if self._path is None:
            return
        with replacing(self._path, ConfigError) as part:
            part.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")


def describe(error: BaseException) -> str:
    """Kind, message and the innermost lines of the traceback, as short text."""
    place = "".join(traceback.format_tb(error.__traceback__)[-2:])
    return f"{type(error).__name__}: {str(error).strip()[:1000]}\n{place[-1000:]}"


def device_is_lost() -> bool:
    """The process has broken its CUDA: by an access outside of its memory, say, or a capture that failed half-way."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.randn(1, device="cuda")  # refused, too, after some captures that failed
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
