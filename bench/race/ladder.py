"""A ladder: from a peer to the whole of a plan, one rewrite more at each rung, all rungs timed in turns."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from agln_fast.bench.race.measure import Case, Entry, Measured, Options, measure, open_workshop
from agln_fast.engines import kind_of
from agln_fast.errors import ConfigError
from agln_fast.plan.plan import Plan
from agln_fast.precision import Precision

__all__ = ["best_plan", "cumulative", "default_rungs", "ladder"]


def ladder(
    case: Case, rungs: Sequence[Entry], options: Options | None = None, progress: Progress | None = None
) -> Measured:
    """A row for each rung, called by its title, in order.

    Raises:
        ConfigError: fewer than two rungs, or two of one title and precision.
        BackendError: none of them can run here.
    """
    names = [rung.name for rung in rungs]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(
            f"a ladder of {', '.join(names) or 'nothing'}: give at least two rungs, with different titles"
        )
    return measure([case], rungs, options, progress)


def cumulative(plan: Plan) -> list[tuple[str, Plan]]:
    """Each rewrite of `plan` added to those before it, in order of application; the last one is `plan` itself."""
    rungs, so_far = [], type(plan)()
    for name, row, value in plan.steps():
        so_far = replace(so_far, **{name: value})
        rungs.append((row.words(name, value), so_far))
    return rungs


def default_rungs(
    plan: Plan, peer: str = "openvino", ours: str = "planned openvino", precision: Precision = "fp32"
) -> list[Entry]:
    """The peer, then our engine with one rewrite after the other, all in one precision."""
    rungs = [Entry(peer, precision, title=f"{peer}, best peer")]
    return [*rungs, *(Entry(ours, precision, step, title) for title, step in cumulative(plan))]


def best_plan(
    case: Case, backend: str = "openvino", precision: Precision = "fp32", options: Options | None = None
) -> Plan:
    """The plan that a workshop chooses for `backend` at this case, as `options` say."""
    with tempfile.TemporaryDirectory() as folder:
        return open_workshop(case, options or Options(), Path(folder)).chosen(kind_of(backend), precision)[0]
