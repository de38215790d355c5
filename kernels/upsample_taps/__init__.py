"""A map plus the resized, shifted taps of coarser ones: what is left of a 3x3 convolution mixed before upsampling."""

from agln_fast.kernels.upsample_taps.op import upsample_taps

__all__ = ["upsample_taps"]
