"""The ops `agln::channel_affinity` and `agln::channel_apply`."""

from __future__ import annotations

import torch
from torch import Tensor

from agln_fast.kernels.arguments import FLOATS, check_affinity, check_number, check_tensor
from agln_fast.kernels.channel_resample import reference
from agln_fast.kernels.layout import empty_maps
from agln_fast.kernels.registration import register

__all__ = ["channel_affinity", "channel_apply"]


def _check_affinity(e: Tensor, b: Tensor, sign: float, *, dtype: torch.dtype | None = None) -> None:
    check_tensor("e", e, ("B", "C", "H", "W"))
    check_tensor("b", b, tuple(e.shape), like=e)
    check_number("sign", sign)
    if sign not in (1, -1):
        raise ValueError(f"sign: needs 1 or -1, got {sign}")
    if dtype not in (None, *FLOATS):
        raise TypeError(f"dtype: needs float16, bfloat16, float32, float64 or None, got {dtype}")


def _affinity_fake(e: Tensor, b: Tensor, sign: float, *, dtype: torch.dtype | None = None) -> Tensor:
    kept = torch.promote_types(e.dtype, torch.float32) if dtype is None else dtype
    return e.new_empty(e.shape[0], e.shape[1], e.shape[1], dtype=kept)


channel_affinity = register(
    __package__,
    reference.channel_affinity,
    check=_check_affinity,
    tiles=lambda e, b, sign, *, dtype=None: (e, b),
    fake=_affinity_fake,
)


def _check_apply(
    r: Tensor | None, b: Tensor, m: Tensor | None, base: Tensor, gate_scale: float, skip_scale: float
) -> None:
    check_tensor("b", b, ("B", "C", "H", "W"))
    if r is not None:
        check_affinity("r", r, b)
    if m is not None:
        check_tensor("m", m, tuple(b.shape), like=b)
    check_tensor("base", base, tuple(b.shape), like=b)
    check_number("gate_scale", gate_scale)
    check_number("skip_scale", skip_scale)


channel_apply = register(
    __package__,
    reference.channel_apply,
    check=_check_apply,
    tiles=lambda r, b, m, base, gate_scale, skip_scale: (b, r, m, base),
    fake=lambda r, b, m, base, gate_scale, skip_scale: empty_maps(base),
)
