"""`attention_pool` against Eq. 1 as the network has it: θ, softmax over pixels, product."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from agln_fast.kernels.attention_pool import attention_pool


def eager(x: Tensor, w_theta: Tensor) -> Tensor:
    attention = F.conv2d(x, w_theta[..., None, None]).flatten(2).float().softmax(-1).to(x.dtype)
    return x.flatten(2) @ attention.transpose(1, 2)


@pytest.mark.parametrize("n", [64, 128])
def test_attention_pool(n: int, case: Any, measure: Any) -> None:
    x = case.map(256)
    measure(attention_pool, eager, (x, case.weight(n, 256)), multiply_adds=2 * n * x.numel())
