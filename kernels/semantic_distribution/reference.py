"""semantic_distribution in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from agln_fast.kernels.layout import maps, pixels, wide

__all__ = ["semantic_distribution"]


def semantic_distribution(a: Tensor, w_phi: Tensor, b_phi: Tensor, d: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Give each pixel of A its mixture of descriptors: M = D · softmax over descriptors of (Wϕ A + bϕ), and A + αM.

    Eq. 2 of the AGLN paper, and the sum inside Eq. 3. It is attention with the pixels as queries, Wϕ as keys and the
    descriptors as values.

    Logits, softmax and sums are float32 (float64 for float64); the second result is made of the unrounded M.

    Args:
        a: (B, C, H, W), float16, bfloat16, float32 or float64; any memory format.
        w_phi: (N, C), of the same dtype and device.
        b_phi: (N,), of the same dtype and device.
        d: (B, C, N), of the same dtype and device.
        alpha: α.

    Returns:
        M and A + αM, each (B, C, H, W), of a's dtype and memory format.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
    """
    queries = wide(pixels(a))  # [B, P, C]
    attention = (queries @ wide(w_phi).t() + wide(b_phi)).softmax(2)  # [B, P, N]
    m = attention @ wide(d).transpose(1, 2)  # [B, P, C]
    return maps(m, a), maps(queries + alpha * m, a)
