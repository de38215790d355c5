"""The op `agln::semantic_distribution`."""

from __future__ import annotations

from torch import Tensor

from agln_fast.kernels.arguments import check_number, check_tensor
from agln_fast.kernels.layout import empty_maps
from agln_fast.kernels.registration import register
from agln_fast.kernels.semantic_distribution import reference

__all__ = ["check_distribution", "semantic_distribution"]


def check_distribution(a: Tensor, w_phi: Tensor, b_phi: Tensor, d: Tensor, alpha: float) -> None:
    """Check the arguments, as the reference says."""
    check_tensor("a", a, ("B", "C", "H", "W"))
    check_tensor("w_phi", w_phi, ("N", a.shape[1]), like=a)
    check_tensor("b_phi", b_phi, (w_phi.shape[0],), like=a)
    check_tensor("d", d, (a.shape[0], a.shape[1], w_phi.shape[0]), like=a)
    check_number("alpha", alpha)


semantic_distribution = register(
    __package__,
    reference.semantic_distribution,
    check=check_distribution,
    tiles=lambda a, w_phi, b_phi, d, alpha: (a, w_phi, d),
    fake=lambda a, w_phi, b_phi, d, alpha: (empty_maps(a), empty_maps(a)),
)
