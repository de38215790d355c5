"""The files of the contestants, made once by a `RaceWorkshop`, and how to open them, anywhere, by a `Recipe`."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from agln_fast.artefact import Artefact
from agln_fast.builder.tune import choose_plan
from agln_fast.builder.workshop import Workshop
from agln_fast.contract import IOContract
from agln_fast.cuda import compute_capability
from agln_fast.deployment import DeployedNetwork
from agln_fast.engines import EngineKind, open_engine
from agln_fast.engines.base import Array
from agln_fast.engines.torch_network import dtype_of, exact_float32
from agln_fast.errors import BackendError
from agln_fast.models.checkpoint import load_checkpoint
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.plan import NO_PLAN, Plan, PlanChoice
from agln_fast.plan.rewrites import rewrite
from agln_fast.precision import PRECISIONS, Precision

__all__ = ["EngineRecipe", "Opened", "RaceWorkshop", "Recipe", "TorchRecipe"]

T = TypeVar("T")


class Opened(Protocol):
    """A contestant that is ready: `image` is (B, H, W, 3) uint8 in host memory, and so are the labels (B, H, W)."""

    def run(self, image: Array) -> Array:
        """The labels, which belong to the caller."""

    def engine(self, image: Array) -> object:
        """The compiled network alone, without what the host does with its output."""

    def close(self) -> None:
        """Release everything; nothing runs afterwards."""


class Recipe(Protocol):
    """How to open what lies on the disk; can be pickled.

    settings, plan: as in `Row`. rewrites: what `plan` stands for.
    """

    @property
    def settings(self) -> str: ...

    @property
    def rewrites(self) -> Plan: ...

    @property
    def files(self) -> list[Path]:
        """Graph, weights, engine: what is stored."""

    @property
    def library(self) -> str:
        """The module that does the work."""

    def open(self) -> Opened:
        """
        Raises:
            BackendError: it cannot run here.
        """


@dataclass
class RaceWorkshop:
    """The files of all contestants on one network at one size, in a folder that is there; each is made once.

    plan: of our engines: "auto", "none", or a plan for all of them.
    tune_s: seconds for choosing each plan by timing; 0 goes by the cost model, None is a short race.
    device: "cpu", "cuda", "cuda:1".
    threads: CPU threads, the same for every contestant.
    """

    network: SegmentationNetwork
    contract: IOContract
    folder: Path
    threads: int
    device: str = "cpu"
    plan: PlanChoice = "auto"
    tune_s: float | None = 0
    _known: dict[Hashable, tuple[Any, float]] = field(default_factory=dict)

    @cached_property
    def files(self) -> Workshop:
        """What engines are made with, for this machine's GPU."""
        capability = None if self.device == "cpu" else compute_capability(int(self.device.partition(":")[2] or 0))
        return Workshop(
            self.network, self.contract, self.folder, compute_capabilities=(capability,) if capability else ()
        )

    def weights(self) -> tuple[Path, float]:
        """The reference's weights, and the seconds that writing them took."""
        file = self.files.weights()
        return file, self.files.seconds(file)

    def engine(self, kind: EngineKind, precision: Precision, plan: Plan) -> tuple[Artefact, float]:
        """What an engine is opened from, and the seconds that making it took."""
        artefact = kind.make(self.files, precision, plan)
        return artefact, self.files.seconds(artefact.file)

    def chosen(self, kind: EngineKind, precision: Precision, asked: PlanChoice | None = None) -> tuple[Plan, float]:
        """The plan of our engine, and the seconds that choosing it took; `asked` is None for `plan`."""
        choice = self.plan if asked is None else asked
        return self.once(
            ("plan", kind.name, precision, choice),
            lambda: choose_plan(self.files, kind, precision, choice, budget_s=self.tune_s, threads=self.threads)[0],
        )

    def once(self, key: Hashable, find: Callable[[], T]) -> tuple[T, float]:
        """What `find` returned when it was first called for `key`, and the seconds that it took beside those of files,
        which count where the files are used."""
        if key not in self._known:
            began, files_s = time.perf_counter(), -self.files.spent
            value = find()
            files_s += self.files.spent
            self._known[key] = value, time.perf_counter() - began - files_s
        return self._known[key]


@dataclass(frozen=True)
class EngineRecipe:
    """An engine of one of our kinds, on a plain or planned graph. library: the module that does the work."""

    artefact: Artefact
    device: str
    threads: int
    settings: str
    library: str

    @property
    def rewrites(self) -> Plan:
        return self.artefact.plan

    @property
    def files(self) -> list[Path]:
        return list(self.artefact.files)

    def open(self) -> Opened:
        return _OpenedEngine(self)


class _OpenedEngine:
    def __init__(self, recipe: EngineRecipe) -> None:
        engine = open_engine(recipe.artefact, device=recipe.device, threads=recipe.threads)
        self.run, self.engine, self.close = engine.run, engine.run_graph, engine.close


@dataclass(frozen=True)
class TorchRecipe:
    """The reference module in PyTorch, rewritten as `rewrites` say. compile_mode: of torch.compile; empty for eager."""

    weights: Path
    contract: IOContract
    precision: Precision
    device: str
    threads: int
    compile_mode: str
    channels_last: bool
    settings: str
    rewrites: Plan = NO_PLAN

    @property
    def files(self) -> list[Path]:
        return [self.weights]

    @property
    def library(self) -> str:
        return "torch._inductor.compile_fx" if self.compile_mode else "torch"

    def open(self) -> Opened:
        model = load_checkpoint(self.weights)
        network = model if self.rewrites == NO_PLAN else rewrite(model, self.rewrites)
        return _OpenedTorch(self, network, model.config.num_classes)


class _OpenedTorch:
    def __init__(self, recipe: TorchRecipe, network: nn.Module, num_classes: int) -> None:
        self._recipe = recipe
        # PyTorch's threads compute with denormals as zero if the thread that starts them does: it is a new one.
        self._thread = ThreadPoolExecutor(1, initializer=_start_thread, initargs=(recipe.threads,))
        deployed = DeployedNetwork(network.to(recipe.device).eval(), recipe.contract, num_classes)
        if recipe.channels_last:
            deployed = deployed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._network: Callable[[Tensor], Tensor] | None = deployed
        if recipe.compile_mode:
            _compiled.add(self)
            self._network = cast(
                Callable[[Tensor], Tensor], torch.compile(deployed, mode=recipe.compile_mode, dynamic=False)
            )

    def run(self, image: Array) -> Array:
        if self._network is None:
            raise BackendError("torch: this contestant is closed; open it again")
        return self._thread.submit(self._run, image).result()

    @torch.inference_mode()
    def _run(self, image: Array) -> Array:
        network, recipe = self._network, self._recipe
        assert network is not None
        kind = torch.device(recipe.device).type
        half = PRECISIONS[recipe.precision].half
        autocast = torch.autocast(kind, dtype_of(recipe.precision) if half else None, enabled=half)
        with exact_float32(benchmark=True), autocast, _compiling(kind):
            return cast(Array, network(torch.from_numpy(image).to(recipe.device)).cpu().numpy())

    engine = run

    def close(self) -> None:
        self._network = None
        self._thread.shutdown()
        _compiled.discard(self)
        if self._recipe.compile_mode and not _compiled:
            # What it has compiled for networks that are gone counts towards a limit, behind which it compiles no more.
            torch._dynamo.reset()


_compiled: WeakSet[_OpenedTorch] = WeakSet()


def _start_thread(threads: int) -> None:
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)


@contextmanager
def _compiling(kind: str) -> Iterator[None]:
    """Weights are constants to the compiler: on the CPU it packs them beforehand. What it does not compile is an error,
    and no eager network under its name. Read when it compiles, not before."""
    from torch._dynamo import config as tracer
    from torch._inductor import config

    with config.patch(freezing=kind == "cpu"), tracer.patch(fail_on_recompile_limit_hit=True):
        yield
