"""The files of the contestants, and how to open them: a `Workshop` makes each once, a `Recipe` opens it anywhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from agln_fast.builder.graphs import Graphs
from agln_fast.bundle import Bundle
from agln_fast.contract import IOContract, Precision
from agln_fast.deployment import DeployedNetwork
from agln_fast.engines import open_engine
from agln_fast.engines.base import Array
from agln_fast.engines.tensorrt import compute_capability
from agln_fast.engines.tensorrt_library import Flavour
from agln_fast.engines.torch import exact_float32
from agln_fast.errors import BackendError
from agln_fast.manifest import EngineRecord, Manifest
from agln_fast.models.checkpoint import load_checkpoint, save_checkpoint
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.plan import NO_PLAN, Plan, PlanChoice
from agln_fast.plan.rewrites import rewrite

__all__ = ["HALVES", "EngineRecipe", "Opened", "Recipe", "TorchRecipe", "Workshop"]

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LIBRARIES = {"fused": "torch", "tensorrt-rtx": "tensorrt_rtx"}  # where the import has another name than the backend


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
class Workshop:
    """The files of one network at one size, in a folder that is there; each is made once.

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
    _made: dict[tuple[Any, ...], tuple[Any, float]] = field(default_factory=dict)

    @property
    def bundle(self) -> Bundle:
        """A draft around the folder, as engines are opened from."""
        return Bundle(self.folder, Manifest(self.network.config, (), (), self.contract, ()))

    @cached_property
    def graphs(self) -> Graphs:
        """ONNX files, which plans are chosen by, too."""
        return Graphs(self.network, self.contract, self.folder)

    def weights(self) -> tuple[Path, float]:
        """The reference's weights, and the seconds that writing them took."""
        return self.once("weights", (), lambda: self._save(self.folder / "weights.safetensors"))

    def graph(self, kind: Precision, plan: Plan) -> tuple[Path, float]:
        """The ONNX file with weights of type `kind`, and the seconds that exporting it took."""
        return self.once("graph", (kind, plan), lambda: self.graphs(kind, plan))

    def quantised(self, plan: Plan) -> tuple[Path, float]:
        """The OpenVINO IR in int8, and the seconds of export, calibration and quantisation."""
        return self.once("int8", (plan,), lambda: self._quantise(plan))

    def tensorrt(self, flavour: Flavour, precision: Precision, plan: Plan) -> tuple[Path, float]:
        """The engine of TensorRT or TensorRT-RTX for this machine's GPU, and the seconds of export and build."""
        return self.once(flavour, (precision, plan), lambda: self._build_tensorrt(flavour, precision, plan))

    def chosen(self, backend: str, precision: Precision) -> tuple[Plan, float]:
        """The plan of our engine, and the seconds that choosing it took."""
        return self.once("plan", (backend, precision, self.plan), lambda: self._choose(backend, precision))

    def once(self, what: str, key: tuple[Any, ...], make: Callable[[], Any]) -> tuple[Any, float]:
        """What `make` returned when it was first called for `what` and `key`, and the seconds that it took."""
        if (what, *key) not in self._made:
            began = time.perf_counter()
            value = make()
            self._made[what, *key] = value, time.perf_counter() - began
        return self._made[what, *key]

    def _name(self, suffix: str) -> Path:
        return self.folder / f"{len(self._made)}.{suffix}"

    def _save(self, file: Path) -> Path:
        save_checkpoint(self.network, file)
        return file

    def _quantise(self, plan: Plan) -> Path:
        from agln_fast.builder.build import calibration_frames
        from agln_fast.export.quantize import quantize_onnx

        graph, _ = self.graph("fp32", plan)
        file = self._name("int8.xml")
        quantize_onnx(graph, file, calibration_frames(self.contract), self.contract)
        return file

    def _build_tensorrt(self, flavour: Flavour, precision: Precision, plan: Plan) -> Path:
        from agln_fast.export.tensorrt import build_tensorrt_engine

        graph, _ = self.graph(precision, plan)
        file = self._name("engine")
        capability = compute_capability()
        capabilities = [capability] if capability and flavour == "tensorrt-rtx" else []
        build_tensorrt_engine(graph, file, flavour=flavour, precision=precision, compute_capabilities=capabilities)
        return file

    def _choose(self, backend: str, precision: Precision) -> Plan:
        from agln_fast.builder.tune import suitable, tune_engine

        if isinstance(self.plan, Plan):
            return suitable(self.plan, backend, precision)
        if self.plan == "none":
            return NO_PLAN
        return tune_engine(self.graphs, backend, precision, budget_s=self.tune_s, threads=self.threads).plan


@dataclass(frozen=True)
class EngineRecipe:
    """An engine of one of our backends, on a plain or planned graph."""

    bundle: Bundle
    record: EngineRecord
    device: str
    threads: int
    settings: str

    @property
    def rewrites(self) -> Plan:
        return self.record.plan

    @property
    def files(self) -> list[Path]:
        file = self.bundle.path / self.record.file
        return [file, *([file.with_suffix(".bin")] if file.suffix == ".xml" else [])]

    @property
    def library(self) -> str:
        return _LIBRARIES.get(self.record.backend, self.record.backend)

    def open(self) -> Opened:
        return _OpenedEngine(self)


class _OpenedEngine:
    def __init__(self, recipe: EngineRecipe) -> None:
        self._backend = open_engine(recipe.bundle, recipe.record, device=recipe.device, threads=recipe.threads)
        self.run, self.engine, self.close = self._backend.run, self._backend.run_graph, self._backend.close


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
            self._network = cast(
                Callable[[Tensor], Tensor], torch.compile(deployed, mode=recipe.compile_mode, dynamic=False)
            )

    def run(self, image: Array) -> Array:
        return self._thread.submit(self._run, image).result()

    @torch.inference_mode()
    def _run(self, image: Array) -> Array:
        if self._network is None:
            raise BackendError("torch: this contestant is closed; open it again")
        recipe = self._recipe
        kind = torch.device(recipe.device).type
        half = HALVES.get(recipe.precision)
        autocast = torch.autocast(kind, half, enabled=half is not None)
        with exact_float32(benchmark=True), autocast, _frozen(kind):
            return cast(Array, self._network(torch.from_numpy(image).to(recipe.device)).cpu().numpy())

    engine = run

    def close(self) -> None:
        self._network = None


def _start_thread(threads: int) -> None:
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)


def _frozen(kind: str) -> AbstractContextManager[None]:
    """Weights are constants to the compiler: on the CPU it packs them beforehand. Read when it compiles, not before."""
    from torch._inductor import config

    return cast(AbstractContextManager[None], config.patch(freezing=kind == "cpu"))
