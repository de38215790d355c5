"""separable_conv in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from agln_fast.kernels.layout import empty_maps, wide

__all__ = ["separable_conv"]


def separable_conv(x: Tensor, w_depthwise: Tensor, w_pointwise: Tensor, bias: Tensor) -> Tensor:
    """Depthwise separable convolution with ReLU: relu(W_pointwise · (X * W_depthwise) + bias), zero padding of 1.

    The 3x3 convolution of AGLN-Lite (section IV-D of the AGLN paper), its batch normalisation folded into `w_pointwise`
    and `bias`.

    Sums are float32 (float64 for float64). On CUDA the depthwise result is rounded to x's dtype before the pointwise
    product, as PyTorch does. There x is read fastest where it is channels_last, and `w_depthwise` where its channels
    are next to each other (`w_depthwise.stride(0) == 1`).

    Args:
        x: (B, C, H, W), float16, bfloat16, float32 or float64; any memory format.
        w_depthwise: (C, 1, 3, 3), of the same dtype and device; any strides.
        w_pointwise: (O, C, 1, 1), of the same dtype and device; any strides.
        bias: (O,), of the same dtype and device.

    Returns:
        (B, O, H, W), of x's dtype; channels_last where x's channels are next to each other, else contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
    """
    filtered = F.conv2d(wide(x), wide(w_depthwise), padding=1, groups=x.shape[1])
    y = F.conv2d(filtered, wide(w_pointwise), wide(bias)).relu()
    return empty_maps(x, w_pointwise.shape[0]).copy_(y)
