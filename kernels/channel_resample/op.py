"""The ops `agln::channel_affinity` and `agln::channel_apply`: reference on CPUs, Triton on CUDA, shapes for tracing."""

from __future__ import annotations

import torch
from torch import Tensor

from agln_fast.kernels.arguments import FLOATS, check_number, check_tensor
from agln_fast.kernels.channel_resample import reference
from agln_fast.kernels.launch import choose, load_configs, regular
from agln_fast.kernels.layout import empty_maps
from agln_fast.kernels.registration import register

__all__ = ["AFFINITY_CONFIGS", "APPLY_CONFIGS", "channel_affinity", "channel_apply"]

AFFINITY_CONFIGS = load_configs(__package__, "channel_affinity")
APPLY_CONFIGS = load_configs(__package__, "channel_apply")


def channel_affinity(e: Tensor, b: Tensor, sign: float, *, dtype: torch.dtype | None = None) -> Tensor:
    _check_affinity(e, b, sign, dtype)
    r: Tensor = _affinity(e, b, float(sign), dtype)
    return r


channel_affinity.__doc__ = reference.channel_affinity.__doc__


def channel_apply(
    r: Tensor | None, b: Tensor, m: Tensor | None, base: Tensor, gate_scale: float, skip_scale: float
) -> Tensor:
    _check_apply(r, b, m, base, gate_scale, skip_scale)
    out: Tensor = _apply(r, b, m, base, float(gate_scale), float(skip_scale))
    return out


channel_apply.__doc__ = reference.channel_apply.__doc__


def _check_affinity(e: Tensor, b: Tensor, sign: float, dtype: torch.dtype | None) -> None:
    check_tensor("e", e, ("B", "C", "H", "W"))
    check_tensor("b", b, tuple(e.shape), like=e)
    check_number("sign", sign)
    if sign not in (1, -1):
        raise ValueError(f"sign: needs 1 or -1, got {sign}")
    if dtype not in (None, *FLOATS):
        raise TypeError(f"dtype: needs float16, bfloat16, float32, float64 or None, got {dtype}")


def _check_apply(
    r: Tensor | None, b: Tensor, m: Tensor | None, base: Tensor, gate_scale: float, skip_scale: float
) -> None:
    check_tensor("b", b, ("B", "C", "H", "W"))
    if r is not None:
        check_tensor("r", r, (b.shape[0], b.shape[1], b.shape[1]), like=b, floats=True)
        if r.dtype not in (b.dtype, torch.promote_types(b.dtype, torch.float32)):
            raise TypeError(f"r: needs {b.dtype} like b, or float32, got {r.dtype}")
    if m is not None:
        check_tensor("m", m, tuple(b.shape), like=b)
    check_tensor("base", base, tuple(b.shape), like=b)
    check_number("gate_scale", gate_scale)
    check_number("skip_scale", skip_scale)


def _affinity_cpu(e: Tensor, b: Tensor, sign: float, dtype: torch.dtype | None) -> Tensor:
    _check_affinity(e, b, sign, dtype)
    return reference.channel_affinity(e, b, sign, dtype=dtype)


def _affinity_cuda(e: Tensor, b: Tensor, sign: float, dtype: torch.dtype | None) -> Tensor:
    _check_affinity(e, b, sign, dtype)
    if e.dtype == torch.float64:  # exists for proofs; Triton's matrix products have no float64
        return reference.channel_affinity(e, b, sign, dtype=dtype)
    from agln_fast.kernels.channel_resample import kernel

    return kernel.channel_affinity(e, b, sign, dtype or torch.float32, choose(AFFINITY_CONFIGS, e, regular(e, b)))


def _affinity_fake(e: Tensor, b: Tensor, sign: float, dtype: torch.dtype | None) -> Tensor:
    _check_affinity(e, b, sign, dtype)
    kept = torch.promote_types(e.dtype, torch.float32) if dtype is None else dtype
    return e.new_empty(e.shape[0], e.shape[1], e.shape[1], dtype=kept)


def _apply_cpu(
    r: Tensor | None, b: Tensor, m: Tensor | None, base: Tensor, gate_scale: float, skip_scale: float
) -> Tensor:
    _check_apply(r, b, m, base, gate_scale, skip_scale)
    return reference.channel_apply(r, b, m, base, gate_scale, skip_scale)


def _apply_cuda(
    r: Tensor | None, b: Tensor, m: Tensor | None, base: Tensor, gate_scale: float, skip_scale: float
) -> Tensor:
    _check_apply(r, b, m, base, gate_scale, skip_scale)
    if b.dtype == torch.float64:
        return reference.channel_apply(r, b, m, base, gate_scale, skip_scale)
    from agln_fast.kernels.channel_resample import kernel

    return kernel.channel_apply(r, b, m, base, gate_scale, skip_scale, choose(APPLY_CONFIGS, b, regular(r, b, m, base)))


def _apply_fake(
    r: Tensor | None, b: Tensor, m: Tensor | None, base: Tensor, gate_scale: float, skip_scale: float
) -> Tensor:
    _check_apply(r, b, m, base, gate_scale, skip_scale)
    return empty_maps(base)


_affinity = register("channel_affinity", _affinity_cpu, _affinity_cuda, _affinity_fake)
_apply = register("channel_apply", _apply_cpu, _apply_cuda, _apply_fake)
