"""Denormals as zero, in the calling thread and for a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["denormals_are_zero", "denormals_as_zero"]


@contextmanager
def denormals_as_zero() -> Iterator[None]:
    """Compute with denormals as zero; afterwards the thread has the mode that it had before.

    Softmaxes that are nearly one-hot are full of denormals, which CPUs multiply in microcode. Engines that are told so
    switch the mode of the thread that opens them, and leave it so, which would change the arithmetic of all else that
    the thread does: they are opened, and run, in here. It is the mode of this thread alone: threads of OpenMP, which
    PyTorch computes with, keep that of the thread that started them.
    """
    import torch

    before = denormals_are_zero()
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def denormals_are_zero() -> bool:
    """Whether this thread computes so."""
    return sys.float_info.min / 2 == 0
