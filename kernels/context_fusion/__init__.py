"""Context fusion in one pass: semantic distribution, channel resampling and gating, and the sum of them."""

from agln_fast.kernels.context_fusion.op import context_fusion

__all__ = ["context_fusion"]
