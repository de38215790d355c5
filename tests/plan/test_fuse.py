"""Fusing changes no function, in float64, for every variant; and what cannot count is not computed."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import agln_fast
from agln_fast.errors import ConfigError
from agln_fast.kernels.label_upsample import kernel as label_upsample_kernel
from agln_fast.kernels.label_upsample import label_upsample
from agln_fast.models.blocks import AveragePoolingBlock
from agln_fast.plan import fuse as fuse_module
from agln_fast.plan.fuse import SeparableConv
from agln_fast.plan.network import Aggregation

PRESETS = [*agln_fast.list_models("*_resnet18"), "agln_resnet50s", "fcn8s_resnet34s", "fcn_concat_resnet50c"]
VARIANTS = [
    pytest.param(name, {"formulation": formulation} if formulation else {}, id=f"{name}-{formulation or 'plain'}")
    for name in PRESETS
    for formulation in (("paper", "release") if name.startswith("agln") else (None,))
]


class Calls(TorchDispatchMode):
    """Counts the fused ops."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "agln":
            self.counts[func._schema.name.removeprefix("agln::")] += 1
        return func(*args, **(kwargs or {}))


def randomise(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                tensor.detach().normal_()
    return network


def assert_same_function(fused, network, image):
    exact = network(image)
    error = (fused(image) - exact).abs().max() / exact.abs().max()
    assert error < 1e-10


@pytest.fixture(params=["direct", "mixed"])
def conv5(request, monkeypatch):
    """Small networks have few channels, and are fused as narrow ones or as wide ones."""
    monkeypatch.setattr(fuse_module, "_FEWEST_CHANNELS", {"direct": 17, "mixed": 16}[request.param])
    return request.param


@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
@torch.inference_mode()
def test_fused_network_is_the_same_function(name, overrides, small_network, conv5):
    network = randomise(small_network(name, **overrides).double())
    fused, image = agln_fast.fuse(network), torch.randn(2, 3, 43, 37, dtype=torch.float64)
    with Calls() as seen:
        fused.logits(image)
    assert seen.counts["upsample_taps"] == (conv5 == "mixed" and bool(fused.levels()))
    assert_same_function(fused, network, image)


DENSE = {"attention_pool": 3, "semantic_distribution": 6, "channel_affinity": 6, "channel_apply": 6}
RELEASE = {"attention_pool": 3, "channel_affinity": 6, "context_fusion": 6}
UNGATED = {"attention_pool": 3, "semantic_distribution": 6}
UNDISTRIBUTED = {"channel_affinity": 6, "channel_apply": 6}


@pytest.mark.parametrize(
    ("name", "overrides", "zeros", "calls"),
    [
        pytest.param("agln", {}, r"no zeros", DENSE, id="paper-nothing-dead"),
        pytest.param("agln", {}, r"alpha", DENSE, id="paper-gate-still-reads-M"),
        pytest.param("agln", {}, r"beta", UNGATED, id="paper-no-refinement"),
        pytest.param("agln", {}, r"alpha|beta", {}, id="paper-neither"),
        pytest.param("agln", {"spatial_gating": False}, r"alpha", UNDISTRIBUTED, id="paper-no-gate-to-read-M"),
        pytest.param(
            "agln",
            {"channel_resampling": False},
            r"alpha",
            {key: count for key, count in DENSE.items() if key != "channel_affinity"},
            id="paper-gate-alone",
        ),
        pytest.param("agln_release", {}, r"no zeros", RELEASE, id="release-nothing-dead"),
        pytest.param("agln_release", {}, r"alpha", RELEASE, id="release-gate-still-reads-M"),
        pytest.param("agln_release", {"spatial_gating": False}, r"no zeros", RELEASE, id="release-no-gate"),
        pytest.param(
            "agln_release", {"spatial_gating": False}, r"alpha", UNDISTRIBUTED, id="release-no-gate-to-read-M"
        ),
        pytest.param(
            "agln_release",
            {"channel_resampling": False},
            r"no zeros",
            {key: count for key, count in RELEASE.items() if key != "channel_affinity"},
            id="release-gate-alone",
        ),
        pytest.param("agln_release", {}, r"gamma", UNGATED, id="release-no-refinement"),
        pytest.param("agln_release", {}, r"beta", UNGATED, id="release-no-lateral-feature"),
        pytest.param("agln_release", {}, r"alpha|gamma", {}, id="release-as-initialised"),
        pytest.param("agln_release", {}, r"alpha|beta|gamma", {}, id="release-all-zero"),
        pytest.param(
            "agln_release",
            {},
            r"cfb\.2\.2\.(alpha|gamma)",
            {key: count - 1 for key, count in RELEASE.items()},
            id="release-one-aggregation-unread",
        ),
        pytest.param(
            "agln_release",
            {},
            r"cfb\.1\.0\.(alpha|gamma)",
            {**RELEASE, "channel_affinity": 5, "context_fusion": 5},
            id="release-one-reader-fewer",
        ),
        pytest.param("agln_minus", {}, r"no zeros", {"attention_pool": 1, "semantic_distribution": 3}, id="agln-minus"),
        pytest.param("agln_minus", {}, r"alpha", {}, id="agln-minus-is-fpn"),
        pytest.param(
            "agln_minus_gap",
            {},
            r"no zeros",
            {"attention_pool": 1, "semantic_distribution": 3},
            id="mean-is-attention-of-zeros",
        ),
        pytest.param("agln_lite", {}, r"no zeros", {**DENSE, "separable_conv": 12}, id="lite"),
    ],
)
@torch.inference_mode()
def test_dead_branches_are_not_computed(name, overrides, zeros, calls, small_network):
    network = small_network(f"{name}_resnet18", **overrides).double()
    for key, parameter in network.named_parameters():
        if re.search(zeros, key):
            parameter.zero_()
    fused = agln_fast.fuse(network)
    image = torch.randn(1, 3, 40, 33, dtype=torch.float64)
    with Calls() as seen:
        fused(image)
    assert seen.counts == {**calls, "upsample_bilinear": 4}  # of every level, and of the logits
    assert_same_function(fused, network, image)


@torch.inference_mode()
def test_a_lateral_feature_with_beta_zero_is_not_read(small_network):
    network = small_network("agln_release_resnet18")
    block = network.decoder.cfb[0][0]
    block.alpha.zero_()
    block.beta.zero_()
    fusion = agln_fast.fuse(network).decoder.merge[0].fusions[0]
    a = torch.randn(1, 16, 4, 5)
    assert fusion(a, torch.full_like(a, torch.nan), []).isfinite().all()


def test_the_mean_of_a_large_map_does_not_overflow():
    mean = Aggregation(AveragePoolingBlock(4)).half()
    mean.phi = None
    (pooled,) = mean(torch.full((1, 4, 128, 128), 8.0, dtype=torch.float16))  # the sum, 131072, is infinite in float16
    assert pooled.squeeze().tolist() == [8, 8, 8, 8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["agln", "agln_release", "agln_lite", "agln_minus_gap"])
@torch.inference_mode()
def test_half_precision_gives_the_same_labels(name, dtype, small_network, conv5):
    network = small_network(f"{name}_resnet18")
    image = torch.randn(2, 3, 64, 96)
    logits = agln_fast.fuse(network).to(dtype)(image.to(dtype))
    assert logits.dtype == dtype
    expected = network(image)
    top = expected.topk(2, 1).values
    margin = top[:, 0] - top[:, 1]
    agrees = logits.argmax(1) == expected.argmax(1)
    assert margin[agrees].sum() / margin.sum() > 0.99
    assert expected.argmax(1).unique().numel() > 2


@pytest.mark.parametrize("name", ["agln_release", "fcn", "fcn_concat"])
@torch.inference_mode()
def test_labels_from_low_resolution_logits(name, small_network):
    fused = agln_fast.fuse(small_network(f"{name}_resnet18"))
    image = torch.randn(1, 3, 61, 75)
    labels = label_upsample(fused.logits(image), (61, 75), align_corners=fused.align_corners)
    assert (labels == fused(image).argmax(1)).float().mean() > 0.999


def test_the_original_is_untouched(small_network):
    network = small_network("agln_lite_resnet18").train()
    network.encoder.eval()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    fused = agln_fast.fuse(network)
    assert not any(module.training for module in fused.modules())
    assert network.training
    assert not network.encoder.training
    for parameter in fused.parameters():
        assert not parameter.requires_grad
        parameter.zero_()
    assert network.state_dict().keys() == before.keys()
    for key, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@pytest.mark.parametrize("name", ["agln_release", "agln_lite", "fpn", "fcn8s", "fcn_concat"])
@torch.inference_mode()
def test_nothing_of_training_is_left_and_channels_come_last(name, small_network, conv5):
    fused = agln_fast.fuse(small_network(f"{name}_resnet18"))

    def check(module, arguments, output):
        outputs = output if isinstance(output, list | tuple) else [output]
        for tensor in outputs if module in (fused, fused.encoder) else [*arguments, *outputs]:
            if isinstance(tensor, torch.Tensor) and tensor.ndim == 4:
                assert tensor.stride(1) == 1, module  # logits are some channels of a map
                checked.append(module)

    checked = []
    for module in fused.modules():
        assert not isinstance(module, nn.BatchNorm2d | nn.Identity | nn.Dropout | nn.Conv2d | nn.ReLU)
        module.register_forward_hook(check)
        depthwise = isinstance(module, SeparableConv)
        assert not depthwise or module.depthwise.stride(0) == 1
        for key, weight in module.named_parameters(recurse=False):
            if weight.ndim == 4 and key != "depthwise":
                assert weight.is_contiguous(memory_format=torch.channels_last)
    assert fused(torch.randn(2, 3, 64, 96)).is_contiguous(memory_format=torch.channels_last)
    assert fused in checked


@pytest.mark.parametrize("num_classes", [5, 8, 150])
@torch.inference_mode()
def test_logits_lie_in_rows_that_begin_at_16_bytes(num_classes, small_network):
    """In half precision; `label_upsample` reads them as they are then."""
    fused = agln_fast.fuse(small_network("fpn_resnet18", num_classes)).half()
    logits = fused.logits(torch.randn(2, 3, 64, 96).half())
    assert logits.shape == (2, num_classes, 16, 24)
    assert label_upsample_kernel._in_rows(logits, 8).data_ptr() == logits.data_ptr()


@torch.inference_mode()
def test_the_release_projects_descriptors_once_for_each_reader(small_network):
    paper, release = (
        agln_fast.fuse(small_network("agln_resnet18", formulation=formulation)) for formulation in ("paper", "release")
    )
    assert [level.aggregation.count for level in paper.decoder.merge] == [1, 1, 1]
    assert [level.aggregation.count for level in release.decoder.merge] == [3, 2, 1]


@torch.no_grad()
def test_tracers_see_the_ops(small_network):
    fused = agln_fast.fuse(small_network("agln_lite_resnet18"))
    image = torch.randn(1, 3, 40, 33)
    program = torch.export.export(fused, (image,))
    ops = Counter(node.target._schema.name for node in program.graph.nodes if "agln" in str(node.target))
    assert ops == {
        f"agln::{name}": count for name, count in {**DENSE, "separable_conv": 12, "upsample_bilinear": 4}.items()
    }
    expected = fused(image)
    torch.testing.assert_close(program.module()(image), expected)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(image), expected)


def test_another_module_is_refused():
    with pytest.raises(ConfigError, match=r"needs a SegmentationNetwork .*got Linear"):
        agln_fast.fuse(nn.Linear(2, 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scalar", ["alpha", "beta", "gamma"])
def test_a_diverged_scalar_is_named(scalar, value, small_network):
    network = small_network()
    getattr(network.decoder.cfb[2][1], scalar).data.fill_(value)
    with pytest.raises(ConfigError, match=rf"decoder\.cfb\.2\.1\.{scalar} is {value}"):
        agln_fast.fuse(network)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((3, 64, 64), id="no-batch"),
        pytest.param((1, 4, 64, 64), id="four-channels"),
        pytest.param((1, 3, 31, 64), id="too-low"),
        pytest.param((1, 3, 64, 31), id="too-narrow"),
    ],
)
def test_another_shape_is_refused(shape, small_network):
    with pytest.raises(ConfigError, match=r"input of shape .* needs \(batch, 3"):
        agln_fast.fuse(small_network("fpn_resnet18"))(torch.zeros(shape))
