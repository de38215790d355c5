"""The op `agln::upsample_taps`: the reference on a CPU, the Triton kernel on CUDA, shapes alone for tracing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agln_fast.kernels.arguments import check_tensor
from agln_fast.kernels.launch import choose, load_configs, regular
from agln_fast.kernels.layout import empty_maps
from agln_fast.kernels.registration import register
from agln_fast.kernels.upsample_taps import reference

__all__ = ["CONFIGS", "upsample_taps"]

CONFIGS = load_configs(__package__)


def upsample_taps(base: Tensor, taps: Sequence[Tensor], bias: Tensor) -> Tensor:
    _check(base, taps, bias)
    y: Tensor = _op(base, taps, bias)
    return y


upsample_taps.__doc__ = reference.upsample_taps.__doc__


def _check(base: Tensor, taps: Sequence[Tensor], bias: Tensor) -> None:
    check_tensor("base", base, ("B", "C", "H", "W"))
    if not isinstance(taps, list | tuple):
        raise TypeError(f"taps: needs a list of tensors, got {type(taps).__name__}")
    if not taps:
        raise ValueError("taps: needs one map or more, got none")
    for i, coarse in enumerate(taps):
        check_tensor(f"taps[{i}]", coarse, (base.shape[0], 9 * base.shape[1], "h", "w"), like=base)
    check_tensor("bias", bias, (base.shape[1],), like=base)


def _cpu(base: Tensor, taps: Sequence[Tensor], bias: Tensor) -> Tensor:
    _check(base, taps, bias)
    return reference.upsample_taps(base, taps, bias)


def _cuda(base: Tensor, taps: Sequence[Tensor], bias: Tensor) -> Tensor:
    _check(base, taps, bias)
    if base.dtype == torch.float64:  # exists for proofs; no configuration is kept for it
        return reference.upsample_taps(base, taps, bias)
    from agln_fast.kernels.upsample_taps import kernel

    return kernel.upsample_taps(base, taps, bias, choose(CONFIGS, base, regular(base, *taps)))


def _fake(base: Tensor, taps: Sequence[Tensor], bias: Tensor) -> Tensor:
    _check(base, taps, bias)
    return empty_maps(base)


_op = register("upsample_taps", _cpu, _cuda, _fake)
