"""`channel_affinity` and `channel_apply` against Eq. 4 and 5, and the sum that Φ takes, as the network has them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from agln_fast.kernels.channel_resample import channel_affinity, channel_apply


def eager_affinity(e: Tensor, b: Tensor, sign: float) -> Tensor:
    energy = e.float().flatten(2) @ b.float().flatten(2).transpose(1, 2)
    return (sign * energy).softmax(-1)


def eager_apply(r: Tensor, b: Tensor, m: Tensor, base: Tensor, gate_scale: float, skip_scale: float) -> Tensor:
    g = (r.to(b.dtype) @ b.flatten(2)).view_as(b) * m.sigmoid()
    return base + gate_scale * g + skip_scale * b


def test_channel_affinity(case: Any, measure: Any) -> None:
    e, b = case.map(256), case.map(256)
    measure(channel_affinity, eager_affinity, (e, b, -1), multiply_adds=256 * e.numel())


def test_channel_apply(case: Any, measure: Any) -> None:
    b, m, base = case.map(256), case.map(256), case.map(256)
    r = (4 * case.weight(case.batch, 256, 256).float()).softmax(-1).to(b.dtype)
    measure(channel_apply, eager_apply, (r, b, m, base, 0.5, 0.25), multiply_adds=256 * b.numel())
