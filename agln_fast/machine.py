"""This machine: processor, GPUs and installed packages, told without PyTorch, which takes seconds to load."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Gpu", "gpus", "installed", "machine", "processor", "threads_of"]

_QUERY = "name,compute_cap,memory.total,driver_version"


class Processor(NamedTuple):
    """name: as the system has it; virtual machines give many processors one name. flags: its instruction sets."""

    name: str
    flags: frozenset[str]


class Gpu(NamedTuple):
    """capability: compute capability, e.g. "sm89". memory_mib: of the device. driver: its version."""

    name: str
    capability: str
    memory_mib: int
    driver: str


@cache
def processor() -> Processor:
    """That of this machine; no flags where there is no /proc."""
    found: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), value.strip())
    flags = found.get("flags") or found.get("Features", "")  # on x86, on Arm
    return Processor(found.get("model name") or platform.processor(), frozenset(flags.split()))


def threads_of(threads: int | None) -> int:
    """`threads` itself; None for the cores that this process may use."""
    return threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def gpus() -> list[Gpu]:
    """NVIDIA's, as `nvidia-smi` lists them; none where it is not installed, or fails."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    rows = [line.split(", ") for line in answer.stdout.splitlines() if answer.returncode == 0]
    return [
        Gpu(name, f"sm{capability.replace('.', '')}", int(memory), driver) for name, capability, memory, driver in rows
    ]


def installed(package: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(threads: int | None = None, packages: Iterable[str] = ("agln-fast", "torch", "triton")) -> dict[str, Any]:
    """What numbers were measured on, as plain JSON types: processor, `threads` (see `threads_of`), GPU, versions of
    `packages`."""
    found: dict[str, Any] = {
        "cpu": processor().name,
        "threads": threads_of(threads),
        "gpu": next((gpu.name for gpu in gpus()), None),
        "python": platform.python_version(),
    }
    return found | {package: installed(package) for package in packages}
