"""The op `agln::context_fusion`."""

from __future__ import annotations

from torch import Tensor

from agln_fast.kernels.arguments import check_affinity, check_number, check_tensor
from agln_fast.kernels.context_fusion import reference
from agln_fast.kernels.layout import empty_maps
from agln_fast.kernels.registration import register
from agln_fast.kernels.semantic_distribution.op import check_distribution

__all__ = ["context_fusion"]


def _check(
    a: Tensor,
    w_phi: Tensor,
    b_phi: Tensor,
    d: Tensor,
    r: Tensor | None,
    b: Tensor,
    alpha: float,
    gate_scale: float,
    skip_scale: float,
    *,
    gates: bool = True,
) -> None:
    check_distribution(a, w_phi, b_phi, d, alpha)
    if r is not None:
        check_affinity("r", r, a)
    check_tensor("b", b, tuple(a.shape), like=a)
    check_number("gate_scale", gate_scale)
    check_number("skip_scale", skip_scale)
    if not isinstance(gates, bool):
        raise TypeError(f"gates: needs True or False, got {gates!r}")


context_fusion = register(
    __package__,
    reference.context_fusion,
    check=_check,
    tiles=lambda a, w_phi, b_phi, d, r, b, alpha, gate_scale, skip_scale, *, gates=True: (a, w_phi, d, r, b),
    fake=lambda a, w_phi, b_phi, d, r, b, alpha, gate_scale, skip_scale, *, gates=True: empty_maps(a),
)
