"""Choose the plan of an engine: by a short race of the few best of a cost model, or by the model where nothing runs.

With more time (`budget_s`, `--tune`) one decision after the other is timed.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from operator import or_
from pathlib import Path
from typing import Any, Literal, cast, get_args

from agln_fast import environment, interruption, memory
from agln_fast.builder.workshop import Workshop
from agln_fast.contract import IOContract
from agln_fast.engines import KINDS, Engine, EngineKind, check_threads, open_engine
from agln_fast.errors import ConfigError, choose
from agln_fast.files import scratch_folder
from agln_fast.forking import use_threads
from agln_fast.manifest import PlanChosenBy
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.network import InferenceNetwork
from agln_fast.plan.plan import NO_PLAN, Plan, PlanChoice
from agln_fast.plan.rates import Rates, cpu_rates
from agln_fast.precision import PRECISIONS, Precision, check_precision
from agln_fast.runtime.turns import rounds

__all__ = ["SHORT_S", "Candidate", "Tuning", "choose_plan", "tune", "tune_engine"]

ChosenBy = Literal["timing", "cost model"]

SHORT_S = 10.0
"""Seconds that the race of an engine's plans may take, once they are exported, if nobody asks for more."""

_ROUNDS = 5
_REST_S = 0.02  # between runs: none of these engines goes on spinning
_GAIN = 1.01  # a plan must be faster by this much: less is noise
_CLEAR = (1.15, 1.08, 1.03)  # after so many rounds, a lead that further ones would not turn
_MOST_CANDIDATES = 1000
_MEMORY_FORMAT = 3
# Achieved by a data-centre GPU. Only their relation counts.
_GPU_RATES = {"fp32": Rates(4e13, 4e13, 2e12), "fp16": Rates(4e14, 4e14, 2e12)}


@dataclass(frozen=True)
class Candidate:
    """A plan that was tried, and its milliseconds: the median of the timed runs, or the cost model's."""

    plan: Plan
    milliseconds: float


@dataclass(frozen=True)
class Tuning:
    """What `tune` chose.

    backend, precision: of the engine that the plan is for. complete: every decision was tried.
    """

    backend: str
    precision: Precision
    plan: Plan
    chosen_by: ChosenBy
    complete: bool
    candidates: tuple[Candidate, ...]

    @property
    def milliseconds(self) -> float:
        """Of the plan that was chosen."""
        return next(c.milliseconds for c in self.candidates if c.plan == self.plan)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            **asdict(self),
            "plan": self.plan.to_dict(),
            "candidates": [{"plan": c.plan.to_dict(), "milliseconds": c.milliseconds} for c in self.candidates],
        }

    @classmethod
    def from_dict(cls, values: Any) -> Tuning:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: not what `to_dict` gives, in names, types and ranges.
        """
        names = ("backend", "precision", "plan", "chosen_by", "complete", "candidates")
        if not isinstance(values, dict) or values.keys() != set(names):
            raise ConfigError(f"a tuning is a JSON object of {', '.join(names)}")
        listed = values["candidates"]
        if not isinstance(listed, list) or len(listed) > _MOST_CANDIDATES:
            raise ConfigError(f"tuning: candidates must be a list of at most {_MOST_CANDIDATES}")
        candidates = []
        for candidate in listed:
            if not isinstance(candidate, dict) or candidate.keys() != {"plan", "milliseconds"}:
                raise ConfigError("tuning: a candidate has a plan and milliseconds")
            milliseconds = candidate["milliseconds"]
            if not isinstance(milliseconds, float) or not 0 < milliseconds < math.inf:
                raise ConfigError("tuning: milliseconds must be a number above 0")
            candidates.append(Candidate(Plan.from_dict(candidate["plan"]), milliseconds))
        plan = Plan.from_dict(values["plan"])
        backend, precision, chosen_by, complete = (values[name] for name in (*names[:2], *names[3:5]))
        if (
            backend not in _planned()
            or precision not in PRECISIONS
            or chosen_by not in get_args(ChosenBy)
            or not isinstance(complete, bool)
            or plan not in [candidate.plan for candidate in candidates]
            or KINDS[backend].suits(plan, precision) != plan
        ):
            raise ConfigError("tuning: an unknown name, or a plan that is no candidate or does not suit the engine")
        return cls(backend, cast(Precision, precision), plan, chosen_by, complete, tuple(candidates))


def tune(
    model: SegmentationNetwork,
    target: str = "cpu",
    size: tuple[int, int] = (512, 512),
    precision: Precision = "fp32",
    *,
    batch: int = 1,
    budget_s: float | None = None,
    threads: int | None = None,
) -> Tuning:
    """Find the rewrites with which `model` runs fastest.

    Plans are compared by timing them in turns on this machine, from an image in memory to labels in memory; for
    TensorRT, by a cost model. What was measured is remembered, by network, machine and versions.

    Args:
        target: "openvino", "onnxruntime", "tensorrt" or "tensorrt-rtx"; "cpu" for the faster of the first two.
        size: (height, width), pixels.
        precision: of the engine.
        batch: images a run.
        budget_s: seconds of wall clock to time one decision after the other in, going on from what is remembered;
            None for `AGLN_FAST_TUNE_SECONDS`, and without that for a race of the few that a cost model takes for the
            best, of at most 10 seconds. With 0 nothing is timed: what was measured before is taken, or the model.
        threads: CPU threads; None for `AGLN_FAST_THREADS`, or the library's own choice.

    Raises:
        ConfigError: an unknown target, or an impossible size, precision or budget.
    """
    choose("target", target, ["cpu", *_planned()])
    contract = IOContract(*size, batch, batch)
    check_precision(precision)
    kinds = [kind for name, kind in _planned().items() if target in (name, kind.target)]
    if target == "cpu":
        obstacles = {kind: kind.obstacle(precision) for kind in kinds}
        kinds = [kind for kind, obstacle in obstacles.items() if obstacle is None]
        if not kinds:
            told = "; ".join(filter(None, obstacles.values()))
            raise ConfigError(f"no CPU engine runs in {precision} here: {told}")
    use_threads()
    with scratch_folder() as folder:
        workshop = Workshop(model, contract, folder)
        tunings = [tune_engine(workshop, kind, precision, budget_s=budget_s, threads=threads) for kind in kinds]
    return min(tunings, key=lambda tuning: tuning.milliseconds)


def choose_plan(
    workshop: Workshop,
    kind: EngineKind,
    precision: Precision,
    asked: PlanChoice,
    *,
    budget_s: float | None = None,
    threads: int | None = None,
) -> tuple[Plan, PlanChosenBy]:
    """The plan of an engine, where a user asked for `asked`, and who chose it."""
    if kind.plans == "fixed":
        return NO_PLAN, "fixed"
    if isinstance(asked, Plan):
        return kind.suits(asked, precision), "user"
    if asked == "none":
        return NO_PLAN, "user"
    tuning = tune_engine(workshop, kind, precision, budget_s=budget_s, threads=threads)
    return tuning.plan, tuning.chosen_by


def tune_engine(
    workshop: Workshop,
    kind: EngineKind,
    precision: Precision,
    *,
    budget_s: float | None = None,
    threads: int | None = None,
) -> Tuning:
    """As `tune`, for one kind of engine, with a workshop that several calls share."""
    timed_in = kind.timed_in(precision)
    if timed_in != precision:
        return replace(tune_engine(workshop, kind, timed_in, budget_s=budget_s, threads=threads), precision=precision)
    budget_s = environment.tuning_seconds() if budget_s is None else budget_s
    if budget_s is not None and not 0 <= budget_s < math.inf:
        raise ConfigError(f"budget of {budget_s} seconds to tune in: must be at least 0")
    threads = check_threads(threads)
    if kind.plans != "timing" or kind.obstacle(precision):
        return _predict(workshop, kind, precision, threads)
    file = _memory(workshop, kind, precision, threads)
    known = _remembered(file, kind, precision)
    if known is not None and (known.complete or not budget_s):
        return known
    if budget_s == 0:
        return _predict(workshop, kind, precision, threads)
    shortlist = [] if known is not None else _shortlist(workshop, kind, precision, threads)
    if budget_s is None:
        race = _Race(workshop, kind, precision, SHORT_S, threads)
        race.prepare(shortlist)
    else:
        race = _Race(workshop, kind, precision, budget_s, threads)
    if known is not None:
        race.candidates |= {candidate.plan: candidate for candidate in known.candidates}
    best = known.plan if known is not None else race.fastest(shortlist)
    for changes in () if budget_s is None else _decisions(workshop, kind, precision, timed=True):
        _remember(file, race, best, complete=False)
        if race.exhausted:
            break
        plans = [replace(best, **change) for change in changes(best)]
        if plans := [plan for plan in plans if plan not in race.candidates]:
            best = race.fastest([best, *plans])
    return _remember(file, race, best, complete=budget_s is not None and not race.exhausted)


@dataclass(eq=False)
class _Model:
    """Compares plans by what they cost on a machine of known rates. `candidates`: all that were compared."""

    workshop: Workshop
    kind: EngineKind
    precision: Precision
    threads: int | None
    candidates: dict[Plan, Candidate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        half = self.precision != "fp32"
        self._element_size = 2 if half else 4
        timed = self.kind.plans == "timing"
        self._rates = cpu_rates(half, self.threads) if timed else _GPU_RATES["fp16" if half else "fp32"]

    def fastest(self, plans: Sequence[Plan]) -> Plan:
        """The first of `plans`, unless another one is clearly faster."""
        best = plans[0]
        for plan in plans:
            if plan not in self.candidates:
                self.candidates[plan] = Candidate(plan, 1e3 * self.seconds(plan))
            if self.candidates[best].milliseconds > _GAIN * self.candidates[plan].milliseconds:
                best = plan
        return best

    def seconds(self, plan: Plan) -> float:
        """Of one run."""
        return self.workshop.cost.seconds(plan, self._rates, element_size=self._element_size)


@dataclass(eq=False)
class _Race:
    """Compares plans by timing them. `candidates`: all that were compared; `exhausted`: the time is over."""

    workshop: Workshop
    kind: EngineKind
    precision: Precision
    budget_s: float
    threads: int | None
    candidates: dict[Plan, Candidate] = field(default_factory=dict)
    exhausted: bool = False

    def __post_init__(self) -> None:
        self._image = self.workshop.sample
        self._deadline = time.monotonic() + self.budget_s

    def prepare(self, plans: Sequence[Plan]) -> None:
        """Make the files of `plans` off the clock: the bundle needs one of them anyway."""
        for plan in plans:
            interruption.check()
            self.kind.make(self.workshop, self.precision, plan)
        self._deadline = time.monotonic() + self.budget_s

    def fastest(self, plans: Sequence[Plan]) -> Plan:
        """The first of `plans`, unless another one is clearly faster; they run in turns.

        The race ends early where nobody can change the result any more.
        """
        with ExitStack() as stack:
            opened = [stack.enter_context(self._open(plan)) for plan in plans]
            for engine in opened:
                interruption.check()
                engine.run(self._image)
            times: list[list[float]] = []
            for seconds in islice(rounds([partial(engine.run, self._image) for engine in opened], _REST_S), _ROUNDS):
                interruption.check()
                times.append(seconds)
                self.exhausted = time.monotonic() > self._deadline
                if self.exhausted or _is_clear(times):
                    break
        for plan, column in zip(plans, zip(*times, strict=True), strict=True):
            self.candidates[plan] = Candidate(plan, 1e3 * statistics.median(column))
        gains = [statistics.median(column) for column in zip(*_ratios(times), strict=True)]
        winner = max(range(len(plans)), key=lambda i: gains[i])
        needed = (*_CLEAR[:-1], _GAIN)[min(len(times), len(_CLEAR)) - 1]  # few rounds show large leads only
        return plans[winner] if gains[winner] >= needed else plans[0]

    def _open(self, plan: Plan) -> Engine:
        interruption.check()
        return open_engine(self.kind.make(self.workshop, self.precision, plan), threads=self.threads)


def _ratios(times: Sequence[Sequence[float]]) -> list[list[float]]:
    """For each round how many times as fast as the first each one was."""
    return [[first / seconds for seconds in (first, *others)] for first, *others in times]


def _is_clear(times: Sequence[Sequence[float]]) -> bool:
    """In all rounds all were faster or slower than the first by more than the noise, and at most one was faster."""
    lead = _CLEAR[min(len(times), len(_CLEAR)) - 1]
    columns = list(zip(*_ratios(times), strict=True))[1:]
    faster = [min(column) > lead for column in columns]
    slower = [max(column) < 1 / lead for column in columns]
    return all(map(or_, faster, slower)) and sum(faster) <= 1


def _predict(workshop: Workshop, kind: EngineKind, precision: Precision, threads: int | None) -> Tuning:
    """What the cost model chooses: from a plan that is good everywhere, one decision after the other."""
    model = _Model(workshop, kind, precision, threads)
    best = model.fastest([kind.start, NO_PLAN])
    for changes in _decisions(workshop, kind, precision, timed=False):
        best = model.fastest([best, *(replace(best, **change) for change in changes(best))])
    return Tuning(kind.name, precision, best, "cost model", True, tuple(model.candidates.values()))


def _shortlist(workshop: Workshop, kind: EngineKind, precision: Precision, threads: int | None) -> list[Plan]:
    """The few plans to race: the model's best, one of another kind, and what is exported already, if there is time.

    The kinds differ in what the model knows least about (`Rewrite.guessed`).
    """
    tuning = _predict(workshop, kind, precision, threads)
    best = tuning.plan
    others = [candidate for candidate in tuning.candidates if candidate.milliseconds != tuning.milliseconds]
    others.sort(key=lambda candidate: candidate.milliseconds)
    graph = kind.graph_type(precision)
    exported = [plan for plan in workshop.plans(graph) if kind.suits(plan, precision) == plan] if graph else []
    known = [*exported, *(candidate.plan for candidate in others), kind.start]
    guessed = sorted((row.guessed, name) for name, row in NO_PLAN.table().items() if row.guessed is not None)
    another = next((plan for _, name in guessed for plan in known if plan.parts(name) != best.parts(name)), known[-1])
    # Each is opened, warmed up, and timed at least once: about four runs. One is no race, and what is slowest to time
    # goes by the model.
    count = min(3, max(1, int(1e3 * SHORT_S / (4 * tuning.milliseconds))))
    return list(dict.fromkeys([best, another, *exported]))[:count]


Changes = Callable[[Plan], list[dict[str, Any]]]


def _decisions(workshop: Workshop, kind: EngineKind, precision: Precision, *, timed: bool) -> Iterator[Changes]:
    """For each decision a function from the best plan so far to the changes that may improve it; the largest first.

    What is done on the host is for engines that are timed: the cost model does not see it. So is the plain graph, in
    case an engine does better by itself.
    `EngineKind.suits` says what else is not for every engine.
    """
    if timed:
        yield lambda best: [vars(NO_PLAN)]
    table = NO_PLAN.table()
    turns = sorted((turn, name, part) for name, row in table.items() for part, turn in enumerate(row.turns))
    for _, name, part in turns:
        if not table[name].on_host or (timed and workshop.contract.output == "labels"):
            yield partial(_changes, workshop, kind, precision, name, part)


def _changes(
    workshop: Workshop, kind: EngineKind, precision: Precision, name: str, part: int, best: Plan
) -> list[dict[str, Any]]:
    """Other values of the rewrite `name`, as far as they suit the engine and do something to this network."""
    row = best.table()[name]
    needed: dict[str, Any] = {row.needs: True} if row.needs else {}
    without = replace(best, **needed)

    def counts(plan: Plan) -> bool:
        return kind.suits(plan, precision) == plan and workshop.cost.differ(plan, without)

    changes = [{**needed, name: value} for value in row.others(getattr(best, name), part)]
    return [change for change in changes if counts(replace(best, **change))]


def _planned() -> dict[str, EngineKind]:
    """The kinds whose engines have a plan."""
    return {name: kind for name, kind in KINDS.items() if kind.plans != "fixed"}


def _memory(workshop: Workshop, kind: EngineKind, precision: Precision, threads: int | None) -> Path:
    """Named by everything that the choice depends on: of the weights only which branches they switch off."""
    facts = {
        "format": _MEMORY_FORMAT,
        "model": workshop.model.to_json(),
        "terms": [
            (f.terms.alive.refines, f.terms.alive.distributes) for f in InferenceNetwork(workshop.network).fusions()
        ],
        "contract": workshop.contract.to_dict(),
        "engine": [kind.name, precision, threads],
    }
    return memory.place("tuning", facts, ("agln-fast", "torch", "onnx", kind.package))


def _remember(file: Path, race: _Race, best: Plan, *, complete: bool) -> Tuning:
    """What is known so far, for this run and for the next one."""
    candidates = tuple(race.candidates.values())
    tuning = Tuning(race.kind.name, race.precision, best, "timing", complete, candidates)
    memory.remember(file, tuning.to_dict())
    return tuning


def _remembered(file: Path, kind: EngineKind, precision: Precision) -> Tuning | None:
    """What was measured before; a file that cannot be used, or is another engine's, is as good as none."""
    try:
        tuning = Tuning.from_dict(memory.recall(file))
    except ConfigError:
        return None
    fits = (tuning.backend, tuning.precision, tuning.chosen_by) == (kind.name, precision, "timing")
    return tuning if fits else None
