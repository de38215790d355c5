"""The op `agln::upsample_bilinear`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from agln_fast.kernels.arguments import check_size, check_tensor
from agln_fast.kernels.layout import empty_maps
from agln_fast.kernels.registration import register
from agln_fast.kernels.upsample_bilinear import reference

__all__ = ["upsample_bilinear"]


def _check(x: Tensor, size: Sequence[int], *, align_corners: bool = True) -> None:
    check_tensor("x", x, ("B", "C", "h", "w"))
    check_size(size)


upsample_bilinear = register(
    __package__,
    reference.upsample_bilinear,
    check=_check,
    tiles=lambda x, size, *, align_corners=True: (x,),
    fake=lambda x, size, *, align_corners=True: empty_maps(x, size=size),
)
