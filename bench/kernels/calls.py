"""A call of every op, as AGLN has it: for the benchmark, for the cross-compiler, and for tests.

Beside each call stands what it is compared with: the plain operations that the network would have in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agln_fast.models.blocks import resize

__all__ = ["CALLS", "Call", "Case"]

_Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """The size of a call, and fresh data for it.

    batch, side: maps are (batch, C, side, side). channels, descriptors, classes: C, N, K.
    pattern: of logits: "noise", or "regions", in which neighbours have the same label, as networks see them.
    resamples, gates, adds: whether R, M and a residual are there. aligned: whether a resize's corners are.
    draws: whether data are random, or whatever lies in the memory.
    """

    batch: int
    side: int
    dtype: torch.dtype
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    channels: int = 256
    descriptors: int = 128
    classes: int = 150
    memory_format: torch.memory_format = torch.channels_last
    pattern: str = "noise"
    resamples: bool = True
    gates: bool = True
    adds: bool = True
    aligned: bool = True
    generator: torch.Generator | None = None
    draws: bool = True

    def map(self, channels: int | None = None, side: int | None = None) -> Tensor:
        """(B, channels, side, side) in the case's memory format."""
        side = side or self.side
        x = self._values(self.batch, channels or self.channels, side, side)
        return x.to(self.dtype).contiguous(memory_format=self.memory_format)

    def weight(self, *shape: int) -> Tensor:
        """Such that sums over all dimensions but the first have variance 1."""
        values = self._values(*shape)
        return values.mul_(max(1, values[0].numel()) ** -0.5).to(self.dtype)

    def _values(self, *shape: int) -> Tensor:
        if self.draws:
            return torch.randn(shape, device=self.device, generator=self.generator)
        return torch.empty(shape, device=self.device)


@dataclass(frozen=True)
class Call:
    """eager: what the op is compared with, of the same arguments and keywords.

    multiply_adds: of the arguments; 0 where there is no matrix product, for which a ceiling is measured.
    variants: changes of a `Case` that are measured. odd: those that are compiled for sizes which suit no tile.
    """

    eager: Callable[..., Any]
    arguments: Callable[[Case], _Arguments]
    keywords: Callable[[Case], dict[str, Any]] = lambda _: {}
    multiply_adds: Callable[..., int] = lambda *_: 0
    variants: tuple[dict[str, Any], ...] = ({},)
    odd: tuple[dict[str, Any], ...] = ({},)


def _pool(x: Tensor, w_theta: Tensor, w_phi: Tensor, b_phi: Tensor) -> Tensor:
    """Eq. 1: θ, softmax over pixels, product, φ."""
    attention = F.conv2d(x, w_theta[..., None, None]).flatten(2).float().softmax(-1).to(x.dtype)
    return w_phi @ (x.flatten(2) @ attention.transpose(1, 2)) + b_phi[:, None]


def _distribute(a: Tensor, w_phi: Tensor, b_phi: Tensor, d: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Eq. 2, and the sum A + αM."""
    attention = F.conv2d(a, w_phi[..., None, None], b_phi).flatten(2).float().softmax(1).to(a.dtype)
    m = (d @ attention).view_as(a)
    return m, a + alpha * m


def _affinity(e: Tensor, b: Tensor, sign: float, dtype: torch.dtype) -> Tensor:
    """Eq. 4: energy and softmax."""
    energy = e.float().flatten(2) @ b.float().flatten(2).transpose(1, 2)
    return (sign * energy).softmax(-1).to(dtype)


def _apply(r: Tensor | None, b: Tensor, m: Tensor | None, base: Tensor, gate_scale: float, skip_scale: float) -> Tensor:
    """Eq. 4 and 5: product, gate, and the sum that Φ takes."""
    g = b if r is None else (r.to(b.dtype) @ b.flatten(2)).view_as(b)
    return base + gate_scale * (g if m is None else g * m.sigmoid()) + skip_scale * b


def _resampling(case: Case) -> _Arguments:
    r = (4 * case.weight(case.batch, case.channels, case.channels).float()).softmax(-1).to(case.dtype)
    return r if case.resamples else None, case.map(), case.map() if case.gates else None, case.map(), 0.5, 0.25


def _fuse(
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
    gates: bool,
) -> Tensor:
    """Eq. 2 and both sums, as the release has them."""
    m, base = _distribute(a, w_phi, b_phi, d, alpha)
    return _apply(r, b, m if gates else None, base, gate_scale, skip_scale)


def _distribution(case: Case) -> _Arguments:
    n, count = case.descriptors, case.channels
    return case.map(), case.weight(n, count), case.weight(n), case.weight(case.batch, count, n), 0.5


def _fusion(case: Case) -> _Arguments:
    *distribution, alpha = _distribution(case)
    r, b, _, _, *scales = _resampling(case)
    return *distribution, r, b, alpha, *scales


def _bias_relu(x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """One kernel each; all but the first in place."""
    y = x + bias.view(-1, 1, 1)
    return (y if residual is None else y.add_(residual)).relu_()


def _labels(logits: Tensor, size: tuple[int, int], *, align_corners: bool) -> Tensor:
    return resize(logits, size, align_corners).argmax(1).to(torch.uint8)


_ALIGNMENT: dict[str, Any] = {
    "keywords": lambda case: {"align_corners": case.aligned},
    "odd": ({}, {"aligned": False}),
}


def _logits(case: Case) -> _Arguments:
    """The op is faster where neighbours have the same label: in regions, as networks see them; nowhere in noise."""
    logits = case.map(case.classes)
    if case.pattern == "regions":
        coarse = logits[..., ::10, ::10].float()
        logits = resize(coarse, logits.shape).to(logits.dtype) + logits / 32
        logits = logits.contiguous(memory_format=case.memory_format)
    return logits, (4 * case.side, 4 * case.side)


def _separable(x: Tensor, w_depthwise: Tensor, w_pointwise: Tensor, bias: Tensor) -> Tensor:
    """Both convolutions and ReLU, batch normalisation folded into either."""
    return F.conv2d(F.conv2d(x, w_depthwise, padding=1, groups=x.shape[1]), w_pointwise, bias).relu()


def _depthwise_first(case: Case) -> _Arguments:
    count = case.channels
    # As the fused network keeps it: the channels next to each other.
    depthwise = case.weight(count, 1, 3, 3).permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    return case.map(), depthwise, case.weight(count, count, 1, 1), case.weight(count)


def _sum_of_taps(base: Tensor, taps: list[Tensor], bias: Tensor) -> Tensor:
    """Nine resizes, shifts and sums for each coarse map."""
    height, width = base.shape[2:]
    y = base + bias.view(-1, 1, 1)
    for coarse in taps:
        resized = F.pad(resize(coarse, (height, width)), (1, 1, 1, 1))
        for t, tap in enumerate(resized.chunk(9, 1)):
            y = y + tap[..., t // 3 : t // 3 + height, t % 3 : t % 3 + width]
    return y.relu()


def _taps(case: Case) -> _Arguments:
    """The first convolution of AGLN's classifier, its maps at 1, 1/2, 1/4 and 1/8 of the side, rounded up."""
    count = 2 * case.channels
    taps = [case.map(9 * count, -(-case.side // step)) for step in (2, 4, 8)]
    return case.map(count), taps, case.weight(count)


_DESCRIPTORS = {"descriptors": 64}, {"descriptors": 128}

CALLS = {
    "attention_pool": Call(
        _pool,
        lambda case: (
            case.map(),
            case.weight(case.descriptors, case.channels),
            case.weight(case.channels, case.channels),
            case.weight(case.channels),
        ),
        multiply_adds=lambda x, w_theta, w_phi, _: len(w_theta) * (2 * x.numel() + len(x) * w_phi.numel()),
        variants=_DESCRIPTORS,
    ),
    "semantic_distribution": Call(
        _distribute,
        _distribution,
        multiply_adds=lambda a, w_phi, *_: 2 * len(w_phi) * a.numel(),
        variants=_DESCRIPTORS,
    ),
    "bias_relu": Call(
        _bias_relu,
        lambda case: (case.map(), case.weight(case.channels), case.map() if case.adds else None),
        odd=({}, {"adds": False}),
    ),
    "channel_affinity": Call(
        _affinity,
        lambda case: (case.map(), case.map(), -1.0),
        keywords=lambda case: {"dtype": case.dtype},
        multiply_adds=lambda e, b, sign: e.shape[1] * e.numel(),
    ),
    "channel_apply": Call(
        _apply,
        _resampling,
        multiply_adds=lambda r, b, *_: b.shape[1] * b.numel(),
        odd=({}, {"gates": False}, {"resamples": False}),
    ),
    "context_fusion": Call(
        _fuse,
        _fusion,
        keywords=lambda case: {"gates": case.gates},
        multiply_adds=lambda a, w_phi, *_: (2 * len(w_phi) + a.shape[1]) * a.numel(),
        variants=_DESCRIPTORS,
        odd=({}, {"gates": False}, {"resamples": False}),
    ),
    "label_upsample": Call(
        _labels,
        _logits,
        variants=tuple({"classes": k, "pattern": pattern} for k in (59, 150) for pattern in ("regions", "noise")),
        **_ALIGNMENT,
    ),
    "separable_conv": Call(
        _separable,
        _depthwise_first,
        multiply_adds=lambda x, depthwise, pointwise, bias: (9 + len(pointwise)) * x.numel(),
    ),
    "upsample_bilinear": Call(
        resize, lambda case: (case.map(side=-(-case.side // 2)), (case.side, case.side)), **_ALIGNMENT
    ),
    "upsample_taps": Call(_sum_of_taps, _taps),
}
"""Each op of `agln_fast.kernels.registration.OPS`, by its name."""
