"""Random weights that are fit for measuring: reproducible, and with every class in the labels."""

from __future__ import annotations

import torch

from agln_fast.bench.race.weights import random_network
from agln_fast.contract import IOContract
from agln_fast.runtime.images import pack
from agln_fast.runtime.references import sample_images


@torch.inference_mode()
def test_random_networks_are_reproducible_and_see_many_classes():
    network, again, other = (random_network("agln_release_resnet18", 12, seed) for seed in (0, 0, 1))
    x = torch.from_numpy(pack(sample_images(1, 96, 128, seed=5), IOContract(96, 128, layout="float_nchw")))
    logits = network(x)
    assert torch.equal(logits, again(x))
    assert not torch.allclose(logits, other(x))
    assert len(logits.argmax(1).unique()) > 6
