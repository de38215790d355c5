"""Where the fused network's ops go: to the Triton kernels on a CUDA device, to the references on the CPU."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

import agln_fast
from agln_fast.kernels import attention_pool, channel_resample, label_upsample, semantic_distribution, separable_conv

EXPECTED = {
    "attention_pool": 3,
    "semantic_distribution": 6,
    "channel_affinity": 6,
    "channel_apply": 6,
    "separable_conv": 12,
    "label_upsample": 1,
}
