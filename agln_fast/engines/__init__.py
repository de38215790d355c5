"""Inference engines: two small interfaces (`base.EngineKind` and `base.Engine`), and a file for each kind.

A library is imported when an engine of it is looked at or opened, not before.
"""

from __future__ import annotations

import os
import re

from agln_fast import environment
from agln_fast.artefact import Artefact
from agln_fast.engines.base import Engine, EngineKind
from agln_fast.engines.fused import Fused
from agln_fast.engines.onnxruntime import OnnxRuntime
from agln_fast.engines.openvino import OpenVino
from agln_fast.engines.tensorrt import TensorRT, TensorRTRTX
from agln_fast.engines.torch import NetworkKind, Torch
from agln_fast.errors import BackendError, ConfigError, choose, did_you_mean
from agln_fast.precision import PRECISIONS, Precision, check_precision

__all__ = [
    "KINDS",
    "REFERENCE",
    "Engine",
    "EngineKind",
    "NetworkKind",
    "check_device",
    "check_network_precision",
    "check_threads",
    "kind_of",
    "network_kinds",
    "obstacle_to",
    "open_engine",
    "packages",
    "targets",
]

KINDS: dict[str, EngineKind] = {
    kind.name: kind for kind in (TensorRT(), TensorRTRTX(), Fused(), OpenVino(), OnnxRuntime(), Torch())
}
"""Every kind of engine by its name, the fastest first: the order in which `backend="auto"` tries them.

What is added here is known to build, tune, verify, eval, bench and doctor.
"""

REFERENCE = Torch.name
"""The kind that runs the network as it is: all others are compared with it."""


def kind_of(name: str) -> EngineKind:
    """The kind called `name`.

    Raises:
        ConfigError: there is none.
    """
    return KINDS[choose("backend", name, KINDS)]


def targets() -> list[str]:
    """What engines can be built for."""
    return sorted({kind.target for kind in KINDS.values() if kind.target is not None})


def packages() -> list[str]:
    """The distributions that engines are made with, and run on, this one first."""
    needed = [name for kind in KINDS.values() for each in kind.precisions for name in kind.packages(each)]
    return list(dict.fromkeys(["agln-fast", "torch", "triton", *needed]))


def network_kinds() -> dict[str, NetworkKind]:
    """The kinds that run a network in memory."""
    return {name: kind for name, kind in KINDS.items() if isinstance(kind, NetworkKind)}


def check_device(name: str | None) -> None:
    """Refuse what is no name of a device, without looking whether it is there.

    Raises:
        ConfigError: it is not "cpu", "cuda", or "cuda" with a number.
    """
    if name is not None and re.fullmatch(r"cpu|cuda(:\d{1,3})?", name) is None:
        hint = did_you_mean(name, ("cpu", "cuda"))
        raise ConfigError(f"unknown device {name!r}{hint}; give cpu, cuda, or a GPU by its number, such as cuda:1")


def check_network_precision(name: str) -> Precision:
    """`name` itself, in which PyTorch runs a network that is in no bundle.

    Raises:
        ConfigError: an unknown precision, or int8.
    """
    if name == "int8":
        known = ", ".join(kind for kind in PRECISIONS if kind in KINDS[REFERENCE].precisions)
        raise ConfigError(f"unknown precision 'int8'; known: {known}; int8 needs a bundle, and OpenVINO")
    return check_precision(name)


def check_threads(threads: int | None) -> int | None:
    """`threads` itself; None becomes `AGLN_FAST_THREADS`, and stays None without it.

    Raises:
        ConfigError: fewer threads than one, or more than four for each core.
    """
    threads = environment.default_threads() if threads is None else threads
    most = 4 * (os.cpu_count() or 1)
    if threads is not None and not 1 <= threads <= most:
        raise ConfigError(f"threads {threads}: must be from 1 to {most} on this machine")
    return threads


def obstacle_to(artefact: Artefact, device: str | None = None) -> str | None:
    """Why `artefact` cannot run on this machine's `device` (None: its own) and what to do about it, or None."""
    if artefact.kind not in KINDS:
        return f"this agln-fast has no backend {artefact.kind!r}"
    return KINDS[artefact.kind].obstacle_to(artefact, device)


def open_engine(artefact: Artefact, *, device: str | None = None, threads: int | None = None) -> Engine:
    """Open an engine, after checking that it can run here.

    `threads` is None for `AGLN_FAST_THREADS`, and without that for the library's own choice.

    Raises:
        BackendError: it cannot; the message says what differs and what to do.
        ConfigError: fewer threads than one, or an unknown device.
    """
    threads = check_threads(threads)
    check_device(device)
    if obstacle := obstacle_to(artefact, device):
        raise BackendError(f"engine {artefact.name} cannot run here: {obstacle}")
    return KINDS[artefact.kind].open(artefact, device=device, threads=threads)
