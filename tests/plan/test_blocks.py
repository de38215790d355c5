"""Names of blocks: the same for the modules and weights of every form of a network."""

from __future__ import annotations

import pytest

from agln_fast.models.config import preset
from agln_fast.plan.blocks import block_of, blocks_of
from agln_fast.plan.fuse import fuse
from agln_fast.plan.plan import ALGEBRA
from agln_fast.plan.rewrites import rewrite

FAMILY = (
    "fcn8s_resnet18",
    "fpn_resnet18s",
    "agln_resnet50",
    "agln_release_resnet18",
    "agln_lite_resnet18",
    "agln_straight_resnet18",
    "agln_minus_resnet18",
    "agln_minus_gap_resnet18",
    "agln_minus_cr_resnet18",
)


@pytest.mark.parametrize("name", FAMILY)
def test_every_weight_of_every_form_is_in_one_block_of_the_network(name, small_network):
    network = small_network(name, width=1 / 32, channels=4)
    names = [block.name for block in blocks_of(network.config)]
    assert len(names) == len(set(names))
    reference = {path: block_of(path) for path, _ in network.named_parameters()}
    assert set(reference.values()) <= set(names)
    for form in (rewrite(network, ALGEBRA), fuse(network)):
        found = {block_of(f"network.{path}") for path, _ in form.named_parameters()}
        assert found <= set(reference.values())


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("encoder.conv1.0.weight", "encoder.stem"),
        ("encoder.bn1", "encoder.stem"),
        ("encoder.layer3.1.bn2.weight", "encoder.stage3"),
        ("encoder.stages.2.1.last.weight", "encoder.stage3"),
        ("decoder.reduce.0.weight", "decoder.reduce"),
        ("decoder.sab.2.theta.weight", "decoder.sab.2"),
        ("decoder.merge.2.aggregation.theta", "decoder.sab.2"),
        ("decoder.cfb.1.0.sdm.phi.weight", "decoder.cfb.1.0.sdm"),
        ("network.decoder.merge.1.fusions.0.distribution.phi", "decoder.cfb.1.0.sdm"),
        ("decoder.merge.2.fusions.1.fuse.0", "decoder.cfb.2.1"),
        ("decoder.cfb.2.1.enhance.0.weight", "decoder.cfb.2.1.enhance"),
        ("decoder.merge.1", "decoder.merge.1"),
        ("decoder.smooth.0.0", "decoder.smooth.0"),
        ("mix.0.mixed.1.weight", "head"),
        ("classifier.0.weight", "head"),
        ("classifier.4.weight", "classifier"),
        ("classifier.convolution.weight", "classifier"),
        ("decoder", None),
        ("mean", None),
        ("encoders.layer1", None),
    ],
)
def test_a_path_tells_its_block(path, block):
    assert block_of(path) == block


def test_titles_are_the_paper_s_words():
    titles = {block.name: block.title for block in blocks_of(preset("agln_resnet50", 5))}
    assert titles["decoder.cfb.1.1.sdm"] == "CFB 1/8 no. 2: semantic distribution M"
    assert titles["decoder.cfb.0.0"] == "CFB 1/16 no. 1: output O"
    assert titles["decoder.sab.2"] == "SAB 3"


def test_only_what_a_network_has_is_a_block():
    release, straight, fcn8s = (
        {block.name for block in blocks_of(preset(name, 5))}
        for name in ("agln_release_resnet50", "agln_straight_resnet50", "fcn8s_resnet50")
    )
    assert "decoder.cfb.0.0.enhance" not in release  # it has no Ψ
    assert not {"decoder.sab.1", "decoder.cfb.2.1"} & straight
    assert not any(name.startswith("decoder") for name in fcn8s)


@pytest.mark.parametrize("name", FAMILY)
def test_what_is_computed_reaches_the_logits(name):
    blocks = {block.name: block for block in blocks_of(preset(name, 5))}
    order = list(blocks)
    for block in blocks.values():
        assert (block.taker is None) == (block.name == "logits")
        assert block.taker is None or order.index(block.taker) > order.index(block.name)


@pytest.mark.parametrize(
    ("model", "block", "taker"),
    [
        ("agln_resnet18", "decoder.cfb.1.0.sum", "decoder.cfb.1.0.enhance"),  # Eq. 3
        ("agln_release_resnet18", "decoder.cfb.1.0.sum", "decoder.cfb.1.0"),  # its R is of A
        ("agln_resnet18", "decoder.cfb.1.0.sdm", "decoder.cfb.1.0.sum"),
        ("agln_resnet18", "decoder.cfb.1.0.affinity", "decoder.cfb.1.0.lrm"),
        ("agln_resnet18", "decoder.sab.1", "decoder.cfb.1.1.sdm"),  # the descriptors of SAB j go to block j
        ("agln_straight_resnet18", "decoder.sab.0", "decoder.cfb.0.0.sdm"),
        ("agln_resnet18", "decoder.smooth.0", "decoder"),
        ("fpn_resnet18", "decoder.lateral.1", "decoder.merge.1"),
        ("fpn_resnet18", "decoder.merge.1", "decoder.smooth.1"),
        ("fcn8s_resnet18", "encoder.stage4", "head"),
    ],
)
def test_who_takes_a_result(model, block, taker):
    assert {each.name: each.taker for each in blocks_of(preset(model, 5))}[block] == taker
