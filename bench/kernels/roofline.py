"""The two ceilings of a device, measured: how fast it copies, and how fast it multiplies matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from agln_fast.bench.kernels.timing import device_times

__all__ = ["Roofline", "measure_roofline", "product_rate"]

_REPEATS = 10


@dataclass(frozen=True)
class Roofline:
    """Measured ceilings.

    bytes_per_second: of a large copy, bytes read plus bytes written.
    flops_per_second: of a large matrix product, by dtype ("float16").
    launch_us: of a kernel that does nothing to speak of, measured as kernels are: no op is faster.
    """

    bytes_per_second: float
    flops_per_second: dict[str, float]
    launch_us: float

    def bound_us(self, moved: int, multiply_adds: int, dtype: torch.dtype) -> float:
        """Least microseconds for moving so many bytes and doing so many multiply-adds, each at its ceiling."""
        rate = self.flops_per_second[str(dtype).removeprefix("torch.")]
        return 1e6 * max(moved / self.bytes_per_second, 2 * multiply_adds / rate)


def measure_roofline(device: torch.device, dtypes: Sequence[torch.dtype]) -> Roofline:
    """Measure it on `device`: on CUDA with 4 GiB and products of 8192x8192 matrices, on a CPU with less.

    Data are random: products of zeros run faster.
    """
    cuda = device.type == "cuda"
    small = torch.zeros(1, device=device)
    return Roofline(
        _copy_rate(device, 2**30 if cuda else 2**22),
        {str(dtype).removeprefix("torch."): product_rate(device, dtype) for dtype in dtypes},
        device_times(lambda: small.add_(1), device, repeats=50).median,
    )


def _copy_rate(device: torch.device, count: int) -> float:
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    times = device_times(lambda: target.copy_(source), device, repeats=_REPEATS)
    return 1e6 * 2 * source.nbytes / times.median


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of square matrices: two for each multiply-add.

    Of 8192 rows on CUDA and 2048 on a CPU: smaller ones leave its matrix units waiting for memory.
    """
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    times = device_times(lambda: torch.mm(a, b, out=product), device, repeats=_REPEATS)
    return 1e6 * 2 * side**3 / times.median
