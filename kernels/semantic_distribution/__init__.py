"""Descriptors handed out to the pixels of a map under a softmax: semantic distribution, and the sum after it."""

from agln_fast.kernels.semantic_distribution.op import semantic_distribution

__all__ = ["semantic_distribution"]
