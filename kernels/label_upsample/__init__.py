"""Logits at low resolution to a label map at full size, without the logits at full size."""

from agln_fast.kernels.label_upsample.op import label_upsample

__all__ = ["label_upsample"]
