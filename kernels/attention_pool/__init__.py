"""Features of a map, averaged under attention maps: the semantic aggregation block before its projection."""

from agln_fast.kernels.attention_pool.op import attention_pool

__all__ = ["attention_pool"]
