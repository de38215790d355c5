"""How the time grows with the size of the image and with the batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from rich.progress import Progress

from agln_fast.bench.race.contestants import contestant
from agln_fast.bench.race.ladder import best_plan
from agln_fast.bench.race.measure import Case, Entry, Measured, Options, measure
from agln_fast.bench.race.rows import Row
from agln_fast.errors import BackendError, ConfigError

__all__ = ["BATCHES", "SIDES", "scale"]

SIDES = 256, 384, 512, 768, 1024, 1536, 2048
BATCHES = 1, 2, 4, 8, 16


def scale(
    base: Case,
    entries: Sequence[Entry],
    options: Options | None = None,
    *,
    sides: Sequence[int] = SIDES,
    batches: Sequence[int] = BATCHES,
    progress: Progress | None = None,
) -> Measured:
    """Rows of square images of `sides` at the batch of `base`, and of `batches` at its size; times alone.

    The plan is chosen once, for `base`, so that every point runs the same network. The smallest come first; one that
    would take longer than what is left of the budget, going by the latest, is left out.

    Raises:
        ConfigError: fewer than two points.
        BackendError: nothing can run here.
    """
    options = options or Options()
    cases = [replace(base, size=(side, side)) for side in sides] + [replace(base, batch=batch) for batch in batches]
    cases = sorted(dict.fromkeys(cases), key=_pixels)
    if len(cases) < 2:
        raise ConfigError("scaling over one point: give at least two sizes or batches")
    began = time.monotonic()
    entries = [_with_plan(entry, base, options) for entry in entries]
    options = replace(options, frames=0, memory=False, accuracy=False)
    rows: list[Row] = []
    left_out: list[str] = []
    seconds_per_pixel = 0.0
    for case in cases:
        left = float("inf") if options.budget_s is None else options.budget_s - (time.monotonic() - began)
        if left < seconds_per_pixel * _pixels(case):
            left_out.append(f"{case.name}: it would take longer than what is left of {options.budget_s:.0f} s")
            continue
        before = time.monotonic()
        try:
            found = measure(
                [case], entries, replace(options, budget_s=None if left == float("inf") else left), progress
            )
        except BackendError as error:
            left_out.append(f"{case.name}: {error}")
            continue
        seconds_per_pixel = (time.monotonic() - before) / _pixels(case)
        rows += found.rows
        left_out += found.left_out
    if not rows:
        raise BackendError(f"nothing could be scaled: {'; '.join(left_out)}")
    return Measured(tuple(rows), tuple(dict.fromkeys(left_out)))


def _with_plan(entry: Entry, base: Case, options: Options) -> Entry:
    planned_for = contestant(entry.contestant).planned_for
    if entry.plan is not None or planned_for is None:
        return entry
    return replace(entry, plan=best_plan(base, planned_for.name, entry.precision, options))


def _pixels(case: Case) -> int:
    return case.batch * case.size[0] * case.size[1]
