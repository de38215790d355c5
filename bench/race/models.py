"""FPN, AGLN and AGLN-Lite on one device: eager PyTorch, autocast, torch.compile and the fused runtime, in turns.

    python -m agln_fast.bench.race.models [--networks NAME ...] [--sizes 512x512 ...] [--out FILE.json] [--budget S]

Every contestant takes a uint8 image that lies on the device, and leaves labels there. Weights are random, so that every
branch carries signal. The shipped checkpoints come first: how many labels half precision, fused, leaves as they are.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agln_fast.bench.pages.tables import model_table
from agln_fast.bench.race.report import DEVICE_LOST, Report, describe, device_is_lost
from agln_fast.bench.race.timing import capture, elapsed_ms
from agln_fast.bench.race.weights import random_network
from agln_fast.contract import IOContract
from agln_fast.deployment import DeployedNetwork
from agln_fast.engines.fused_network import FusedDeployment
from agln_fast.engines.torch_network import exact_float32
from agln_fast.machine import machine
from agln_fast.models.checkpoint import load_checkpoint
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.models.shipped import list_checkpoints
from agln_fast.plan.convolution import choose_convolutions
from agln_fast.plan.fuse import fuse
from agln_fast.runtime.verify import sample_images

__all__ = ["CONTESTANTS", "Agreement", "Case", "Row", "compare", "compare_checkpoint", "jobs", "main"]

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
NETWORKS = [f"{name}_resnet{depth}" for depth in (50, 101) for name in ("agln_release", "fpn", "agln_lite")]

_BASELINE = "compile"
_HEADLINE = 3  # cases that are measured whole before anything else
_WARM_UP = 3  # runs: kernels are compiled, algorithms chosen, graphs recorded
_FEWEST_ROUNDS, _ROUND_SECONDS = 5, 20.0  # a slow case ends when both are reached
_DRAWN = 2  # different images in a batch
_CHECKED = 16  # images for a checkpoint, each 128x128
_UNFINISHED = "the process ended before it was measured"


@dataclass(frozen=True)
class Case:
    """One network at one size and batch, in the half precision (or "fp32") of all contestants but `eager`."""

    network: str
    size: tuple[int, int]
    batch: int
    precision: str
    num_classes: int = 59

    @property
    def name(self) -> str:
        return f"{self.network} {self.size[0]}x{self.size[1]} batch {self.batch} {self.precision}"


@dataclass(frozen=True)
class Row:
    """One contestant in one case.

    median_ms, p95_ms: between CUDA events, from an idle device to an idle device; by the host's clock on a CPU.
    speedup: median over the rounds of the time of `compile` to this one's; None without it.
    agreement: share of pixels with the label of the eager fp32 network.
    memory_mib: what PyTorch holds of the device for one run, weights included; None on a CPU.
    """

    case: str
    contestant: str
    median_ms: float
    p95_ms: float
    images_per_second: float
    speedup: float | None
    agreement: float
    memory_mib: float | None
    rounds: int


@dataclass(frozen=True)
class Agreement:
    """A trained checkpoint, fused: share of pixels with the label of the eager fp32 network."""

    case: str
    contestant: str
    agreement: float
    images: int


@dataclass(frozen=True)
class _Subject:
    """What a contestant gets: the reference network, on the CPU, and where and how to run it on `image`."""

    network: SegmentationNetwork
    image: Tensor
    precision: str

    def deployed(self) -> DeployedNetwork:
        """A copy of the network on the image's device, with normalisation before it and argmax behind."""
        network = copy.deepcopy(self.network).to(self.image.device)
        return DeployedNetwork(network, self.contract, network.config.num_classes)

    @property
    def contract(self) -> IOContract:
        return IOContract(self.image.shape[1], self.image.shape[2], max_batch=self.image.shape[0])


_Run = Callable[[], Tensor]


def _eager(subject: _Subject) -> _Run:
    deployed = subject.deployed()
    return lambda: deployed(subject.image)


def _autocast(subject: _Subject) -> _Run:
    return _under_autocast(subject, _channels_last(subject.deployed()))


def _compile(subject: _Subject) -> _Run:
    return _under_autocast(subject, _compiled(_channels_last(subject.deployed())))


def _compile_half(subject: _Subject) -> _Run:
    """Without autocast, which converts the weights in every run."""
    compiled = _compiled(_channels_last(subject.deployed().to(DTYPES[subject.precision])))
    return lambda: compiled(subject.image)


_Network = Callable[[Tensor], Tensor]


def _channels_last(deployed: DeployedNetwork) -> DeployedNetwork:
    converted: DeployedNetwork = deployed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return converted


def _compiled(deployed: DeployedNetwork) -> _Network:
    compiled: _Network = torch.compile(deployed, mode="max-autotune", dynamic=False)
    return compiled


def _under_autocast(subject: _Subject, network: _Network) -> _Run:
    kind, half = subject.image.device.type, subject.precision != "fp32"

    def run() -> Tensor:
        with torch.autocast(kind, DTYPES[subject.precision] if half else None, enabled=half, cache_enabled=False):
            return network(subject.image)

    return run


def _fused(subject: _Subject) -> _Run:
    network = fuse(subject.network).to(subject.image.device, DTYPES[subject.precision])
    deployed = FusedDeployment(network, subject.contract, network.config.num_classes)
    choose_convolutions(deployed, subject.image)
    return lambda: deployed(subject.image)


def _fused_graph(subject: _Subject) -> _Run:
    run = _fused(subject)
    for _ in range(_WARM_UP):
        run()
    return capture(run)


CONTESTANTS: dict[str, Callable[[_Subject], _Run]] = {
    "eager": _eager,
    "autocast": _autocast,
    "fused": _fused,
    "fused+graph": _fused_graph,
    "compile": _compile,
    "compile-half": _compile_half,
}


def jobs(cases: Sequence[Case], contestants: Sequence[str]) -> Iterator[tuple[Case, list[str]]]:
    """In which order what is measured, if the time may end before all is done.

    torch.compile takes minutes for each case. The first cases are measured without it, and then again with all
    contestants in turns; the others wait for theirs until every case has been measured without.
    """
    whole = list(contestants)
    quick = [name for name in whole if not name.startswith("compile")]
    passes = [quick, whole] if 0 < len(quick) < len(whole) else [whole]
    for case in cases[:_HEADLINE]:
        for names in passes:
            yield case, names
    for names in passes:
        for case in cases[_HEADLINE:]:
            yield case, names


def compare(case: Case, contestants: Sequence[str], device: torch.device, report: Report, *, rounds: int = 30) -> None:
    """Prepare the contestants one after the other, then time them in turns; each row goes to the report.

    One that cannot be prepared is reported as failed, and the others go on without it. What failed before is left
    alone; if all stand in the report, nothing is done. If a contestant takes the device along with it, those before it
    leave the report, for the next process to measure them.
    """
    known = {name: report.row(case.name, name) for name in contestants}
    if all(known.values()):
        return
    torch.compiler.reset()
    image = _images(case.size)[[i % _DRAWN for i in range(case.batch)]].to(device)
    subject = _Subject(_network(case.network, case.num_classes), image, case.precision)
    opened: dict[str, _Opened] = {}
    with exact_float32(benchmark=True):
        labels = torch.inference_mode()(_eager(subject))()
        for name in contestants:
            if "error" in (known[name] or {}):
                continue
            if known[name] is None:
                report.put(_failure(case.name, name, _UNFINISHED))
            try:
                opened[name] = _open(name, subject, labels)
            except Exception as error:
                report.put(_failure(case.name, name, describe(error)))
                if device_is_lost():
                    for other in opened:
                        if known[other] is None:
                            report.drop(case.name, other)
                    return
        times = _in_turns({name: contestant.run for name, contestant in opened.items()}, device, rounds)
    for name, contestant in opened.items():
        median = statistics.median(times[name])
        baseline = times.get(_BASELINE)
        row = Row(
            case=case.name,
            contestant=name,
            median_ms=median,
            p95_ms=float(np.percentile(times[name], 95)),
            images_per_second=1e3 * case.batch / median,
            speedup=None if baseline is None else float(np.median(np.divide(baseline, times[name]))),
            agreement=contestant.agreement,
            memory_mib=contestant.memory_mib,
            rounds=len(times[name]),
        )
        report.put(asdict(row))


def compare_checkpoint(name: str, precision: str, device: torch.device, report: Report) -> None:
    """The shipped checkpoint `name`, fused, against itself in eager fp32, on images of the test split of Scenes."""
    case = f"{name} checkpoint 128x128 {precision}"
    if report.row(case, "fused") is not None:
        return
    report.put(_failure(case, "fused", _UNFINISHED))
    try:
        images = torch.from_numpy(np.stack(sample_images(_CHECKED, 128, 128))).to(device)
        subject = _Subject(load_checkpoint(name), images, precision)
        with exact_float32(), torch.inference_mode():
            agreement = _agreement(_fused(subject)(), _eager(subject)())
        report.put(asdict(Agreement(case, "fused", agreement, _CHECKED)))
    except Exception as error:
        report.put(_failure(case, "fused", describe(error)))


@dataclass(frozen=True)
class _Opened:
    """A contestant after its first runs."""

    run: _Run
    agreement: float
    memory_mib: float | None


def _open(name: str, subject: _Subject, labels: Tensor) -> _Opened:
    cuda = subject.image.is_cuda
    before = 0
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
    run = torch.inference_mode()(CONTESTANTS[name](subject))
    for _ in range(_WARM_UP if cuda else 0):
        run()
    agreement = _agreement(run(), labels)
    if not cuda:
        return _Opened(run, agreement, None)
    # Only now: what the search for algorithms took does not count. What graphs hold is reserved, but not allocated.
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return _Opened(run, agreement, (torch.cuda.max_memory_reserved() - before) / 2**20)


def _in_turns(runs: dict[str, _Run], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each; one round runs every contestant once, so that drift of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    began = time.monotonic()
    for done in range(rounds):
        if done >= _FEWEST_ROUNDS and time.monotonic() - began > _ROUND_SECONDS:
            break
        for name, run in runs.items():
            times[name].append(elapsed_ms(run, device))
    return times


def _agreement(labels: Tensor, reference: Tensor) -> float:
    return (labels == reference).float().mean().item()


def _failure(case: str, contestant: str, error: str) -> dict[str, Any]:
    return {"case": case, "contestant": contestant, "error": error}


@lru_cache
def _network(name: str, num_classes: int) -> SegmentationNetwork:
    return random_network(name, num_classes)


@lru_cache
def _images(size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(np.stack(sample_images(_DRAWN, *size)))


def _size(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; returns the exit status."""
    cuda = torch.cuda.is_available()
    names = list(CONTESTANTS)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS if cuda else ["agln_nano"], help="presets")
    parser.add_argument(
        "--sizes",
        nargs="+",
        type=_size,
        default=[(512, 512), (480, 480), (1024, 2048)] if cuda else [(64, 64)],
        metavar="HxW",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8] if cuda else [1])
    parser.add_argument(
        "--contestants", nargs="+", choices=names, default=names[:5] if cuda else ["eager", "autocast", "fused"]
    )
    parser.add_argument("--precision", choices=list(DTYPES), default="fp16", help="of all but eager, which is fp32")
    parser.add_argument("--num-classes", type=int, default=59)
    parser.add_argument("--rounds", type=int, default=30 if cuda else 5)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no case later than this")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON, written after each case; go on if it is there")
    options = parser.parse_args(arguments)
    report = Report(options.out, machine=machine())
    lost = _measure(options, report)
    if options.out is None:
        print(model_table(report.rows))
    return DEVICE_LOST if lost else int(any("error" in row for row in report.rows))


def _measure(options: argparse.Namespace, report: Report) -> bool:
    """Everything that the options ask for, until the device is lost: then True is returned at once."""
    began = time.monotonic()
    device = torch.device(options.device)
    for name in list_checkpoints():
        compare_checkpoint(name, options.precision, device, report)
        if device_is_lost():
            return True
    cases = [
        Case(network, size, batch, options.precision, options.num_classes)
        for size, batch, network in product(options.sizes, options.batches, options.networks)
    ]
    interrupted = False
    for case, contestants in jobs(cases, options.contestants):
        late = interrupted or (options.budget is not None and time.monotonic() - began > options.budget)
        rows = partial(_rows, report, case, contestants)
        try:
            if not late:
                print(f"{case.name}: {', '.join(contestants)}", file=sys.stderr, flush=True)
                compare(case, contestants, device, report, rounds=options.rounds)
        except KeyboardInterrupt:
            interrupted = late = True
            for name, row in rows():
                if row is not None and row.get("error") == _UNFINISHED:
                    report.drop(case.name, name)
        except Exception as error:
            for name, row in rows():
                if row is None or "error" in row:
                    report.put(_failure(case.name, name, describe(error)))
        if device_is_lost():
            return True
        for name, row in rows():
            if late and row is None:
                report.put({"case": case.name, "contestant": name, "left_out": "the time was over"})
    return False


def _rows(report: Report, case: Case, contestants: Sequence[str]) -> list[tuple[str, dict[str, Any] | None]]:
    return [(name, report.row(case.name, name)) for name in contestants]


if __name__ == "__main__":
    sys.exit(main())
