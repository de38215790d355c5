"""What the suite measures: networks, and which contestants take part in a run of a few minutes or in a full one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from rich.progress import Progress

from agln_fast.bench.race.arguments import check_ladder, check_precisions
from agln_fast.bench.race.contestants import contestants
from agln_fast.bench.race.ladder import best_plan, default_rungs, ladder
from agln_fast.bench.race.measure import Case, Entry, Measured, Options
from agln_fast.bench.race.scaling import scale
from agln_fast.precision import Precision

__all__ = [
    "NOTHING",
    "TUNE_S",
    "by_reason",
    "choose_entries",
    "measure_ladder",
    "measure_scaling",
]

TUNE_S = 120.0
"""Seconds for each plan, with --full."""

NOTHING = Measured((), ())


def choose_entries(
    device: str = "cpu",
    precision: str | Sequence[str] = "auto",
    targets: Sequence[str] = ("cpu",),
    *,
    full: bool = False,
) -> tuple[list[Entry], list[tuple[Entry, str]]]:
    """Who takes part, and who does not, with the reason.

    Args:
        precision: one or several; "auto" for all of them.
        targets: TensorRT and TensorRT-RTX take part where they are named.
        full: with what takes minutes for each network.

    Raises:
        ConfigError: an unknown precision.
    """
    asked = check_precisions(precision)
    taking_part, left_out = [], []
    for contestant in contestants().values():
        for kind in contestant.precisions:
            if "auto" not in asked and kind not in asked:
                continue
            entry = Entry(contestant.name, kind)
            reason = contestant.obstacle(kind, device)
            if reason is None and contestant.kind and contestant.kind.target not in ("cpu", "cuda", *targets):
                reason = f"asked for with --target {contestant.kind.target}"
            if reason is None and not full and not (kind == "int8" and kind in asked):
                reason = contestant.reason_to_wait(kind, device)
                reason = reason and f"{reason}: --full"
            if reason is None:
                taking_part.append(entry)
            else:
                left_out.append((entry, reason))
    return taking_part, left_out


def by_reason(left_out: Sequence[tuple[Entry, str]]) -> list[str]:
    """A line for each reason: "torch.compile fp32, torch.compile bf16: why"."""
    names: dict[str, list[str]] = {}
    for entry, reason in left_out:
        names.setdefault(reason, []).append(entry.name)
    return [f"{', '.join(entries)}: {reason}" for reason, entries in names.items()]


def measure_ladder(
    found: Measured, cases: Sequence[Case], options: Options, progress: Progress | None = None
) -> Measured:
    """From the best fp32 peer that was found, rewrite by rewrite, to bf16; of the first AGLN, or the first network.

    Raises:
        ConfigError: not on the CPU, where OpenVINO is.
    """
    check_ladder(options.device)
    case = _first(cases)
    peers = [row for row in found.rows if row.network == case.network and not row.ours and row.precision == "fp32"]
    best = min(peers, key=lambda row: row.median_ms, default=None)
    rungs = default_rungs(best_plan(case, options=options), "openvino" if best is None else best.contestant)
    return ladder(case, rungs, options, progress)


def measure_scaling(
    found: Measured, cases: Sequence[Case], options: Options, progress: Progress | None = None
) -> Measured:
    """The fastest that was found, over sizes and batches; of the first AGLN, or the first network."""
    case = _first(cases)
    row = min((row for row in found.rows if row.network == case.network), key=lambda row: row.median_ms, default=None)
    if row is None:
        return Measured((), (f"scaling: nothing of {case.network} could be measured",))
    return scale(case, [Entry(row.contestant, cast(Precision, row.precision))], options, progress=progress)


def _first(cases: Sequence[Case]) -> Case:
    return next((case for case in cases if case.network.startswith("agln")), cases[0])
