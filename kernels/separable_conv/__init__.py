"""A depthwise 3x3 and a pointwise 1x1 convolution with bias and ReLU: how AGLN-Lite fuses features."""

from agln_fast.kernels.separable_conv.op import separable_conv

__all__ = ["separable_conv"]
