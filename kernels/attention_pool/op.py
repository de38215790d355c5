"""The op `agln::attention_pool`: the reference on a CPU, the Triton kernel on CUDA, shapes alone for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from agln_fast.kernels.arguments import check_tensor
from agln_fast.kernels.attention_pool import reference
from agln_fast.kernels.launch import choose, load_configs, regular
from agln_fast.kernels.registration import register

__all__ = ["CONFIGS", "attention_pool"]

CONFIGS = load_configs(__package__)


def attention_pool(x: Tensor, w_theta: Tensor) -> Tensor:
    _check(x, w_theta)
    pooled: Tensor = _op(x, w_theta)
    return pooled


attention_pool.__doc__ = reference.attention_pool.__doc__


def _check(x: Tensor, w_theta: Tensor) -> None:
    check_tensor("x", x, ("B", "C", "h", "w"))
    check_tensor("w_theta", w_theta, ("N", x.shape[1]), like=x)


def _cpu(x: Tensor, w_theta: Tensor) -> Tensor:
    _check(x, w_theta)
    return reference.attention_pool(x, w_theta)


def _cuda(x: Tensor, w_theta: Tensor) -> Tensor:
    _check(x, w_theta)
    if x.dtype == torch.float64:  # exists for proofs; Triton's matrix products have no float64
        return reference.attention_pool(x, w_theta)
    from agln_fast.kernels.attention_pool import kernel

    return kernel.attention_pool(x, w_theta, choose(CONFIGS, x, regular(x, w_theta)))


def _fake(x: Tensor, w_theta: Tensor) -> Tensor:
    _check(x, w_theta)
    return x.new_empty(x.shape[0], w_theta.shape[0], x.shape[1]).transpose(1, 2)


_op = register("attention_pool", _cpu, _cuda, _fake)
