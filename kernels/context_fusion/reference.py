"""context_fusion in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from agln_fast.kernels.layout import maps, pixels, wide

__all__ = ["context_fusion"]


def context_fusion(
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
    gates: bool = True,
) -> Tensor:
    """Fuse decoder and encoder: O = A + αM + gate_scale · (R B) ⊙ σ(M) + skip_scale · B.

    M = D · softmax over descriptors of (Wϕ A + bϕ). It is `semantic_distribution` and then `channel_apply` on what that
    gives: Eq. 2 to 6 of the AGLN paper up to Φ, as its authors released them, where R is of A itself and can be there
    before. With gate_scale = βγ and skip_scale = β it is their A + αM + β(γG + B).

    Logits, softmax and sums are float32 (float64 for float64), and M is nowhere rounded. On CUDA, R is rounded to b's
    dtype before the product.

    Args:
        a: (B, C, H, W), float16, bfloat16, float32 or float64; any memory format.
        w_phi: (N, C), of the same dtype and device.
        b_phi: (N,), of the same dtype and device.
        d: (B, C, N), of the same dtype and device.
        r: (B, C, C), of the same device, and of the same dtype or at least float32; None for the identity, spatial
            gating alone.
        b: as a.
        alpha: α.
        gate_scale, skip_scale: numbers.
        gates: without, σ(M) is 1: channel resampling alone.

    Returns:
        (B, C, H, W), of a's dtype and memory format.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
    """
    queries, features = wide(pixels(a)), wide(pixels(b))  # [B, P, C]
    attention = (queries @ wide(w_phi).t() + wide(b_phi)).softmax(2)  # [B, P, N]
    m = attention @ wide(d).transpose(1, 2)  # [B, P, C]
    resampled = features if r is None else features @ r.to(features.dtype).transpose(1, 2)
    gated = resampled * m.sigmoid() if gates else resampled
    return maps(queries + alpha * m + gate_scale * gated + skip_scale * features, a)
