"""Who takes part: PyTorch, and every kind of engine, on the plain network and on the planned one.

Peers get the plain export, `NO_PLAN`; ours get the plan of the workshop, and are made as `build` makes them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch

from agln_fast.bench.race.workshop import EngineRecipe, RaceWorkshop, Recipe, TorchRecipe
from agln_fast.engines import KINDS, REFERENCE, EngineKind, NetworkKind
from agln_fast.errors import AglnError, choose
from agln_fast.plan.plan import NO_PLAN, PlanChoice
from agln_fast.precision import PRECISIONS, Precision
from agln_fast.runtime.turns import rounds

__all__ = ["PYTORCH", "Contestant", "contestant", "contestants"]

_COMPILERS = "g++", "clang++", "c++", "cl"


class _Maker(Protocol):
    def __call__(
        self, workshop: RaceWorkshop, precision: Precision, plan: PlanChoice | None = None
    ) -> tuple[Recipe, float]: ...


@dataclass(frozen=True)
class Contestant:
    """An entry of the registry.

    precisions: what it runs in, on any device. devices: "cpu", "cuda".
    description: of its settings, for readers.
    make: files and recipe for a workshop, a precision and a plan (None for the workshop's), and the seconds that making
        the files took.
    kind: of our engines, which knows what it needs; None for PyTorch. compiles: by torch.compile.
    planned_for: the kind whose best plan it takes; None for none.
    """

    name: str
    ours: bool
    precisions: tuple[Precision, ...]
    devices: tuple[str, ...]
    description: str
    make: _Maker
    kind: EngineKind | None = None
    compiles: bool = False
    planned_for: EngineKind | None = None

    def obstacle(self, precision: Precision, device: str = "cpu") -> str | None:
        """Why it cannot run on this machine and what to do about it, or None. Opens nothing."""
        if self.kind is not None:
            if obstacle := self.kind.obstacle(precision, device):
                return obstacle
            try:
                self.kind.check_make(precision)
            except AglnError as error:
                return str(error)
            return None
        where = device.partition(":")[0]
        if precision not in self.precisions:
            return f"{self.name} has no {precision}: it runs in {', '.join(self.precisions)}"
        if where not in self.devices:
            return f"{self.name} runs on {' and '.join(self.devices)}, not on {device}"
        if where == "cuda" and not torch.cuda.is_available():
            return "there is no CUDA device"
        if (precision == "fp16") > (where == "cuda"):
            return "PyTorch's half precision on CPUs is bf16"
        if self.compiles and where == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", ""), *_COMPILERS))):
            return f"torch.compile needs a C++ compiler: install one of {', '.join(_COMPILERS)}, or set CXX"
        return None

    def reason_to_wait(self, precision: Precision, device: str = "cpu") -> str | None:
        """Why only a full run has it, or None."""
        if self.compiles:
            return "torch.compile takes a minute or more for each network"
        if precision == "int8":
            return "calibration and quantisation take minutes"
        if isinstance(self.kind, NetworkKind) and not device.startswith("cuda"):
            return "on CPUs it computes as PyTorch does, without kernels of its own"
        return None


def contestants() -> dict[str, Contestant]:
    """Everyone by name, PyTorch first."""
    ours = [_of(kind, planned=True) for kind in KINDS.values() if kind.name != REFERENCE]
    peers = [_of(kind, planned=False) for kind in KINDS.values() if kind.plans != "fixed"]
    return {**PYTORCH, **{entry.name: entry for entry in (*peers, *ours)}}


def contestant(name: str) -> Contestant:
    """
    Raises:
        ConfigError: there is no such contestant.
    """
    known = contestants()
    return known[choose("contestant", name, known)]


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _torch(compile_mode: str, planned: bool = False) -> _Maker:
    def make(workshop: RaceWorkshop, precision: Precision, plan: PlanChoice | None = None) -> tuple[Recipe, float]:
        file, seconds = workshop.weights()
        rewrites = NO_PLAN
        if planned:  # what it makes of convolutions and products is oneDNN's, as in OpenVINO
            rewrites, more = workshop.chosen(KINDS["openvino"], precision, plan)
            rewrites, seconds = replace(rewrites, low_resolution_labels=False), seconds + more

        def recipe(channels_last: bool) -> TorchRecipe:
            words = [
                f"torch.compile {compile_mode}" if compile_mode else "eager",
                "inference_mode",
                *([f"autocast {precision}"] if PRECISIONS[precision].half else []),
                *(["channels_last"] if channels_last else []),
                "flush_denormal",
                *(["freezing"] if compile_mode and workshop.device == "cpu" else []),
                _threads(workshop.threads),
            ]
            return TorchRecipe(
                file,
                workshop.contract,
                precision,
                workshop.device,
                workshop.threads,
                compile_mode,
                channels_last,
                ", ".join(words),
                rewrites,
            )

        if compile_mode:
            return recipe(True), seconds
        faster, check_s = workshop.once(("layout", precision), lambda: _faster_layout(workshop, recipe))
        return recipe(faster), seconds + check_s

    return make


def _faster_layout(workshop: RaceWorkshop, recipe: Callable[[bool], TorchRecipe]) -> bool:
    """Whether channels_last is faster: the better of two runs each, after one that warms up."""
    contract = workshop.contract
    image = np.random.default_rng(0).integers(
        0, 256, (contract.max_batch, contract.height, contract.width, 3), np.uint8
    )
    best = []
    for channels_last in (False, True):
        opened = recipe(channels_last).open()
        turns = rounds([partial(opened.run, image)])
        _, *seconds = (next(turns)[0] for _ in range(3))
        opened.close()
        best.append(min(seconds))
    return best[1] < best[0]


def _engine(kind: EngineKind, planned: bool) -> _Maker:
    def make(workshop: RaceWorkshop, precision: Precision, plan: PlanChoice | None = None) -> tuple[Recipe, float]:
        rewrites, seconds = workshop.chosen(kind, precision, plan) if planned else (NO_PLAN, 0.0)
        artefact, more = workshop.engine(kind, precision, rewrites)
        words = [kind.settings]
        if workshop.device == "cpu":
            words.append(_threads(workshop.threads))
        recipe = EngineRecipe(artefact, workshop.device, workshop.threads, ", ".join(words), kind.module or "agln_fast")
        return recipe, seconds + more

    return make


def _pytorch(name: str, precisions: tuple[Precision, ...], description: str, mode: str = "") -> Contestant:
    return Contestant(name, False, precisions, ("cpu", "cuda"), description, _torch(mode), compiles=bool(mode))


def _of(kind: EngineKind, planned: bool) -> Contestant:
    name, words = (f"planned {kind.name}", "rewritten; ") if planned else (kind.name, "")
    return Contestant(
        name,
        planned,
        kind.precisions,
        kind.devices,
        words + kind.settings,
        _engine(kind, planned),
        kind,
        planned_for=kind if planned and kind.plans != "fixed" else None,
    )


_PYTORCH = (
    _pytorch("torch", ("fp32",), "eager, inference_mode, flush_denormal, channels_last where that is faster"),
    _pytorch("torch autocast", ("bf16", "fp16"), "as torch, under autocast: bf16 on CPUs, fp16 on GPUs"),
    _pytorch("torch.compile", ("fp32", "bf16", "fp16"), "as torch, compiled in mode default, freezing", "default"),
    # On CPUs convolutions and products are oneDNN's in either mode.
    replace(
        _pytorch("torch.compile max-autotune", ("fp32", "bf16", "fp16"), "as torch, compiled so", "max-autotune"),
        devices=("cuda",),
    ),
    Contestant(
        "planned torch.compile",
        True,
        ("fp32", "bf16"),
        ("cpu",),
        "rewritten; as torch.compile",
        _torch("default", planned=True),
        compiles=True,
        planned_for=KINDS["openvino"],
    ),
)
PYTORCH = {entry.name: entry for entry in _PYTORCH}
"""PyTorch in its ways, by name."""
