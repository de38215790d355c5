"""Whether a GPU's driver is there, told without PyTorch, which takes seconds to load."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

from agln_fast.errors import BackendError

__all__ = ["check_driver"]

_LIBRARIES = {"Windows": "nvcuda.dll"}
_ROCM = Path("/dev/kfd")  # PyTorch calls AMD's devices "cuda", too


def check_driver(device: str | None) -> None:
    """Refuse a CUDA device on a machine without a driver of one; whether the device is there, PyTorch finds out later.

    Raises:
        BackendError: `device` is "cuda" or "cuda:N", and the driver's library, which PyTorch needs as well, is missing.
    """
    if device is None or not device.startswith("cuda") or _ROCM.exists():
        return
    try:
        ctypes.CDLL(_LIBRARIES.get(platform.system(), "libcuda.so.1"))
    except OSError:
        raise BackendError(
            f"device {device!r}: this machine has no driver of a CUDA device; `agln-fast doctor` shows more"
        ) from None
