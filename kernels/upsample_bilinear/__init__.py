"""The resize of a feature map: bilinear, with aligned corners."""

from agln_fast.kernels.upsample_bilinear.op import upsample_bilinear

__all__ = ["upsample_bilinear"]
