"""The GPUs that kernels are compiled for without one: data."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DEVICES", "Device"]


class Device(NamedTuple):
    """processors: multiprocessors of the best-known GPU of a capability. shared_kib: that a block may use there."""

    name: str
    processors: int
    shared_kib: int


DEVICES = {
    "sm80": Device("A100", 108, 163),
    "sm86": Device("RTX 3090", 82, 99),
    "sm89": Device("L4", 58, 99),
    "sm90": Device("H200", 132, 227),
    "sm100": Device("B200", 148, 227),
    "sm120": Device("RTX 5090", 170, 99),
}
"""By compute capability (CUDA C++ Programming Guide, table "Technical Specifications")."""
