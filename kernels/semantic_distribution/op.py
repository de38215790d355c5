"""The op `agln::semantic_distribution`: the reference on a CPU, the Triton kernel on CUDA, shapes alone for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from agln_fast.kernels.arguments import check_number, check_tensor
from agln_fast.kernels.launch import choose, load_configs, regular
from agln_fast.kernels.layout import empty_maps
from agln_fast.kernels.registration import register
from agln_fast.kernels.semantic_distribution import reference

__all__ = ["CONFIGS", "semantic_distribution"]

CONFIGS = load_configs(__package__)


def semantic_distribution(a: Tensor, w_phi: Tensor, b_phi: Tensor, d: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    _check(a, w_phi, b_phi, d, alpha)
    m, enhanced = _op(a, w_phi, b_phi, d, float(alpha))
    return m, enhanced


semantic_distribution.__doc__ = reference.semantic_distribution.__doc__


def _check(a: Tensor, w_phi: Tensor, b_phi: Tensor, d: Tensor, alpha: float) -> None:
    check_tensor("a", a, ("B", "C", "H", "W"))
    check_tensor("w_phi", w_phi, ("N", a.shape[1]), like=a)
    check_tensor("b_phi", b_phi, (w_phi.shape[0],), like=a)
    check_tensor("d", d, (a.shape[0], a.shape[1], w_phi.shape[0]), like=a)
    check_number("alpha", alpha)


def _cpu(a: Tensor, w_phi: Tensor, b_phi: Tensor, d: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    _check(a, w_phi, b_phi, d, alpha)
    return reference.semantic_distribution(a, w_phi, b_phi, d, alpha)


def _cuda(a: Tensor, w_phi: Tensor, b_phi: Tensor, d: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    _check(a, w_phi, b_phi, d, alpha)
    if a.dtype == torch.float64:  # exists for proofs; Triton's matrix products have no float64
        return reference.semantic_distribution(a, w_phi, b_phi, d, alpha)
    from agln_fast.kernels.semantic_distribution import kernel

    return kernel.semantic_distribution(a, w_phi, b_phi, d, alpha, choose(CONFIGS, a, regular(a, w_phi, d)))


def _fake(a: Tensor, w_phi: Tensor, b_phi: Tensor, d: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    _check(a, w_phi, b_phi, d, alpha)
    return empty_maps(a), empty_maps(a)


_op = register("semantic_distribution", _cpu, _cuda, _fake)
