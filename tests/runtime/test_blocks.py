"""Where an engine leaves the reference: a block that was changed is found, and no other one is blamed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from agln_fast.artefact import Artefact
from agln_fast.engines import KINDS, REFERENCE, obstacle_to
from agln_fast.engines.base import block_tensors
from agln_fast.engines.torch_network import network_of
from agln_fast.errors import BackendError
from agln_fast.export.blocks import blocks_of_nodes
from agln_fast.plan.plan import Plan
from agln_fast.runtime.arrival import Arrivals
from agln_fast.runtime.blocks import BlockReference, _Tally, compare_blocks

GRAPHS = ["onnxruntime-fp32", pytest.param("openvino-fp32", marks=pytest.mark.openvino)]


@pytest.fixture(scope="module")
def images(bundle):
    return [reference.image for reference in Arrivals(bundle).reference[0]]


@pytest.fixture(scope="module")
def reference(bundle):
    return BlockReference(network_of(bundle.artefact(f"{REFERENCE}-fp32"), None), bundle.manifest.contract)


def changed(artefact: Artefact, block: str, factor: float) -> Artefact:
    """With the weight of the last convolution of `block` multiplied."""
    model = onnx.load_model_from_string(artefact.read(artefact.file))
    blocks = blocks_of_nodes(model)
    node = [each for each in model.graph.node if each.op_type == "Conv" and blocks.get(each.name) == block][-1]
    weight = next(each for each in model.graph.initializer if each.name == node.input[1])
    weight.raw_data = (onnx.numpy_helper.to_array(weight) * np.float32(factor)).tobytes()
    data = model.SerializeToString()
    return replace(artefact, read=lambda _: data)


@pytest.mark.parametrize("name", [*GRAPHS, "torch-fp32"])
def test_an_fp32_engine_is_within_the_bound_everywhere(name, bundle, reference, images):
    compared = compare_blocks(bundle.artefact(name), reference, images)
    assert compared.bound == pytest.approx(0.001)
    assert compared.first is None
    errors = [each.error for each in compared.errors if each.error is not None]
    assert len(errors) > 40
    # Rounding to 24 bits is there, and nothing much larger: it is no comparison of a network with itself.
    assert all(2**-28 < error < 2**-13 for error in errors)
    assert all(each.shown_by == each.block.name for each in compared.errors if each.error is not None)


@pytest.mark.parametrize("name", GRAPHS)
@pytest.mark.parametrize(
    "block",
    ["encoder.stage3", "decoder.cfb.1.0", "classifier"],
)
def test_the_block_that_was_changed_is_the_first_above_the_bound(name, block, bundle, reference, images):
    compared = compare_blocks(changed(bundle.artefact(name), block, 1.5), reference, images)
    assert compared.first is not None
    assert compared.first.block.name == block
    names = [each.block.name for each in compared.errors]
    before = [each.error for each in compared.errors[: names.index(block)] if each.error is not None]
    assert max(before) < 2**-13
    assert not compared.inside(compared.first)


def test_a_changed_block_inside_a_rewrite_is_told_with_the_one_behind_it(bundle, reference, images):
    artefact = bundle.artefact("onnxruntime-fp32")
    assert artefact.plan.project_descriptors  # the SABs' descriptors are projected by those who take them
    # Without training all descriptors are alike, and little comes of other attention.
    compared = compare_blocks(changed(artefact, "decoder.sab.1", -300.0), reference, images)
    assert compared.first is not None
    assert compared.first.block.name == "decoder.cfb.1.1.sdm"
    assert [each.block.name for each in compared.inside(compared.first)] == ["decoder.sab.1"]


def test_what_is_not_finite_is_above_every_bound(bundle, reference, images):
    compared = compare_blocks(
        changed(bundle.artefact("onnxruntime-fp32"), "decoder.smooth.1", math.inf), reference, images, minimum=0.0
    )
    assert compared.first is not None
    assert (compared.first.block.name, compared.first.error) == ("decoder.smooth.1", math.inf)


def test_the_smallest_agreement_is_the_bound(bundle, reference, images):
    compared = compare_blocks(bundle.artefact("torch-fp32"), reference, images[:1], minimum=1.0)
    assert compared.bound == 0
    assert compared.first is compared.errors[0]


@pytest.mark.parametrize(("precision", "unit"), [("bf16", 2**-8), ("fp16", 2**-11)])
@pytest.mark.parametrize("kind", ["torch", "fused"])
def test_half_precision_rounds_every_block(kind, precision, unit, bundle, reference, images):
    artefact = replace(bundle.artefact("torch-fp32"), kind=kind, precision=precision)
    compared = compare_blocks(artefact, reference, images[:1])
    stem = compared.errors[0].error
    assert stem is not None
    assert unit / 16 < stem < 4 * unit  # a few roundings: of the input, the weights, the results
    hidden = {each.block.name for each in compared.errors if each.error is None}
    assert bool(hidden) == (kind == "fused")
    shown_by = {each.block.name: each.shown_by for each in compared.errors}
    assert shown_by["decoder.cfb.0.0.lrm"] == f"decoder.cfb.0.0{'.lrm' if kind == 'torch' else ''}"


@pytest.mark.openvino
def test_openvino_shows_blocks_in_bf16(bundle, reference, images):
    artefact = replace(bundle.artefact("openvino-fp32"), precision="bf16")
    if obstacle := obstacle_to(artefact):
        pytest.skip(obstacle)
    stem = compare_blocks(artefact, reference, images).errors[0].error
    assert stem is not None
    assert 2**-12 < stem < 2**-6


def test_errors_are_relative_to_the_whole_block():
    tally = _Tally()
    tally.add(np.float32([3.0, 0.0]), np.array([0.0, 0.0]))
    tally.add(np.float32([1.0, 7.0]), np.array([1.0, 3.0]))
    tally.add(np.float32([0.0, 4.0]), np.array([0.0, 4.0]))
    assert tally.error == pytest.approx(5 / math.sqrt(26))  # √(3² + 4²) of √(1² + 3² + 4²)
    assert tally.largest == pytest.approx(1.0)  # 4 of 4


def test_nothing_is_compared_with_nothing():
    silent, wrong = _Tally(), _Tally()
    silent.add(np.zeros(2, np.float32), np.zeros(2))
    wrong.add(np.ones(2, np.float32), np.zeros(2))
    assert (silent.error, wrong.error, wrong.largest) == (0.0, math.inf, math.inf)


def test_the_output_of_low_resolution_is_the_classifier_s(bundle):
    artefact = replace(bundle.artefact("onnxruntime-fp32"), plan=Plan(low_resolution_labels=True))
    assert block_tensors(artefact, ["head", "logits"]) == {"head": "head", "classifier": "logits"}
    half = block_tensors(artefact, ["head", "classifier", "logits"])
    assert half == {"head": "head", "classifier": "classifier"}
    full = replace(artefact, contract=replace(artefact.contract, output="logits"))
    assert block_tensors(full, ["head", "classifier", "logits"])["logits"] == "logits"


def test_a_graph_without_names_is_refused(bundle):
    with pytest.raises(BackendError, match="build it again"):
        block_tensors(bundle.artefact("onnxruntime-fp32"), ["relu_1", "logits"])


@pytest.mark.parametrize("kind", ["tensorrt", "tensorrt-rtx"])
def test_a_compiled_engine_says_that_it_shows_nothing(kind, bundle):
    artefact = replace(bundle.artefact("torch-fp32"), name=f"{kind}-fp16", kind=kind)
    with pytest.raises(BackendError, match=f"{kind}-fp16: .* shows nothing"):
        KINDS[kind].blocks(artefact, [])


def test_watching_leaves_the_engine_as_it_was(bundle, images):
    artefact = bundle.artefact("torch-fp32")
    with KINDS["torch"].open(artefact) as engine:
        before = engine.run(images[0])
        engine.run_blocks(images[0])
        assert np.array_equal(engine.run(images[0]), before)
        assert not any(module._forward_hooks for module in engine._network.modules())
        assert torch.is_grad_enabled()
