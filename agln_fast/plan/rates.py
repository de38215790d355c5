"""How fast this machine's CPU convolves, multiplies and copies: measured in half a second, then remembered."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import torch
import torch.nn.functional as F

from agln_fast import memory

__all__ = ["Rates", "cpu_rates"]

_CHANNELS, _SIDE = 256, 32  # a 3x3 convolution of the decoder; each run is short, to fit between other work
_PRODUCT = 512
_COPIED = 2**23  # bytes: as large as a map of the decoder, which no core keeps to itself
_SECONDS = 0.1  # for each of the three, in each precision


@dataclass(frozen=True)
class Rates:
    """What a machine achieves: floating-point operations a second (an addition is one), and bytes a second.

    convolution, product: in convolutions and in products of matrices. bytes: read or written.
    """

    convolution: float
    product: float
    bytes: float


@cache
def cpu_rates(half: bool, threads: int | None = None) -> Rates:
    """Rates of PyTorch's kernels in float32, or in bfloat16 if `half`; `threads` is None for its own choice.

    PyTorch and OpenVINO share oneDNN, so that AMX and AVX-512 count as they do in an engine. The best of several
    runs is taken: other work on the machine only slows them down.
    """
    before = torch.get_num_threads()
    facts = {"half": half, "threads": threads or before}
    file = memory.place("rates", facts, ("torch",))
    known = memory.recall(file)
    if isinstance(known, dict) and known.keys() == Rates.__annotations__.keys() and all(map(_is_rate, known.values())):
        return Rates(**known)
    torch.set_num_threads(threads or before)
    try:
        rates = _measure(torch.bfloat16 if half else torch.float32)
    finally:
        torch.set_num_threads(before)
    memory.remember(file, asdict(rates))
    return rates


@torch.inference_mode()
def _measure(dtype: torch.dtype) -> Rates:
    x = torch.ones(1, _CHANNELS, _SIDE, _SIDE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    w = torch.ones(_CHANNELS, _CHANNELS, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
    a, b = torch.ones(2, _PRODUCT, _PRODUCT, dtype=dtype)
    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    return Rates(
        convolution=2 * 9 * _CHANNELS**2 * _SIDE**2 / _fastest(lambda: F.conv2d(x, w, padding=1)),
        product=2 * _PRODUCT**3 / _fastest(lambda: a @ b),
        bytes=2 * _COPIED / _fastest(lambda: target.copy_(source)),
    )


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest run, after a first one; without arithmetic of its own a type is emulated, and slow."""
    best, end = math.inf, time.perf_counter() + _SECONDS
    run()
    while best == math.inf or time.perf_counter() < end:
        before = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - before)
    return best


def _is_rate(value: object) -> bool:
    return isinstance(value, float) and 0 < value < math.inf
