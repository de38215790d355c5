"""The op `agln::upsample_taps`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from agln_fast.kernels.arguments import check_tensor
from agln_fast.kernels.layout import empty_maps
from agln_fast.kernels.registration import register
from agln_fast.kernels.upsample_taps import reference

__all__ = ["upsample_taps"]


def _check(base: Tensor, taps: Sequence[Tensor], bias: Tensor) -> None:
    check_tensor("base", base, ("B", "C", "H", "W"))
    if not isinstance(taps, list | tuple):
        raise TypeError(f"taps: needs a list of tensors, got {type(taps).__name__}")
    if not taps:
        raise ValueError("taps: needs one map or more, got none")
    for i, coarse in enumerate(taps):
        check_tensor(f"taps[{i}]", coarse, (base.shape[0], 9 * base.shape[1], "h", "w"), like=base)
    check_tensor("bias", bias, (base.shape[1],), like=base)


upsample_taps = register(
    __package__,
    reference.upsample_taps,
    check=_check,
    tiles=lambda base, taps, bias: (base, *taps),
    fake=lambda base, taps, bias: empty_maps(base),
)
