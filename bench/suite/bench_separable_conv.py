"""`separable_conv` against its two convolutions and ReLU, batch normalisation folded into either."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from agln_fast.kernels.separable_conv import separable_conv


def eager(x: Tensor, w_depthwise: Tensor, w_pointwise: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(F.conv2d(x, w_depthwise, padding=1, groups=x.shape[1]), w_pointwise, bias).relu()


def test_separable_conv(case: Any, measure: Any) -> None:
    x = case.map(256)
    # As the fused network keeps it: the channels next to each other.
    depthwise = case.weight(256, 1, 3, 3).permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    arguments = (x, depthwise, case.weight(256, 256, 1, 1), case.weight(256))
    measure(separable_conv, eager, arguments, multiply_adds=(9 + 256) * x.numel())
