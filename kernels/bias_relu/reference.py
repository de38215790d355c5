"""bias_relu in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from agln_fast.kernels.layout import empty_maps, wide

__all__ = ["bias_relu"]


def bias_relu(x: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
    """What follows a convolution without bias: relu(x + bias + residual).

    Sums are float32 (float64 for float64), and are rounded once. The result is a new tensor: in place, as many bytes
    would be read and written, and in a CUDA graph's pool the next op gets the memory of `x`. On CUDA maps of one memory
    format are the fastest, in loads of 16 bytes where their rows begin at multiples of that.

    Args:
        x: (B, C, H, W), float16, bfloat16, float32 or float64; any memory format.
        bias: (C,), of the same dtype and device.
        residual: (B, C, H, W), of the same dtype and device, in any memory format; or None.

    Returns:
        (B, C, H, W), of x's dtype; channels_last where x's channels are next to each other, else contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
    """
    y = wide(x) + wide(bias).view(-1, 1, 1)
    if residual is not None:
        y += wide(residual)
    return empty_maps(x).copy_(y.relu_())
