"""A whole run of the suite: every part, ladders, scaling; its file is complete after each network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from agln_fast.bench.race.cases import is_of, measure_ladder, measure_scaling
from agln_fast.bench.race.measure import Case, Entry, Measured, Options, measure
from agln_fast.bench.race.results import Results, save_results

__all__ = ["run"]


def run(
    cases: Sequence[Case],
    entries: Sequence[Entry],
    options: Options,
    results: Results,
    *,
    save: Path | None = None,
    ladder: bool = False,
    scaling: bool = False,
    progress: Progress | None = None,
) -> Results:
    """`results` with all that is not in them yet, written to the file `save` whenever more is known.

    The budget of `options` is that of all cases together; ladders and scaling have one of the same size each.

    Raises:
        ConfigError, BackendError, DeviceLostError: as `measure`, `measure_ladder` and `measure_scaling`.
    """
    end = None if options.budget_s is None else time.monotonic() + options.budget_s
    for number, case in enumerate(cases):
        if any(is_of(row, case) for row in results.rows):
            continue
        share = None if end is None else max(0.0, end - time.monotonic()) / (len(cases) - number)
        found = measure([case], entries, replace(options, budget_s=share), progress)
        results = _with(results, "rows", found, save)
    for wanted, name, more in ((ladder, "ladder", measure_ladder), (scaling, "scaling", measure_scaling)):
        if wanted and not getattr(results, name):
            results = _with(results, name, more(results.rows, cases, options, progress), save)
    return results


def _with(results: Results, name: str, found: Measured, save: Path | None) -> Results:
    left_out = tuple(dict.fromkeys([*results.left_out, *found.left_out]))
    changes: dict[str, Any] = {name: (*getattr(results, name), *found.rows), "left_out": left_out}
    results = replace(results, **changes)
    if save is not None:
        save_results(results, save)
    return results
