"""Bias, residual and ReLU: what follows a convolution."""

from agln_fast.kernels.bias_relu.op import bias_relu

__all__ = ["bias_relu"]
