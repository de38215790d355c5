"""Denormals as zero, in the calling thread and for a while; without PyTorch, which has a switch for it, too."""

from __future__ import annotations

import ctypes
import platform
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

__all__ = ["denormals_are_zero", "denormals_as_zero"]

_ENVIRONMENT = 64  # bytes, more than any `fenv_t`


class _Register(NamedTuple):
    """Where a processor's mode lies in the `fenv_t` of Linux's C libraries, and its bits."""

    offset: int
    zero: int


_REGISTERS = {
    "x86_64": _Register(28, 1 << 15 | 1 << 6),  # MXCSR: flush to zero, denormals are zero
    "aarch64": _Register(0, 1 << 24),  # FPCR: flush to zero, of operands and results
}


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Compute with denormals as zero; afterwards the thread has the mode that it had before.

    Softmaxes that are nearly one-hot are full of denormals, which CPUs multiply in microcode. Engines that are told so
    switch the mode of the thread that opens them, and leave it so, which would change the arithmetic of all else that
    the thread does: they are opened, and run, in here. It is the mode of this thread alone: threads of OpenMP, which
    PyTorch computes with, keep that of the thread that started them.

    Elsewhere than on Linux, on x86-64 and on Arm, nothing happens.
    """
    mathematics, register = _mathematics(), _REGISTERS.get(platform.machine())
    if mathematics is None or register is None:
        yield
        return
    before = ctypes.create_string_buffer(_ENVIRONMENT)
    mathematics.fegetenv(before)
    inside = ctypes.create_string_buffer(before.raw)
    (mode,) = struct.unpack_from("<I", inside, register.offset)
    struct.pack_into("<I", inside, register.offset, mode | register.zero)
    mathematics.fesetenv(inside)
    try:
        yield
    finally:
        mathematics.fesetenv(before)


@cache
def _mathematics() -> Any:
    """The C library's functions of <fenv.h>, whose 0 is success; None where their layout is another's."""
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL("libm.so.6")
    except OSError:  # musl, whose libc is its libm
        return ctypes.CDLL(None)


def denormals_are_zero() -> bool:
    """Whether this thread computes so."""
    return sys.float_info.min / 2 == 0
