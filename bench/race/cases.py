"""What the suite measures: networks, and which contestants take part in a run of a few minutes or in a full one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from rich.progress import Progress

from agln_fast.bench.race.arguments import DEFAULT_NETWORKS, TRAINED_NETWORKS, check_ladder, check_precisions
from agln_fast.bench.race.contestants import contestants
from agln_fast.bench.race.ladder import best_plan, default_rungs, ladder
from agln_fast.bench.race.measure import Case, Entry, Measured, Options
from agln_fast.bench.race.rows import Row
from agln_fast.bench.race.scaling import scale
from agln_fast.data.classes import class_set
from agln_fast.data.scenes import SCENE_SIZE
from agln_fast.precision import Precision

__all__ = [
    "by_reason",
    "choose_entries",
    "full_cases",
    "is_of",
    "measure_ladder",
    "measure_scaling",
]

_MANY_CLASSES = 150


def full_cases(size: tuple[int, int]) -> list[Case]:
    """What a full run measures: the large networks, the same with many classes, and the trained ones at the size of
    their pictures."""
    own = len(class_set("scenes").classes)
    return [
        *(Case(name, size) for name in DEFAULT_NETWORKS),
        *(Case(name, size, num_classes=_MANY_CLASSES) for name in DEFAULT_NETWORKS),
        *(Case(name, SCENE_SIZE, num_classes=own) for name in TRAINED_NETWORKS),
    ]


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
    found: Sequence[Row], cases: Sequence[Case], options: Options, progress: Progress | None = None
) -> Measured:
    """For each precision that was measured a ladder from the best peer that was found, rewrite by rewrite; of the first
    AGLN, or the first network.

    Raises:
        ConfigError: not on the CPU, where OpenVINO is.
    """
    check_ladder(options.device)
    case = _first(cases)
    rows: list[Row] = []
    left_out: list[str] = []
    peers = [row for row in found if is_of(row, case) and not row.ours]
    for precision in dict.fromkeys(cast(Precision, row.precision) for row in peers):
        best = min((row for row in peers if row.precision == precision), key=lambda row: row.median_ms)
        plan = best_plan(case, precision=precision, options=options)
        measured = ladder(case, default_rungs(plan, best.contestant, precision=precision), options, progress)
        rows += measured.rows
        left_out += measured.left_out
    return Measured(tuple(rows), tuple(left_out))


def measure_scaling(
    found: Sequence[Row], cases: Sequence[Case], options: Options, progress: Progress | None = None
) -> Measured:
    """The fastest that was found, over sizes and batches; of the first AGLN, or the first network.

    But for int8, which would be calibrated and quantised anew at every point: that takes hours.
    """
    case = _first(cases)
    able = [row for row in found if is_of(row, case) and row.precision != "int8"]
    row = min(able, key=lambda row: row.median_ms, default=None)
    if row is None:
        return Measured((), (f"scaling: nothing of {case.network} could be measured",))
    return scale(case, [Entry(row.contestant, cast(Precision, row.precision))], options, progress=progress)


def is_of(row: Row, case: Case) -> bool:
    """Whether the row is one of the case."""
    size = f"{case.size[0]}x{case.size[1]}"
    return (row.network, row.size, row.batch, row.num_classes) == (case.network, size, case.batch, case.num_classes)


def _first(cases: Sequence[Case]) -> Case:
    return next((case for case in cases if case.network.startswith("agln")), cases[0])
