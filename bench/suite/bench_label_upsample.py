"""`label_upsample` against resize and argmax as the network and its contract have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from agln_fast.kernels.label_upsample import label_upsample
from agln_fast.models.blocks import resize


def eager(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return resize(logits, size).argmax(1).to(torch.uint8)


@pytest.mark.parametrize("pattern", ["regions", "noise"])
@pytest.mark.parametrize("classes", [59, 150])
def test_label_upsample(classes: int, pattern: str, case: Any, measure: Any) -> None:
    """The op is faster where neighbours have the same label: in regions, as networks see them; nowhere in noise."""
    logits = case.map(classes)
    if pattern == "regions":
        coarse = logits[..., ::10, ::10].float()
        logits = resize(coarse, logits.shape).to(logits.dtype) + logits / 32
        logits = logits.contiguous(memory_format=torch.channels_last)
    # Interpolation and maximum are no matrix products: no ceiling of theirs is measured.
    measure(label_upsample, eager, (logits, (4 * case.side, 4 * case.side)), multiply_adds=0)
