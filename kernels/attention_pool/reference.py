"""attention_pool in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from agln_fast.kernels.layout import pixels, wide

__all__ = ["attention_pool"]


def attention_pool(x: Tensor, w_theta: Tensor) -> Tensor:
    """Pool the pixels of X under N attention maps: pooled = X · softmax over pixels of (Wθ X), transposed.

    Eq. 1 of the AGLN paper without the projection φ, which may follow the pooling because the rows of a softmax sum to
    1, and without the bias of θ, which is the same for all pixels and cancels in the softmax. It is attention with N
    learned queries whose keys and values are both X.

    Energies, softmax and sums are float32 (float64 for float64).

    Args:
        x: (B, C, h, w), float16, bfloat16, float32 or float64; any memory format.
        w_theta: (N, C), of the same dtype and device.

    Returns:
        (B, C, N), of x's dtype; the channels of a descriptor are adjacent.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
    """
    features = wide(pixels(x))  # [B, P, C]
    attention = (features @ wide(w_theta).t()).softmax(1)  # [B, P, N]
    return (attention.transpose(1, 2) @ features).to(x.dtype).transpose(1, 2)
