"""`label_upsample` against resize and argmax as two operations of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from agln_fast.kernels.label_upsample import label_upsample


def _plain(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=True).argmax(1)


@pytest.mark.parametrize("classes", [21, 150])
@pytest.mark.parametrize("function", [label_upsample, _plain], ids=["label_upsample", "interpolate + argmax"])
def test_label_upsample(benchmark: Any, function: Callable[..., Tensor], classes: int, device: str) -> None:
    benchmark.group = f"label_upsample, {classes} classes, 128x128 to 512x512, {device}"
    logits = torch.randn(1, classes, 128, 128, device=device)

    def run() -> Tensor:
        labels = function(logits, (512, 512))
        if device == "cuda":
            torch.cuda.synchronize()
        return labels

    assert benchmark(run).shape == (1, 512, 512)
