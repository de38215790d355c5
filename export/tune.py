"""Choose the plan of an engine: by timing where it runs, by a cost model where it does not."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from operator import or_
from pathlib import Path
from typing import Any, Literal, get_args

from rich.progress import Progress

from agln_fast import environment
from agln_fast.backends import Backend, backend_class, check_threads, open_engine
from agln_fast.bundle import Bundle, EngineRecord, Manifest
from agln_fast.contract import IOContract, Precision
from agln_fast.errors import ConfigError, did_you_mean
from agln_fast.export.onnx import export_onnx
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.cost import Rates, estimate_seconds, without_weights
from agln_fast.plan.network import plan_network
from agln_fast.plan.plan import ALGEBRA, NO_PLAN, STAGES, MixForm, Plan
from agln_fast.plan.rewrite import rewrite
from agln_fast.runtime.images import pack
from agln_fast.runtime.turns import rounds
from agln_fast.runtime.verify import sample_frames

__all__ = ["Candidate", "Graphs", "Tuning", "suitable", "tune", "tune_engine"]

ChosenBy = Literal["timing", "cost model"]

_CPU = ("openvino", "onnxruntime")
_GPU = ("tensorrt", "tensorrt-rtx")
_ROUNDS, _FEWEST_ROUNDS = 7, 3
_GAIN = 1.01  # a plan must be faster by this much: less is noise
_CLEAR = 1.03  # further rounds would not change who is faster
_CACHE_FORMAT = 2
# Achieved by two cores with AVX-512, in cache, and by a data-centre GPU. Only their relation counts.
_RATES = {
    ("cpu", "fp32"): Rates(2.2e11, 4e10),
    ("cpu", "bf16"): Rates(4.4e11, 4e10),
    ("gpu", "fp32"): Rates(4e13, 2e12),
    ("gpu", "fp16"): Rates(4e14, 2e12),
}


@dataclass(frozen=True)
class Candidate:
    """A plan that was tried, and its milliseconds: the median of the timed runs, or the cost model's."""

    plan: Plan
    milliseconds: float


@dataclass(frozen=True)
class Tuning:
    """What `tune` chose.

    backend, precision: of the engine that the plan is for. complete: the budget was enough to try everything.
    """

    backend: str
    precision: Precision
    plan: Plan
    chosen_by: ChosenBy
    complete: bool
    candidates: tuple[Candidate, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            **asdict(self),
            "plan": self.plan.to_dict(),
            "candidates": [{"plan": c.plan.to_dict(), "milliseconds": c.milliseconds} for c in self.candidates],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Tuning:
        """The inverse of `to_dict`."""
        candidates = tuple(Candidate(Plan.from_dict(c["plan"]), c["milliseconds"]) for c in values["candidates"])
        return cls(**{**values, "plan": Plan.from_dict(values["plan"]), "candidates": candidates})


class Graphs:
    """ONNX files of one network in a folder, one for each type and plan, exported when first asked for."""

    def __init__(self, network: SegmentationNetwork, contract: IOContract, folder: Path) -> None:
        self.network = network
        self.contract = contract
        self.folder = folder
        self.predicted: dict[tuple[str, Precision], Tuning] = {}  # what the cost model chose, by kind of machine
        self._files: dict[tuple[Precision, Plan], Path] = {}

    def __call__(self, kind: Precision, plan: Plan) -> Path:
        """The file whose weights are of type `kind`."""
        if (kind, plan) not in self._files:
            file = self.folder / f"{len(self._files)}.onnx"
            export_onnx(self.network, file, self.contract, kind, plan=plan)
            self._files[kind, plan] = file
        return self._files[kind, plan]


def tune(
    model: SegmentationNetwork,
    target: str = "cpu",
    size: tuple[int, int] = (512, 512),
    precision: Precision = "fp32",
    *,
    batch: int = 1,
    budget_s: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Find the rewrites with which `model` runs fastest.

    Plans are compared by timing them in turns on this machine, from an image in memory to labels in memory; for
    TensorRT, by a cost model. What was measured is remembered, by network, machine and versions.

    Args:
        target: "openvino", "onnxruntime", "tensorrt" or "tensorrt-rtx"; "cpu" for the faster of the first two.
        size: (height, width), pixels.
        precision: of the engine.
        batch: images a run.
        budget_s: seconds of wall clock; None for `AGLN_FAST_TUNE_SECONDS`, or 120. With 0 nothing is timed: what was
            measured before is taken, or the cost model.
        threads: CPU threads; None for `AGLN_FAST_THREADS`, or the library's own choice.
        progress: a rich progress display that the caller has started.

    Raises:
        ConfigError: an unknown target, or an impossible size or precision.
    """
    known = ["cpu", *_CPU, *_GPU]
    if target not in known:
        raise ConfigError(f"unknown target {target!r}{did_you_mean(target, known)}; known: {', '.join(known)}")
    contract = IOContract(*size, batch, batch)
    backends = [target] if target != "cpu" else [name for name in _CPU if not _obstacle(name, precision)]
    if not backends:
        raise ConfigError(f"no CPU engine runs in {precision} here: {_obstacle('openvino', precision)}")
    with tempfile.TemporaryDirectory() as folder:
        graphs = Graphs(model, contract, Path(folder))
        tunings = [
            tune_engine(graphs, backend, precision, budget_s=budget_s, threads=threads, progress=progress)
            for backend in backends
        ]
    return min(tunings, key=lambda tuning: min(c.milliseconds for c in tuning.candidates if c.plan == tuning.plan))


def suitable(plan: Plan, backend: str, precision: Precision) -> Plan:
    """`plan` without what does not suit an engine.

    Winograd's sums are for fp32 on CPUs: in bf16 they cost labels, int8 would not be quantised, and TensorRT has
    convolutions of that kind of its own. A plan of TensorRT is served as it is, with nobody to make labels of logits.
    """
    if backend not in _CPU:
        plan = replace(plan, low_resolution_labels=False)
    return plan if backend in _CPU and precision == "fp32" else replace(plan, winograd=0)


def tune_engine(
    graphs: Graphs,
    backend: str,
    precision: Precision,
    *,
    budget_s: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """As `tune`, for one backend, with graphs that several calls share."""
    if precision not in get_args(Precision):
        raise ConfigError(f"precision {precision!r}: must be one of {', '.join(get_args(Precision))}")
    budget_s = environment.tuning_seconds() if budget_s is None else budget_s
    threads = check_threads(threads)
    file = _cache_file(graphs, backend, precision, threads)
    runs_here = backend in _CPU and not _obstacle(backend, precision)
    remembered = _remembered(file) if runs_here else None
    if remembered is not None:
        return remembered
    if not runs_here or budget_s == 0:
        return _predict(graphs, backend, precision)
    tuning = _search(
        graphs, backend, precision, _Race(graphs, backend, precision, budget_s, threads, progress), "timing"
    )
    if tuning.complete:
        _remember(file, tuning)
    return tuning


class _Judge:
    """Compares plans. `candidates`: all that were compared; `exhausted`: nothing more can be compared."""

    def __init__(self) -> None:
        self.candidates: dict[Plan, Candidate] = {}
        self.exhausted = False

    def fastest(self, plans: Sequence[Plan]) -> Plan:
        """The first of `plans`, unless another one is clearly faster."""
        raise NotImplementedError


@dataclass(eq=False)
class _Model(_Judge):
    graphs: Graphs
    kind: str
    precision: Precision
    candidates: dict[Plan, Candidate] = field(default_factory=dict)
    exhausted: bool = False

    def __post_init__(self) -> None:
        self._network = without_weights(self.graphs.network)

    def fastest(self, plans: Sequence[Plan]) -> Plan:
        best = plans[0]
        for plan in plans:
            if plan not in self.candidates:
                self.candidates[plan] = Candidate(plan, 1e3 * self._seconds(plan))
            if self.candidates[best].milliseconds > _GAIN * self.candidates[plan].milliseconds:
                best = plan
        return best

    def _seconds(self, plan: Plan) -> float:
        contract = self.graphs.contract
        half = self.precision != "fp32"
        rates = _RATES[self.kind, ("fp16" if self.kind == "gpu" else "bf16") if half else "fp32"]
        return estimate_seconds(
            rewrite(self._network, plan),
            (contract.height, contract.width),
            rates,
            batch=contract.max_batch,
            element_size=2 if half else 4,
            full_size=contract.output == "logits" or not plan.low_resolution_labels,
        )


@dataclass(eq=False)
class _Race(_Judge):
    graphs: Graphs
    backend: str
    precision: Precision
    budget_s: float
    threads: int | None
    progress: Progress | None
    candidates: dict[Plan, Candidate] = field(default_factory=dict)
    exhausted: bool = False

    def __post_init__(self) -> None:
        self._deadline = time.monotonic() + self.budget_s
        contract = self.graphs.contract
        self._image = pack(sample_frames(None, contract)[:1] * contract.max_batch, contract)
        self._task = None
        if self.progress is not None:
            self._task = self.progress.add_task(f"tune {self.backend} {self.precision}", total=self.budget_s)

    def fastest(self, plans: Sequence[Plan]) -> Plan:
        """In turns; the race ends early where nobody can change the result any more."""
        with ExitStack() as stack:
            opened = [stack.enter_context(self._open(plan)) for plan in plans]
            for backend in opened:
                backend.run(self._image)
            times: list[list[float]] = []
            for seconds in islice(rounds([partial(backend.run, self._image) for backend in opened]), _ROUNDS):
                times.append(seconds)
                self._show()
                if len(times) >= _FEWEST_ROUNDS and (self.exhausted or _is_clear(times)):
                    break
        for plan, column in zip(plans, zip(*times, strict=True), strict=True):
            self.candidates[plan] = Candidate(plan, 1e3 * statistics.median(column))
        gains = [statistics.median(column) for column in zip(*_ratios(times), strict=True)]
        winner = max(range(len(plans)), key=lambda i: gains[i])
        return plans[winner] if gains[winner] >= _GAIN else plans[0]

    def _open(self, plan: Plan) -> Backend:
        graph = self.graphs("fp32" if self.precision == "bf16" else self.precision, plan)
        record = _record(self.backend, self.precision, graph.name, plan)
        draft = Manifest(self.graphs.network.config, (), (), self.graphs.contract, ())
        return open_engine(Bundle(graph.parent, draft), record, threads=self.threads)

    def _show(self) -> None:
        left = self._deadline - time.monotonic()
        self.exhausted = left <= 0
        if self.progress is not None and self._task is not None:
            self.progress.update(self._task, completed=self.budget_s - max(0.0, left))


def _ratios(times: Sequence[Sequence[float]]) -> list[list[float]]:
    """For each round how many times as fast as the first each one was."""
    return [[first / seconds for seconds in (first, *others)] for first, *others in times]


def _is_clear(times: Sequence[Sequence[float]]) -> bool:
    """In all rounds all were faster or slower than the first by more than the noise, and at most one was faster."""
    columns = list(zip(*_ratios(times), strict=True))[1:]
    faster = [min(column) > _CLEAR for column in columns]
    slower = [max(column) < 1 / _CLEAR for column in columns]
    return all(map(or_, faster, slower)) and sum(faster) <= 1


def _predict(graphs: Graphs, backend: str, precision: Precision) -> Tuning:
    kind = "cpu" if backend in _CPU else "gpu"
    if (kind, precision) not in graphs.predicted:
        judge = _Model(graphs, kind, precision)
        graphs.predicted[kind, precision] = _search(graphs, backend, precision, judge, "cost model")
    return replace(graphs.predicted[kind, precision], backend=backend)


def _search(graphs: Graphs, backend: str, precision: Precision, judge: _Judge, chosen_by: ChosenBy) -> Tuning:
    """From a plan that is good everywhere, one decision after the other; what is faster stays.

    A race starts from what the cost model chose, so that one that runs out of time has lost little.
    """
    first = [_start(backend), NO_PLAN]
    if chosen_by == "timing":
        first.insert(0, _predict(graphs, backend, precision).plan)
    best = judge.fastest(list(dict.fromkeys(first)))
    complete = True
    for alternatives in _decisions(graphs, backend, precision, timed=chosen_by == "timing"):
        if judge.exhausted:
            complete = False
            break
        best = judge.fastest([best, *(replace(best, **change) for change in alternatives(best))])
    return Tuning(backend, precision, best, chosen_by, complete, tuple(judge.candidates.values()))


def _start(backend: str) -> Plan:
    """What only leaves work out; on CPUs, whose convolutions keep channels adjacent, so does the attention."""
    return replace(ALGEBRA, pixel_major_attention=backend in _CPU)


def _decisions(graphs: Graphs, backend: str, precision: Precision, *, timed: bool) -> Iterator[Any]:
    """For each decision a function from the best plan so far to the changes that may improve it; the largest first.

    Labels of low-resolution logits are for engines that are timed: the cost model does not see what the host does.
    `suitable` says what else is not for every engine.
    """
    network = plan_network(graphs.network)
    fusions = list(network.fusions())

    def switch(name: str) -> Any:
        return lambda best: [{name: not getattr(best, name)}]

    groups = [] if network.decoder is None else range(len(network.decoder.lateral))
    for group in groups[:-1]:
        yield lambda best, group=group: _forms(best, group)
    if suitable(Plan(winograd=1), backend, precision).winograd:
        # The coarsest stage, 1/32, has too few tiles for it.
        yield lambda best: [{"winograd": count} for count in range(STAGES) if count != best.winograd]
    for group in groups[-1:]:  # whether it pays hangs on how fast the convolution is that it makes smaller
        yield lambda best, group=group: _forms(best, group)
    if graphs.contract.output == "labels" and timed:
        yield switch("low_resolution_labels")
    if fusions:
        yield switch("pixel_major_attention")
        yield switch("distribute_before_upsample")
        if any(fusion.enhance is None and fusion.terms.refines for fusion in fusions):
            yield switch("energy_before_upsample")


def _forms(best: Plan, group: int) -> list[dict[str, Any]]:
    forms = best.mix_before_upsample
    others = [form for form in get_args(MixForm) if form != forms[group]]
    return [
        {"fold_batchnorm": True, "mix_before_upsample": (*forms[:group], form, *forms[group + 1 :])} for form in others
    ]


def _record(backend: str, precision: Precision, file: str, plan: Plan) -> EngineRecord:
    return EngineRecord(f"{backend}-{precision}", backend, precision, file, "cpu", plan=plan)


def _obstacle(backend: str, precision: Precision) -> str | None:
    if backend == "onnxruntime" and precision == "bf16":
        return "onnxruntime has no bf16 convolution on CPUs"
    return backend_class(backend).obstacle(_record(backend, precision, "", NO_PLAN))


def _cache_file(graphs: Graphs, backend: str, precision: Precision, threads: int | None) -> Path:
    """Named by everything that the choice depends on: of the weights only which branches they switch off."""
    terms = [(f.terms.refines, f.terms.distributes) for f in plan_network(graphs.network).fusions()]
    facts = {
        "format": _CACHE_FORMAT,
        "model": graphs.network.config.to_json(),
        "terms": terms,
        "contract": graphs.contract.to_dict(),
        "engine": [backend, precision, threads],
        "machine": [platform.machine(), _processor(), os.cpu_count()],
        "versions": [_version(name) for name in ("agln-fast", "torch", "onnx", backend)],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return environment.cache_folder() / "tuning" / f"{digest[:32]}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _remembered(file: Path) -> Tuning | None:
    """What was measured before; a file that cannot be used is as good as none."""
    try:
        return Tuning.from_dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, KeyError, ConfigError):
        return None


def _remember(file: Path, tuning: Tuning) -> None:
    """Written whole or not at all; a folder that cannot be written costs only the time to tune again."""
    unfinished = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(tuning.to_dict(), indent=1) + "\n")
        unfinished.replace(file)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()
