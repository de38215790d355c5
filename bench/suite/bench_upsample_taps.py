"""`upsample_taps` against nine resizes, shifts and sums for each coarse map, as PyTorch runs them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from agln_fast.kernels.upsample_taps import upsample_taps
from agln_fast.models.blocks import resize


def eager(base: Tensor, bias: Tensor, *taps: Tensor) -> Tensor:
    height, width = base.shape[2:]
    y = base + bias.view(-1, 1, 1)
    for coarse in taps:
        resized = F.pad(resize(coarse, (height, width)), (1, 1, 1, 1))
        for t, tap in enumerate(resized.chunk(9, 1)):
            y = y + tap[..., t // 3 : t // 3 + height, t % 3 : t % 3 + width]
    return y.relu()


def fused(base: Tensor, bias: Tensor, *taps: Tensor) -> Tensor:
    return upsample_taps(base, taps, bias)


def test_upsample_taps(case: Any, measure: Any) -> None:
    """The first convolution of AGLN's classifier, its maps at 1, 1/2, 1/4 and 1/8 of the side, rounded up."""
    taps = [replace(case, side=-(-case.side // step)).map(9 * 512) for step in (2, 4, 8)]
    # Interpolation and sums are no matrix products: no ceiling of theirs is measured.
    measure(fused, eager, (case.map(512), case.weight(512), *taps), multiply_adds=0)
