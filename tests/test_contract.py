"""The input/output contract: what it refuses, and what it survives."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from agln_fast.contract import IMAGENET_MEAN, IMAGENET_STD, IOContract
from agln_fast.deployment import DeployedNetwork
from agln_fast.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"height": 31}, "size 31x64: each side must be from 32"),
        ({"width": 100_000}, "size 64x100000"),
        ({"min_batch": 0}, r"batch 0\.\.1"),
        ({"min_batch": 4, "max_batch": 2}, r"batch 4\.\.2: needs 1 <= smallest <= largest"),
        ({"layout": "chw"}, "unknown layout 'chw'; .*known: uint8_nhwc, float_nchw"),
        ({"output": "masks"}, "output 'masks'"),
        ({"resize": "crop"}, "resize 'crop'"),
        ({"height": 64.0}, r"size 64\.0x64"),
        ({"max_batch": 1e308}, r"batch 1\.\.1e\+308: needs whole numbers"),
        ({"max_batch": 4097}, r"batch 1\.\.4097: needs 1 <= smallest <= largest <= 4096"),
        ({"max_batch": 4096, "width": 2048}, r"batch 1\.\.4096 of 64x2048: more than 268435456 pixels a run"),
        ({"std": (0.2, 0.2, 0.0)}, r"std needs three numbers from 0\.0001 to 10000, .* got \(0\.2, 0\.2, 0\.0\)"),
        ({"std": (0.2, 0.2)}, "needs three numbers"),
        ({"mean": (0.5, float("nan"), 0.5)}, "mean needs three numbers from 0 to 1"),
        ({"mean": (123.7, 116.3, 103.5)}, "mean needs three numbers from 0 to 1, for values in 0..1"),
        ({"mean": (True, False, False)}, "mean needs three numbers"),
        ({"resize": "slide"}, "'slide' averages overlapping windows: it needs output 'logits'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_impossible_contracts_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        IOContract(**{"height": 64, "width": 64, **values})


def test_contract_survives_json():
    contract = IOContract(64, 96, 1, 4, "float_nchw", "logits", "slide", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert IOContract.from_dict(contract.to_dict()) == contract


class _ChannelsAsLogits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale


def test_uint8_input_is_normalised_as_the_float_input_must_be():
    image = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), np.uint8)
    normalised = (image / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    contract = IOContract(32, 40, 2, 2, output="logits")
    with torch.inference_mode():
        inside = DeployedNetwork(_ChannelsAsLogits(), contract, 3)(torch.from_numpy(image))
        outside = DeployedNetwork(_ChannelsAsLogits(), replace(contract, layout="float_nchw"), 3)(
            torch.from_numpy(normalised.transpose(0, 3, 1, 2)).float()
        )
    torch.testing.assert_close(inside, outside, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(inside, torch.from_numpy(normalised.transpose(0, 3, 1, 2)).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("classes", "dtype"), [(3, torch.uint8), (256, torch.uint8), (257, torch.int32)])
def test_labels_are_the_argmax_in_the_smallest_type(classes, dtype):
    network = DeployedNetwork(_ChannelsAsLogits(), IOContract(32, 32, layout="float_nchw"), classes)
    x = torch.randn(1, classes, 32, 32)
    labels = network(x)
    assert labels.dtype == dtype
    assert torch.equal(labels.long(), x.argmax(1))
