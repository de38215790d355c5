"""The resize of a map: bilinear, with aligned corners or without."""

from agln_fast.kernels.upsample_bilinear.op import upsample_bilinear

__all__ = ["upsample_bilinear"]
