"""Inference backends: one small interface (`base.Backend`), one file per library.

A library is imported when one of its engines is looked at, not before.
"""

from __future__ import annotations

import os
import re
from importlib import import_module

from agln_fast import environment
from agln_fast.bundle import Bundle
from agln_fast.contract import Precision, check_precision
from agln_fast.engines.base import Backend
from agln_fast.errors import BackendError, ConfigError, choose, did_you_mean
from agln_fast.manifest import EngineRecord

__all__ = [
    "BACKENDS",
    "Backend",
    "backend_class",
    "check_backend",
    "check_device",
    "check_network_precision",
    "check_threads",
    "open_engine",
]

# Name -> module and class, fastest first: the order in which `backend="auto"` tries them.
BACKENDS = {
    "tensorrt": "tensorrt:TensorRTBackend",
    "tensorrt-rtx": "tensorrt:TensorRTRTXBackend",
    "fused": "fused:FusedBackend",
    "openvino": "openvino:OpenVinoBackend",
    "onnxruntime": "onnxruntime:OnnxRuntimeBackend",
    "torch": "torch:TorchBackend",
}


def backend_class(name: str) -> type[Backend]:
    """The class of the backend `name`.

    Raises:
        ConfigError: there is no such backend.
    """
    check_backend(name)
    module, _, attribute = BACKENDS[name].partition(":")
    backend: type[Backend] = getattr(import_module(f"agln_fast.engines.{module}"), attribute)
    return backend


def check_backend(name: str) -> None:
    """Refuse what is no name of a backend, without loading one.

    Raises:
        ConfigError: there is no such backend.
    """
    choose("backend", name, BACKENDS)


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
        raise ConfigError("unknown precision 'int8'; known: fp32, fp16, bf16; int8 needs a bundle, and OpenVINO")
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


def open_engine(
    bundle: Bundle, engine: EngineRecord, *, device: str | None = None, threads: int | None = None
) -> Backend:
    """Open one engine of a bundle, after checking that it can run here.

    `threads` is None for `AGLN_FAST_THREADS`, and without that for the library's own choice.

    Raises:
        BackendError: it cannot; the message says what differs and what to do.
        ConfigError: fewer threads than one, or an unknown device.
    """
    threads = check_threads(threads)
    check_device(device)
    backend = backend_class(engine.backend)
    obstacle = backend.obstacle(engine)
    if obstacle:
        raise BackendError(f"engine {engine.name} cannot run here: {obstacle}")
    return backend(bundle, engine, device=device, threads=threads)
