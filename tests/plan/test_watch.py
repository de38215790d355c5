"""Blocks watched in rewritten networks are those of the reference, in float64; what a rewrite hides is missing."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from variants import EVERYTHING, SWITCHES, VARIANTS, network

from agln_fast.models.blocks import resize
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.blocks import blocks_of
from agln_fast.plan.fuse import fuse
from agln_fast.plan.network import InferenceNetwork
from agln_fast.plan.plan import ALGEBRA, Plan
from agln_fast.plan.rewrites import rewrite
from agln_fast.plan.watch import watching
from agln_fast.plan.winograd import WinogradConv2d, winograd

_network = cache(network)
IMAGE = torch.randn(2, 3, 45, 77, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SUMS = {f"decoder.cfb.{level}.{number}.sum" for level in range(3) for number in range(level + 1)}
SABS = {f"decoder.sab.{level}" for level in range(3)}


def watched(model: SegmentationNetwork | InferenceNetwork) -> dict[str, Tensor]:
    with torch.no_grad(), watching(model, torch.clone) as found:
        model(IMAGE)
    return dict(found)


def assert_equal(model: SegmentationNetwork, planned: InferenceNetwork) -> set[str]:
    """Every block that is there, to 1e-10 of the largest value. Returns those that are not."""
    expected, actual = watched(model), watched(planned)
    assert list(expected) == [block.name for block in blocks_of(model.config) if block.name in expected]
    for name, value in actual.items():
        assert value.shape == expected[name].shape, name
        assert (value - expected[name]).abs().max() < 1e-10 * expected[name].abs().max(), name
    return expected.keys() - actual.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_reference_has_every_block(variant):
    model = _network(variant)
    assert set(watched(model)) == {block.name for block in blocks_of(model.config)}
    assert not assert_equal(model, InferenceNetwork(model))
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("affinity" in vars(module) for module in model.modules())


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_the_reference_s_blocks_are_what_their_names_say(variant):
    """By the equations of the paper, and of docs/models.md for the release."""
    model = _network(variant)
    x, decoder = watched(model), model.decoder
    lower, block = x["decoder.cfb.0.0"], decoder.cfb[1][1]
    a, b, m = x["decoder.cfb.1.0"], x["decoder.lateral.1"], x["decoder.cfb.1.1.sdm"]
    with torch.no_grad():
        stem = F.max_pool2d(F.relu(model.encoder.bn1(model.encoder.conv1(IMAGE))), 3, 2, 1)
        total = a + block.alpha * m
        query = total if variant == "release" else block.enhance(total)
        energy = (a if variant == "release" else query).flatten(2) @ b.flatten(2).transpose(1, 2)
        r = (-energy if variant == "release" else energy).softmax(-1)
        g = (x["decoder.cfb.1.1.affinity"] @ b.flatten(2)).view_as(b) * m.sigmoid()
        inner = block.gamma * g + b if variant == "release" else g
        expected = {
            "encoder.stem": stem,
            "encoder.stage1": model.encoder.layer1(stem),
            "encoder.stage4": model.encoder.layer4(x["encoder.stage3"]),
            "decoder.reduce": decoder.reduce(x["encoder.stage4"]),
            "decoder.lateral.1": decoder.lateral[1](x["encoder.stage2"]),
            "decoder.sab.1": decoder.sab[1](lower),
            "decoder.merge.1": resize(lower, b.shape),
            "decoder.cfb.1.1.sdm": block.sdm(a, x["decoder.sab.1"]),
            "decoder.cfb.1.1.sum": total,
            "decoder.cfb.1.1.affinity": r,
            "decoder.cfb.1.1.lrm": g,
            "decoder.cfb.1.1": block.fuse(query + block.beta * inner),
            "decoder.smooth.1": decoder.smooth[1](x["decoder.cfb.1.1"]),
            "head": model.classifier[:4](x["decoder"]),
            "classifier": model.classifier[4](x["head"]),
            "logits": resize(x["classifier"], IMAGE.shape),
        }
        parts = [x["decoder.reduce"], *(x[f"decoder.smooth.{level}"] for level in range(3))]
        expected["decoder"] = torch.cat([resize(part, parts[-1].shape) for part in parts], 1)
        if variant == "paper":
            expected["decoder.cfb.1.1.enhance"] = query
    for name, value in expected.items():
        torch.testing.assert_close(x[name], value, rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plan", [ALGEBRA, EVERYTHING], ids=["algebra", "everything"])
def test_every_block_that_is_there_equals_the_reference_s(variant, plan):
    model = _network(variant)
    hidden = assert_equal(model, rewrite(model, plan))
    projected = SABS if model.config.formulation == "release" and model.decoder is not None else set()
    mixed = {"decoder"} if plan is EVERYTHING and model.config.architecture in ("fpn", "agln") else set()
    assert hidden == projected | mixed


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_each_rewrite_alone_hides_no_more_than_it_must(variant, name):
    model = _network(variant)
    hidden = assert_equal(model, rewrite(model, Plan(**{name: True})))
    assert hidden == (SABS if (variant, name) == ("release", "project_descriptors") else set())


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_winograd_hides_nothing(variant):
    model = _network(variant)
    planned = winograd(rewrite(model, Plan(fold_batchnorm=True)), 4, fewest_channels=1)
    assert sum(isinstance(module, WinogradConv2d) for module in planned.modules()) > 20
    assert assert_equal(model, planned) == set()


def test_labels_before_the_resize_hide_the_logits_of_full_size():
    model = _network("release")
    assert assert_equal(model, rewrite(model, Plan(low_resolution_labels=True))) == {"logits"}


def test_what_is_left_out_is_not_there():
    model = network("release", zeros=("alpha", "gamma"))
    hidden = assert_equal(model, rewrite(model, ALGEBRA))
    gone = {f"{name[:-4]}{part}" for name in SUMS for part in (".sdm", ".sum", ".affinity", ".lrm")}
    assert hidden == SABS | gone
    assert assert_equal(model, InferenceNetwork(model)) == SUMS  # A + 0·M is A itself


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_fused_network_s_blocks_equal_the_reference_s(variant):
    model = _network(variant)
    hidden = assert_equal(model, fuse(model))
    parts = {block.name for block in blocks_of(model.config)}
    joint = model.config.formulation == "release" and "decoder.cfb.0.0.lrm" in parts
    expected = {name for name in parts if name.endswith(".lrm")}
    expected |= {name for name in parts if joint and name.endswith((".sdm", ".sum"))}
    expected |= {name for name in parts if model.config.formulation == "release" and name.startswith("decoder.sab")}
    assert hidden == expected


def test_a_block_that_computes_something_else_is_seen():
    """Of the check above: it would notice."""
    model = network("paper")
    planned = rewrite(model, replace(EVERYTHING, winograd=0))
    layer = planned.get_submodule("decoder.merge.1.fusions.0.distribution.phi")
    assert isinstance(layer, nn.Conv2d)
    layer.weight = nn.Parameter(layer.weight * (1 + 1e-6), requires_grad=False)
    with pytest.raises(AssertionError, match=r"decoder\.cfb\.1\.0\.sdm"):
        assert_equal(model, planned)
