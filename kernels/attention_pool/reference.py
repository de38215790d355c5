"""attention_pool in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from agln_fast.kernels.layout import pixels, wide

__all__ = ["attention_pool"]


def attention_pool(x: Tensor, w_theta: Tensor, w_phi: Tensor, b_phi: Tensor) -> Tensor:
    """Pool the pixels of X under N attention maps, and project: D = Wφ (X · softmax over pixels of (Wθ X)ᵀ) + bφ.

    Eq. 1 of the AGLN paper with the projection φ after the pooling, as it may be because the rows of a softmax sum to
    1, and without the bias of θ, which is the same for all pixels and cancels in the softmax. It is attention with N
    learned queries whose keys and values are both X. Wφ may hold the projections of several readers, one above the
    other.

    Energies, softmax and sums are float32 (float64 for float64).

    Args:
        x: (B, C, h, w), float16, bfloat16, float32 or float64; any memory format.
        w_theta: (N, C), w_phi: (M, C), b_phi: (M,), of the same dtype and device.

    Returns:
        (B, M, N), contiguous, of x's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
    """
    features = wide(pixels(x))  # [B, P, C]
    attention = (features @ wide(w_theta).t()).softmax(1)  # [B, P, N]
    pooled = features.transpose(1, 2) @ attention  # [B, C, N]
    projection = wide(w_phi).expand(len(x), *w_phi.shape)
    return torch.baddbmm(wide(b_phi).unsqueeze(1), projection, pooled).to(x.dtype)
