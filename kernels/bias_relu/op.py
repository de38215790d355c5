"""The op `agln::bias_relu`."""

from __future__ import annotations

from torch import Tensor

from agln_fast.kernels.arguments import check_tensor
from agln_fast.kernels.bias_relu import reference
from agln_fast.kernels.layout import empty_maps
from agln_fast.kernels.registration import register

__all__ = ["bias_relu"]


def _check(x: Tensor, bias: Tensor, residual: Tensor | None = None) -> None:
    check_tensor("x", x, ("B", "C", "H", "W"))
    check_tensor("bias", bias, (x.shape[1],), like=x)
    if residual is not None:
        check_tensor("residual", residual, tuple(x.shape), like=x)


bias_relu = register(
    __package__,
    reference.bias_relu,
    check=_check,
    tiles=lambda x, bias, residual=None: (x, residual),
    fake=lambda x, bias, residual=None: empty_maps(x),
)
