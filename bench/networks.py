"""What the suite measures: networks, and which contestants take part in a run of a few minutes or in a full one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast, get_args

from rich.progress import Progress

from agln_fast.bench.contestants import CONTESTANTS
from agln_fast.bench.ladder import best_plan, default_rungs, ladder
from agln_fast.bench.measure import Case, Entry, Measured, Options
from agln_fast.bench.scaling import scale
from agln_fast.contract import Precision
from agln_fast.errors import ConfigError, did_you_mean

__all__ = [
    "BUDGET_S",
    "DEFAULT_NETWORKS",
    "NOTHING",
    "by_reason",
    "choose_device",
    "choose_entries",
    "measure_ladder",
    "measure_scaling",
]

DEFAULT_NETWORKS = ("fpn_resnet50", "agln_resnet50", "agln_lite_resnet50")
BUDGET_S = 270.0
"""Wall clock of a run that is not full, which takes five minutes with all that comes before and after."""

NOTHING = Measured((), ())

_TARGETS = ("cpu", "cuda", "tensorrt", "tensorrt-rtx")


def choose_device(targets: Sequence[str], device: str | None = None) -> str:
    """`device` itself; None for where the targets run.

    Raises:
        ConfigError: an unknown target, or targets of two devices.
    """
    for target in targets:
        if target not in _TARGETS:
            raise ConfigError(
                f"unknown target {target!r}{did_you_mean(target, _TARGETS)}; known: {', '.join(_TARGETS)}"
            )
    kinds = {"cpu" if target == "cpu" else "cuda" for target in targets}
    if device is None and len(kinds) != 1:
        raise ConfigError(f"targets {', '.join(targets)}: measure those of the CPU and of the GPU one after the other")
    return device or kinds.pop()


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
    asked = [precision] if isinstance(precision, str) else list(precision)
    known = ["auto", *get_args(Precision)]
    for kind in asked:
        if kind not in known:
            raise ConfigError(f"unknown precision {kind!r}{did_you_mean(kind, known)}; known: {', '.join(known)}")
    taking_part, left_out = [], []
    for contestant in CONTESTANTS.values():
        for kind in contestant.precisions:
            if "auto" not in asked and kind not in asked:
                continue
            entry = Entry(contestant.name, kind)
            reason = contestant.obstacle(kind, device)
            if reason is None and contestant.backend.startswith("tensorrt") and contestant.backend not in targets:
                reason = f"asked for with --target {contestant.backend}"
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
    if options.device != "cpu":
        raise ConfigError(f"a ladder is of OpenVINO, which runs on the CPU: leave --ladder out on {options.device}")
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
