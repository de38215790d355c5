"""The op `agln::attention_pool`."""

from __future__ import annotations

from torch import Tensor

from agln_fast.kernels.arguments import check_tensor
from agln_fast.kernels.attention_pool import reference
from agln_fast.kernels.registration import register

__all__ = ["attention_pool"]


def _check(x: Tensor, w_theta: Tensor, w_phi: Tensor, b_phi: Tensor) -> None:
    check_tensor("x", x, ("B", "C", "h", "w"))
    check_tensor("w_theta", w_theta, ("N", x.shape[1]), like=x)
    check_tensor("w_phi", w_phi, ("M", x.shape[1]), like=x)
    check_tensor("b_phi", b_phi, (w_phi.shape[0],), like=x)


def _fake(x: Tensor, w_theta: Tensor, w_phi: Tensor, b_phi: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], w_phi.shape[0], w_theta.shape[0])


attention_pool = register(
    __package__,
    reference.attention_pool,
    check=_check,
    tiles=lambda x, w_theta, w_phi, b_phi: (x, w_theta, w_phi),
    fake=_fake,
)
