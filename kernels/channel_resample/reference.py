"""channel_affinity and channel_apply in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from agln_fast.kernels.layout import maps, pixels, wide

__all__ = ["channel_affinity", "channel_apply"]


def channel_affinity(e: Tensor, b: Tensor, sign: float, *, dtype: torch.dtype | None = None) -> Tensor:
    """How much of each channel of B every channel of E asks for: R = softmax over j of (sign · E Bᵀ), row i over j.

    Eq. 4 of the AGLN paper for `sign` 1. With -1 it is the network its authors released, softmax(rowmax − E Bᵀ): a
    softmax does not see the shift.

    The energy, a sum over all pixels, and its softmax are float32 (float64 for float64): float16 would overflow.

    Args:
        e, b: (B, C, H, W), float16, bfloat16, float32 or float64, of one dtype and device; any memory format.
        sign: 1 or -1.
        dtype: of the result; None for float32 (float64 for float64).

    Returns:
        (B, C, C), contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device, or another sign.
    """
    energy = wide(pixels(e)).transpose(1, 2) @ wide(pixels(b))  # [B, C, C]
    return (sign * energy).softmax(2).to(energy.dtype if dtype is None else dtype)


def channel_apply(
    r: Tensor | None, b: Tensor, m: Tensor | None, base: Tensor, gate_scale: float, skip_scale: float
) -> Tensor:
    """Resample B's channels by R, gate them by M, and add: base + gate_scale · (R B) ⊙ σ(M) + skip_scale · B.

    Eq. 4 and 5 of the AGLN paper and the sum before Φ. Paper: base = E, gate_scale = β, skip_scale = 0. Release:
    base = A + αM, gate_scale = βγ, skip_scale = β.

    Sums are float32 (float64 for float64). On CUDA, R is rounded to b's dtype before the product.

    Args:
        r: (B, C, C), of b's dtype or at least float32; None for the identity, spatial gating alone.
        b: (B, C, H, W), float16, bfloat16, float32 or float64; any memory format.
        m: as b; None for no gate, channel resampling alone.
        base: as b.
        gate_scale, skip_scale: numbers.

    Returns:
        (B, C, H, W), of base's dtype and memory format.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
    """
    features = wide(pixels(b))  # [B, P, C]
    resampled = features if r is None else features @ r.to(features.dtype).transpose(1, 2)
    if m is not None:
        resampled = resampled * wide(pixels(m)).sigmoid()
    return maps(wide(pixels(base)) + gate_scale * resampled + skip_scale * features, base)
