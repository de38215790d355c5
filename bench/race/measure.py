"""Contestants of one network in turns: times, memory, agreement with the reference, and accuracy on Scenes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from agln_fast import interruption
from agln_fast.bench.kernels.report import DEVICE_LOST, device_is_lost
from agln_fast.bench.kernels.roofline import product_rate
from agln_fast.bench.race.arguments import check_counts
from agln_fast.bench.race.contestants import contestant
from agln_fast.bench.race.memory import device_memory, peak_memory
from agln_fast.bench.race.rows import Row
from agln_fast.bench.race.weights import random_network
from agln_fast.bench.race.workshop import Opened, RaceWorkshop, Recipe
from agln_fast.contract import IOContract
from agln_fast.data.classes import class_set
from agln_fast.data.dataset import CachedDataset, SegmentationDataset
from agln_fast.data.scenes import SCENE_SIZE, Scenes
from agln_fast.decode import decode
from agln_fast.engines import check_threads
from agln_fast.engines.base import Array
from agln_fast.engines.torch_network import dtype_of
from agln_fast.errors import AglnError, BackendError
from agln_fast.metrics import SegmentationMetrics
from agln_fast.models.checkpoint import load_checkpoint
from agln_fast.models.complexity import complexity
from agln_fast.models.shipped import list_checkpoints
from agln_fast.plan.plan import NO_PLAN, PlanChoice
from agln_fast.precision import Precision
from agln_fast.runtime.images import fit
from agln_fast.runtime.references import make_reference, sample_frames
from agln_fast.runtime.turns import rounds
from agln_fast.runtime.verify import Reference

__all__ = ["FEWEST_ROUNDS", "Case", "DeviceLostError", "Entry", "Measured", "Options", "measure", "open_workshop"]

FEWEST_ROUNDS = 3
_TIMED_SHARE = 0.5  # of a case's time: what is left after it is for memory and accuracy


class DeviceLostError(BackendError):
    """No later call of this process can use the GPU; a new process goes on with what is left."""

    exit_code = DEVICE_LOST


@dataclass(frozen=True)
class Case:
    """What contestants must have in common to be compared: network, input (height, width), images a run, classes.

    A network that ships is measured with its trained weights, if it is asked for with its own number of classes.
    """

    network: str
    size: tuple[int, int] = (512, 512)
    batch: int = 1
    num_classes: int = 59

    @property
    def name(self) -> str:
        return f"{self.network} {self.size[0]}x{self.size[1]} batch {self.batch}, {self.num_classes} classes"

    @property
    def trained(self) -> bool:
        """Whether the weights are those of a checkpoint that ships; they are random otherwise."""
        return self.network in list_checkpoints() and self.num_classes == len(class_set("scenes").classes)


@dataclass(frozen=True)
class Entry:
    """A contestant in one precision.

    plan: None for that of the options. title: what its row is called; empty for the contestant's own name.
    """

    contestant: str
    precision: Precision
    plan: PlanChoice | None = None
    title: str = ""

    @property
    def name(self) -> str:
        return f"{self.title or self.contestant} {self.precision}"


@dataclass(frozen=True)
class Options:
    """How to measure.

    warmup, iters: rounds before and while timing; a round runs every contestant once.
    budget_s: wall clock of all cases together; None for no limit. It lowers rounds, to 3 at the least, then leaves out
        memory and accuracy, and says so.
    threads: CPU threads of every contestant; None for `AGLN_FAST_THREADS`, or PyTorch's choice.
    plan, tune_s: see `Workshop`.
    data: what mIoU is measured on, at any size of input; None for Scenes, at theirs.
    frames: scenes to compare labels on, 1 to 4; 0 for none. memory, accuracy: whether to measure them.
    """

    warmup: int = 1
    iters: int = 5
    budget_s: float | None = None
    device: str = "cpu"
    threads: int | None = None
    plan: PlanChoice = "auto"
    tune_s: float | None = 0
    data: SegmentationDataset | None = None
    frames: int = 2
    memory: bool = True
    accuracy: bool = True


@dataclass(frozen=True)
class Measured:
    """left_out: "what: why" of everything that was asked for and is not in the rows."""

    rows: tuple[Row, ...]
    left_out: tuple[str, ...]


def measure(
    cases: Sequence[Case], entries: Sequence[Entry], options: Options | None = None, progress: Progress | None = None
) -> Measured:
    """A row for each of `entries` in each of `cases`, but for those that cannot run here.

    Raises:
        ConfigError: an unknown network or contestant, or a count that makes no sense.
        BackendError: none of them can run here.
        DeviceLostError: a contestant took the device along with it.
    """
    options = options or Options()
    check_counts(options.warmup, options.iters)
    left_out, able = [], []
    for entry in entries:
        obstacle = contestant(entry.contestant).obstacle(entry.precision, options.device)
        if obstacle is None:
            able.append(entry)
        else:
            left_out.append(f"{entry.name}: {obstacle}")
    if not able:
        raise BackendError(f"no contestant can run here: {'; '.join(left_out)}")
    clock = _Clock(options.budget_s)
    task = None if progress is None else progress.add_task("measure", total=len(cases) * len(able))
    rows: list[Row] = []
    for number, case in enumerate(cases):
        with tempfile.TemporaryDirectory() as folder:
            bench = _Bench(case, options, Path(folder), clock.share(len(cases) - number))

            def show(what: str, case: Case = case) -> None:
                if progress is not None and task is not None:
                    progress.update(task, advance=1, description=f"{case.name}: {what}")

            rows += bench.rows(able, show)
            left_out += [f"{case.name}: {', '.join(what)}: {why}" for why, what in bench.left_out.items()]
    if not rows:
        raise BackendError(f"nothing could be measured: {'; '.join(left_out)}")
    return Measured(tuple(rows), tuple(left_out))


def open_workshop(case: Case, options: Options, folder: Path) -> RaceWorkshop:
    """The files of all contestants in `case`, to be made in `folder`."""
    network = load_checkpoint(case.network) if case.trained else random_network(case.network, case.num_classes)
    contract = IOContract(*case.size, case.batch, case.batch)
    threads = check_threads(options.threads) or torch.get_num_threads()
    return RaceWorkshop(network, contract, folder, threads, options.device, options.plan, options.tune_s)


class _Clock:
    """A wall-clock budget. seconds: None for no end."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float:
        return float("inf") if self._end is None else self._end - time.monotonic()

    def share(self, parts: int, fraction: float = 1.0) -> _Clock:
        """The budget of the first of `parts` that are still to come, or a fraction of it."""
        return _Clock(None if self._end is None else fraction * self.left / parts)


@dataclass
class _Contender:
    """An entry that is open, and what is known of it; times in seconds, memory in MB."""

    entry: Entry
    recipe: Recipe
    opened: Opened
    build_s: float
    times: list[float]
    engine_s: float = 0.0
    agreement: float | None = None
    miou: float | None = None
    memory: float | None = None


class _Bench:
    """One case. left_out: why -> what is not in its rows."""

    def __init__(self, case: Case, options: Options, folder: Path, clock: _Clock) -> None:
        self._case, self._options, self._folder, self._clock = case, options, folder, clock
        self.left_out: dict[str, list[str]] = {}
        self._workshop = open_workshop(case, options, folder)
        self._network = self._workshop.network
        self._cost = complexity(self._network.config, *case.size)[-1]

    def rows(self, entries: Sequence[Entry], show: Callable[[str], None]) -> list[Row]:
        references = self._references()
        image = np.random.default_rng(0).integers(0, 256, self._image_shape, np.uint8)
        if references:
            image = references[0].image
        timing = self._clock.share(1, _TIMED_SHARE)
        opened: list[_Contender] = []
        for entry in entries:
            show(entry.name)
            try:
                opened.append(self._open(entry, image, references))
            except (AglnError, RuntimeError) as error:
                if device_is_lost():
                    raise DeviceLostError(
                        f"{entry.name} broke the device for this process ({str(error).strip().splitlines()[0]}); go on "
                        "in a new one with --resume"
                    ) from error
                self._leave_out(entry.name, str(error).strip().splitlines()[0])
        self._time(opened, image, timing)
        for contender in opened:
            contender.engine_s = self._engine_seconds(contender, image)
            contender.miou = self._accuracy(contender)
            contender.opened.close()
        for contender in opened:
            contender.memory = self._memory(contender)
        return [self._row(contender, opened) for contender in opened]

    @property
    def _image_shape(self) -> tuple[int, int, int, int]:
        return self._case.batch, *self._case.size, 3

    @property
    def _rest_s(self) -> float | None:
        """No rest on a GPU: nobody's threads are in the way, and in a rest it would lower its clock."""
        return None if self._options.device == "cpu" else 0.0

    def _leave_out(self, what: str, why: str) -> None:
        self.left_out.setdefault(why, []).append(what)

    def _references(self) -> list[Reference]:
        if self._options.frames == 0:
            return []
        frames = sample_frames(None, self._workshop.contract)[: self._options.frames]
        return make_reference(self._network, self._workshop.contract, frames)

    def _open(self, entry: Entry, image: Array, references: Sequence[Reference]) -> _Contender:
        recipe, seconds = contestant(entry.contestant).make(self._workshop, entry.precision, entry.plan)
        before = time.perf_counter()
        opened = recipe.open()
        try:
            labels = opened.run(image)  # torch.compile does all its work here
        except BaseException:
            opened.close()
            raise
        seconds += time.perf_counter() - before
        equal = [np.mean(labels == each.labels) for each in references[:1]]
        equal += [np.mean(opened.run(each.image) == each.labels) for each in references[1:]]
        return _Contender(entry, recipe, opened, seconds, [], agreement=float(np.mean(equal)) if equal else None)

    def _time(self, contenders: Sequence[_Contender], image: Array, clock: _Clock) -> None:
        options = self._options
        turns = rounds([partial(contender.opened.run, image) for contender in contenders], self._rest_s)
        for done in range(options.warmup + options.iters):
            interruption.check()
            timed = done - options.warmup
            if timed >= FEWEST_ROUNDS and clock.left < 0:
                self._leave_out(f"{options.iters - timed} of {options.iters} rounds", "the time was over")
                break
            for contender, seconds in zip(contenders, next(turns), strict=True):
                if timed >= 0:
                    contender.times.append(seconds)

    def _engine_seconds(self, contender: _Contender, image: Array) -> float:
        if not contender.recipe.rewrites.low_resolution_labels:
            return statistics.median(contender.times)
        turns = rounds([partial(contender.opened.engine, image)], self._rest_s)
        next(turns)
        return statistics.median(next(turns)[0] for _ in contender.times)

    def _memory(self, contender: _Contender) -> float | None:
        if not self._options.memory:
            return None
        if self._clock.left < 0:
            self._leave_out(f"memory of {contender.entry.name}", "the time was over")
            return None
        if self._options.device != "cpu":
            return device_memory(contender.recipe, self._image_shape)
        try:
            return peak_memory(contender.recipe, self._image_shape, self._folder)
        except BackendError as error:
            self._leave_out(f"memory of {contender.entry.name}", str(error))
            return None

    def _accuracy(self, contender: _Contender) -> float | None:
        """mIoU in percent, of a trained network: on Scenes at the size of its pictures, or on what is asked for."""
        case, entry, data = self._case, contender.entry, self._options.data
        if data is not None and not case.trained:
            self._leave_out(f"mIoU of {entry.name} on {data.class_set.name}", "weights are random")
            return None
        suits = case.batch == 1 and (data is not None or case.size == SCENE_SIZE)
        if not (self._options.accuracy and case.trained and suits):
            return None
        if self._clock.left < 0:
            self._leave_out(f"mIoU of {entry.name}", "the time was over")
            return None
        return _miou(contender.opened, case.size, _scenes() if data is None else data)

    def _row(self, contender: _Contender, contenders: Sequence[_Contender]) -> Row:
        case, entry, times = self._case, contender.entry, contender.times
        median = statistics.median(times)
        peers = [
            other
            for other in contenders
            if not contestant(other.entry.contestant).ours
            and (other.entry.precision == "fp32") == (entry.precision == "fp32")
        ]
        ratio = low = high = None
        if peers:
            best = min(peers, key=lambda other: statistics.median(other.times))
            low, ratio, high = (float(q) for q in np.percentile(np.divide(best.times, times), [10, 50, 90]))
        ours = contestant(entry.contestant).ours
        multiply_adds = self._cost.convolution + self._cost.matmul
        rate = _rate(self._options.device, entry.precision, self._workshop.threads)
        return Row(
            network=case.network,
            contestant=entry.title or entry.contestant,
            ours=ours,
            precision=entry.precision,
            device=self._options.device,
            size=f"{case.size[0]}x{case.size[1]}",
            batch=case.batch,
            num_classes=case.num_classes,
            settings=contender.recipe.settings,
            plan="" if contender.recipe.rewrites == NO_PLAN else str(contender.recipe.rewrites),
            median_ms=1e3 * median,
            p95_ms=1e3 * float(np.percentile(times, 95)),
            p99_ms=1e3 * float(np.percentile(times, 99)),
            engine_ms=1e3 * contender.engine_s,
            images_per_second=case.batch / median,
            ratio=ratio,
            ratio_low=low,
            ratio_high=high,
            peak_memory_mb=contender.memory,
            size_mb=sum(file.stat().st_size for file in contender.recipe.files) / 1e6,
            build_s=contender.build_s,
            gmacs=multiply_adds / 1e9,
            parameters_m=self._cost.parameters / 1e6,
            peak_fraction=None if rate is None else 2 * multiply_adds * case.batch / median / rate,
            agreement=contender.agreement,
            miou=contender.miou,
        )


@cache
def _rate(device: str, precision: Precision, threads: int) -> float | None:
    """Operations per second of a large matrix product; None for int8, which PyTorch's does not have everywhere."""
    if precision == "int8":
        return None
    torch.set_num_threads(threads)
    return product_rate(torch.device(device), dtype_of(precision))


@cache
def _scenes() -> SegmentationDataset:
    return CachedDataset(Scenes("test"))


def _miou(opened: Opened, size: tuple[int, int], dataset: SegmentationDataset) -> float:
    """Percent. Images are stretched to the input's size (height, width), labels brought back to theirs."""
    metrics, contract = SegmentationMetrics(len(dataset.class_set.classes)), IOContract(*size)
    for sample in dataset:
        interruption.check()
        labels = opened.run(fit(sample.image, contract)[0][None])[0]
        metrics.update(decode(labels, sample.labels.shape), sample.labels)
    return 100 * metrics.mean_iou
