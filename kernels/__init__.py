"""Fused operations, one folder each: the same name is the folder, the op `agln::NAME`, its test and its benchmark.

Each folder holds `reference.py` (plain PyTorch), `kernel.py` (Triton), `op.py` (the check of its arguments, and the op
in `torch.library`) and `configs.json` (launch configurations). Imported as `agln_fast.kernels`. Triton is imported when
a kernel is launched, not before.
"""

from agln_fast.kernels.attention_pool import attention_pool
from agln_fast.kernels.bias_relu import bias_relu
from agln_fast.kernels.channel_resample import channel_affinity, channel_apply
from agln_fast.kernels.context_fusion import context_fusion
from agln_fast.kernels.label_upsample import label_upsample
from agln_fast.kernels.semantic_distribution import semantic_distribution
from agln_fast.kernels.separable_conv import separable_conv
from agln_fast.kernels.upsample_bilinear import upsample_bilinear
from agln_fast.kernels.upsample_taps import upsample_taps

__all__ = [
    "attention_pool",
    "bias_relu",
    "channel_affinity",
    "channel_apply",
    "context_fusion",
    "label_upsample",
    "semantic_distribution",
    "separable_conv",
    "upsample_bilinear",
    "upsample_taps",
]
