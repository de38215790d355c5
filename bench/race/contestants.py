"""Who takes part: PyTorch, ONNX Runtime, OpenVINO, TensorRT on the plain network, and our engines on the planned one.

Peers get the plain export, `NO_PLAN`; ours get the plan of the workshop, and are made by the functions that `build`
calls.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import cast, get_args

import numpy as np
import torch

from agln_fast.bench.race.workshop import HALVES, EngineRecipe, Recipe, TorchRecipe, Workshop
from agln_fast.contract import Precision
from agln_fast.engines import backend_class
from agln_fast.engines.tensorrt import compute_capability
from agln_fast.engines.tensorrt_library import Flavour, library_version
from agln_fast.errors import choose
from agln_fast.manifest import EngineRecord
from agln_fast.plan.plan import NO_PLAN, Plan
from agln_fast.runtime.turns import rounds

__all__ = ["CONTESTANTS", "Contestant", "contestant"]

_COMPILERS = "g++", "clang++", "c++", "cl"

_Maker = Callable[[Workshop, Precision], tuple[Recipe, float]]


@dataclass(frozen=True)
class Contestant:
    """An entry of the registry.

    precisions: what it runs in, on any device. devices: "cpu", "cuda".
    description: of its settings, for readers.
    make: files and recipe for a workshop and a precision, and the seconds that making the files took.
    backend: of agln-fast, whose class knows what it needs; empty for PyTorch. compiles: by torch.compile.
    planned_for: the backend whose best plan it takes; empty for none.
    """

    name: str
    ours: bool
    precisions: tuple[Precision, ...]
    devices: tuple[str, ...]
    description: str
    make: _Maker
    backend: str = ""
    compiles: bool = False
    planned_for: str = ""

    def obstacle(self, precision: Precision, device: str = "cpu") -> str | None:
        """Why it cannot run on this machine and what to do about it, or None. Opens nothing."""
        kind = device.partition(":")[0]
        if precision not in self.precisions:
            return f"{self.name} has no {precision}: it runs in {', '.join(self.precisions)}"
        if kind not in self.devices:
            return f"{self.name} runs on {' and '.join(self.devices)}, not on {device}"
        if kind == "cuda" and not torch.cuda.is_available():
            return "there is no CUDA device"
        if not self.backend and (precision == "fp16") > (kind == "cuda"):
            return "PyTorch's half precision on CPUs is bf16"
        if self.compiles and kind == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", ""), *_COMPILERS))):
            return f"torch.compile needs a C++ compiler: install one of {', '.join(_COMPILERS)}, or set CXX"
        if precision == "int8" and find_spec("nncf") is None:
            return 'package "nncf" is not installed: pip install "agln-fast[int8]"'
        if self.backend == "onnxruntime" and kind == "cpu" and precision == "fp16":
            return "onnxruntime has no fp16 convolution on x86 CPUs; take fp32"
        if not self.backend:
            return None
        return backend_class(self.backend).obstacle(_record(self.backend, precision, "", kind, NO_PLAN))

    def reason_to_wait(self, precision: Precision, device: str = "cpu") -> str | None:
        """Why only a full run has it, or None."""
        if self.compiles:
            return "torch.compile takes a minute or more for each network"
        if precision == "int8":
            return "calibration and quantisation take minutes"
        if self.backend == "fused" and not device.startswith("cuda"):
            return "on CPUs it computes as PyTorch does, without kernels of its own"
        return None


def contestant(name: str) -> Contestant:
    """
    Raises:
        ConfigError: there is no such contestant.
    """
    return CONTESTANTS[choose("contestant", name, CONTESTANTS)]


def _record(backend: str, precision: Precision, file: str, kind: str, plan: Plan) -> EngineRecord:
    name, capability = f"{backend}-{precision}", compute_capability()
    if backend not in get_args(Flavour):
        return EngineRecord(name, backend, precision, file, kind, plan=plan)
    flavour = cast(Flavour, backend)
    return EngineRecord(
        name,
        backend,
        precision,
        file,
        backend,
        versions={flavour: library_version(flavour) or ""},
        compute_capabilities=(capability,) if capability else (),
        plan=plan,
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def _torch(compile_mode: str, planned: bool = False) -> _Maker:
    def make(workshop: Workshop, precision: Precision) -> tuple[Recipe, float]:
        file, seconds = workshop.weights()
        plan = NO_PLAN
        if planned:  # what it makes of convolutions and products is oneDNN's, as in OpenVINO
            plan, more = workshop.chosen("openvino", precision)
            plan, seconds = replace(plan, low_resolution_labels=False), seconds + more

        def recipe(channels_last: bool) -> TorchRecipe:
            words = [
                f"torch.compile {compile_mode}" if compile_mode else "eager",
                "inference_mode",
                *([f"autocast {precision}"] if precision in HALVES else []),
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
                plan,
            )

        if compile_mode:
            return recipe(True), seconds
        faster, check_s = workshop.once("layout", (precision,), lambda: _faster_layout(workshop, recipe))
        return recipe(faster), seconds + check_s

    return make


def _faster_layout(workshop: Workshop, recipe: Callable[[bool], TorchRecipe]) -> bool:
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


def _engine(backend: str, planned: bool) -> _Maker:
    def make(workshop: Workshop, precision: Precision) -> tuple[Recipe, float]:
        plan, seconds = workshop.chosen(backend, precision) if planned and backend != "fused" else (NO_PLAN, 0.0)
        if backend == "fused":
            file, more = workshop.weights()
        elif backend in get_args(Flavour):
            file, more = workshop.tensorrt(cast(Flavour, backend), precision, plan)
        elif precision == "int8":
            file, more = workshop.quantised(plan)
        else:
            # OpenVINO computes in bf16 from the fp32 graph.
            file, more = workshop.graph("fp32" if precision == "bf16" else precision, plan)
        record = _record(backend, precision, file.name, workshop.device.partition(":")[0], plan)
        words = [_SETTINGS[backend]]
        if workshop.device == "cpu":
            words.append(_threads(workshop.threads))
        recipe = EngineRecipe(workshop.bundle, record, workshop.device, workshop.threads, ", ".join(words))
        return recipe, seconds + more

    return make


_SETTINGS = {
    "onnxruntime": "ORT_ENABLE_ALL, denormals as zero",
    "openvino": "LATENCY, precision hint, denormals as zero",
    "tensorrt": "strongly typed",
    "tensorrt-rtx": "strongly typed",
    "fused": "one precision throughout, CUDA graph on GPUs",
}
_ON = {
    "onnxruntime": ("cpu", "cuda"),
    "openvino": ("cpu",),
    "tensorrt": ("cuda",),
    "tensorrt-rtx": ("cuda",),
    "fused": ("cpu", "cuda"),
}
_IN: dict[str, tuple[Precision, ...]] = {
    "onnxruntime": ("fp32", "fp16"),
    "openvino": ("fp32", "bf16", "int8"),
    "tensorrt": ("fp32", "fp16"),
    "tensorrt-rtx": ("fp32", "fp16"),
    "fused": ("fp32", "bf16", "fp16"),
}


def _pytorch(name: str, precisions: tuple[Precision, ...], description: str, mode: str = "") -> Contestant:
    return Contestant(name, False, precisions, ("cpu", "cuda"), description, _torch(mode), compiles=bool(mode))


def _of(backend: str, planned: bool) -> Contestant:
    name, words = (f"planned {backend}", "rewritten; ") if planned else (backend, "")
    description = words + _SETTINGS[backend]
    planned_for = backend if planned and backend != "fused" else ""
    make = _engine(backend, planned)
    return Contestant(name, planned, _IN[backend], _ON[backend], description, make, backend, planned_for=planned_for)


_ALL = (
    _pytorch("torch", ("fp32",), "eager, inference_mode, flush_denormal, channels_last where that is faster"),
    _pytorch("torch autocast", ("bf16", "fp16"), "as torch, under autocast: bf16 on CPUs, fp16 on GPUs"),
    *(
        _pytorch(
            f"torch.compile{suffix}", ("fp32", "bf16", "fp16"), f"as torch, compiled in mode {mode}, freezing", mode
        )
        for suffix, mode in (("", "default"), (" max-autotune", "max-autotune"))
    ),
    *(_of(backend, False) for backend in _SETTINGS if backend != "fused"),
    *(_of(backend, True) for backend in _SETTINGS),
    Contestant(
        "planned torch.compile",
        True,
        ("fp32", "bf16"),
        ("cpu",),
        "rewritten; as torch.compile",
        _torch("default", planned=True),
        compiles=True,
        planned_for="openvino",
    ),
)
CONTESTANTS = {entry.name: entry for entry in _ALL}
"""Everyone, peers first, by name."""
