"""Features of a map, averaged under attention maps and projected: the semantic aggregation block."""

from agln_fast.kernels.attention_pool.op import attention_pool

__all__ = ["attention_pool"]
