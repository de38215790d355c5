"""The op `agln::separable_conv`: the reference on a CPU, the Triton kernel on CUDA, shapes alone for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from agln_fast.kernels.arguments import check_tensor
from agln_fast.kernels.launch import choose, load_configs, regular
from agln_fast.kernels.layout import empty_maps
from agln_fast.kernels.registration import register
from agln_fast.kernels.separable_conv import reference

__all__ = ["CONFIGS", "separable_conv"]

CONFIGS = load_configs(__package__)


def separable_conv(x: Tensor, w_depthwise: Tensor, w_pointwise: Tensor, bias: Tensor) -> Tensor:
    _check(x, w_depthwise, w_pointwise, bias)
    y: Tensor = _op(x, w_depthwise, w_pointwise, bias)
    return y


separable_conv.__doc__ = reference.separable_conv.__doc__


def _check(x: Tensor, w_depthwise: Tensor, w_pointwise: Tensor, bias: Tensor) -> None:
    check_tensor("x", x, ("B", "C", "H", "W"))
    check_tensor("w_depthwise", w_depthwise, (x.shape[1], 1, 3, 3), like=x)
    check_tensor("w_pointwise", w_pointwise, ("O", x.shape[1], 1, 1), like=x)
    check_tensor("bias", bias, (w_pointwise.shape[0],), like=x)


def _cpu(x: Tensor, w_depthwise: Tensor, w_pointwise: Tensor, bias: Tensor) -> Tensor:
    _check(x, w_depthwise, w_pointwise, bias)
    return reference.separable_conv(x, w_depthwise, w_pointwise, bias)


def _cuda(x: Tensor, w_depthwise: Tensor, w_pointwise: Tensor, bias: Tensor) -> Tensor:
    _check(x, w_depthwise, w_pointwise, bias)
    if x.dtype == torch.float64:  # exists for proofs; Triton's matrix products have no float64
        return reference.separable_conv(x, w_depthwise, w_pointwise, bias)
    from agln_fast.kernels.separable_conv import kernel

    return kernel.separable_conv(x, w_depthwise, w_pointwise, bias, choose(CONFIGS, x, regular(x, w_pointwise)))


def _fake(x: Tensor, w_depthwise: Tensor, w_pointwise: Tensor, bias: Tensor) -> Tensor:
    _check(x, w_depthwise, w_pointwise, bias)
    return empty_maps(x, w_pointwise.shape[0])


_op = register("separable_conv", _cpu, _cuda, _fake)
