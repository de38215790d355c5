"""Folding changes no function, in float64, for every variant; and leaves the original alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import agln_fast
from agln_fast.plan.network import InferenceNetwork
from agln_fast.plan.rewrites import fold_batchnorm

NAMES = [*agln_fast.list_models("*_resnet18"), "agln_resnet50s", "fcn8s_resnet34s", "fcn_concat_resnet50c"]


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_folded_network_is_the_same_function(name, small_network):
    network = small_network(name).double()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.normal_()
    planned = InferenceNetwork(network)
    folded = fold_batchnorm(planned)
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [module for module in planned.modules() if isinstance(module, nn.BatchNorm2d)]
    image = torch.randn(1, 3, 43, 37, dtype=torch.float64)
    torch.testing.assert_close(folded(image), network(image), rtol=1e-10, atol=1e-10)
