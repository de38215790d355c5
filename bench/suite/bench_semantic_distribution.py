"""`semantic_distribution` against Eq. 2 and the sum A + αM as the network has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from agln_fast.kernels.semantic_distribution import semantic_distribution


def eager(a: Tensor, w_phi: Tensor, b_phi: Tensor, d: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    attention = F.conv2d(a, w_phi[..., None, None], b_phi).flatten(2).float().softmax(1).to(a.dtype)
    m = (d @ attention).view_as(a)
    return m, a + alpha * m


@pytest.mark.parametrize("n", [64, 128])
def test_semantic_distribution(n: int, case: Any, measure: Any) -> None:
    a = case.map(256)
    arguments = (a, case.weight(n, 256), case.weight(n), case.weight(case.batch, 256, n), 0.5)
    measure(semantic_distribution, eager, arguments, multiply_adds=2 * n * a.numel())
