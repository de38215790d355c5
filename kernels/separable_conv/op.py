"""The op `agln::separable_conv`."""

from __future__ import annotations

from torch import Tensor

from agln_fast.kernels.arguments import check_tensor
from agln_fast.kernels.layout import empty_maps
from agln_fast.kernels.registration import register
from agln_fast.kernels.separable_conv import reference

__all__ = ["separable_conv"]


def _check(x: Tensor, w_depthwise: Tensor, w_pointwise: Tensor, bias: Tensor) -> None:
    check_tensor("x", x, ("B", "C", "H", "W"))
    check_tensor("w_depthwise", w_depthwise, (x.shape[1], 1, 3, 3), like=x)
    check_tensor("w_pointwise", w_pointwise, ("O", x.shape[1], 1, 1), like=x)
    check_tensor("bias", bias, (w_pointwise.shape[0],), like=x)


separable_conv = register(
    __package__,
    reference.separable_conv,
    check=_check,
    tiles=lambda x, w_depthwise, w_pointwise, bias: (x, w_pointwise),
    fake=lambda x, w_depthwise, w_pointwise, bias: empty_maps(x, w_pointwise.shape[0]),
)
