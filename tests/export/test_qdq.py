"""int8 as pairs of QuantizeLinear and DequantizeLinear: what has some, of which kind, and what TensorRT makes of it."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from agln_fast.contract import IOContract
from agln_fast.data.scenes import Scenes
from agln_fast.errors import BuildError, MissingPackageError
from agln_fast.export.convolutions import convolution_blocks
from agln_fast.export.onnx import export_onnx
from agln_fast.export.qdq import leave_in_floating_point, quantize_to_qdq
from agln_fast.export.quantize import quantize_onnx
from agln_fast.export.tensorrt import _PROGRAM, _TENSOR, build_tensorrt_engine
from agln_fast.plan.blocks import blocks_of
from agln_fast.plan.plan import ALGEBRA
from agln_fast.runtime.images import pack

LABELS = IOContract(64, 96)
BLOCK = "encoder.stage2.0"


def _batches(count, split="train"):
    return [pack([sample.image], LABELS) for sample in Scenes(split, size=(64, 96), length=count)]


@pytest.fixture(scope="module")
def graphs(small_network, tmp_path_factory):
    """The same network in both types of what is not quantised."""
    folder = tmp_path_factory.mktemp("graphs")
    for kind in ("fp32", "fp16"):
        export_onnx(small_network(), folder / f"{kind}.onnx", LABELS, kind, plan=ALGEBRA)
    return folder


@pytest.fixture(scope="module")
def quantised(graphs, tmp_path_factory):
    """Graphs by type and by the blocks that are not quantised."""
    folder = tmp_path_factory.mktemp("quantised")
    known = {}

    def call(kind, *floating):
        if (kind, floating) not in known:
            path = folder / f"{kind}-{len(floating)}.onnx"
            if floating:
                leave_in_floating_point(call(kind), graphs / f"{kind}.onnx", path, floating)
            else:
                quantize_to_qdq(graphs / f"{kind}.onnx", path, _batches(8))
            known[kind, floating] = path
        return known[kind, floating]

    return call


class _Model:
    def __init__(self, path):
        graph = onnx.load(path).graph
        self.nodes = list(graph.node)
        self.convolutions = [node for node in self.nodes if node.op_type == "Conv"]
        self.made_by = {name: node for node in self.nodes for name in node.output}
        self.values = {value.name: numpy_helper.to_array(value) for value in graph.initializer}

    def is_int8(self, convolution):
        makers = [self.made_by.get(name) for name in convolution.input[:2]]
        return [maker is not None and maker.op_type == "DequantizeLinear" for maker in makers]


def test_blocks_are_those_of_the_network_and_residual_ones(graphs, small_network):
    blocks = convolution_blocks(graphs / "fp32.onnx")
    assert list(blocks) == [node.name for node in _Model(graphs / "fp32.onnx").convolutions]
    counts = Counter(blocks.values())
    assert counts["encoder.stem"] == counts["classifier"] == 1
    assert counts["encoder.stage1.0"] == 2
    assert counts[BLOCK] == 3  # with the shortcut's
    assert {name for name in counts if not re.fullmatch(r"encoder\.stage\d\.\d", name)} <= {
        block.name for block in blocks_of(small_network().config)
    }
    assert blocks == convolution_blocks(graphs / "fp16.onnx")


def test_convolutions_nobody_wrote_about_are_their_own_blocks(tmp_path):
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        two (float[1,3,8,8] image) => (float[1,3,8,8] logits) { logits = Conv(image, weight) }
    """)
    model.graph.node[0].name = "only"
    onnx.save(model, tmp_path / "x.onnx")
    assert convolution_blocks(tmp_path / "x.onnx") == {"only": "only"}


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_all_that_convolutions_read_is_int8(kind, quantised):
    """Weights by output channels, inputs as a whole, and zero is zero."""
    model = _Model(quantised(kind))
    assert all(all(model.is_int8(node)) for node in model.convolutions)
    for node in model.convolutions:
        data, weights = (model.made_by[name] for name in node.input[:2])
        stored, scales, zeros = (model.values[name] for name in weights.input)
        assert stored.dtype == np.int8
        assert scales.shape == zeros.shape == (len(stored),)
        scale, zero = (model.values[name] for name in data.input[1:])
        assert scale.shape == zero.shape == ()
        assert zero.dtype == np.int8
        assert scale.dtype == scales.dtype == {"fp32": np.float32, "fp16": np.float16}[kind]
        assert not zero.any()
        assert not zeros.any()
        assert len(node.input) < 3 or node.input[2] in model.values, "the bias stays as it is"


def test_nothing_else_is(quantised):
    """No pair stands before or behind attention, softmaxes, sums and resizes: each leads to convolutions alone."""
    model = _Model(quantised("fp32"))
    pairs = [node for node in model.nodes if node.op_type == "DequantizeLinear"]
    assert pairs
    readers = {node.op_type for pair in pairs for node in model.nodes if pair.output[0] in node.input}
    assert readers == {"Conv"}
    assert {"Softmax", "MatMul", "Add"} <= {node.op_type for node in model.nodes}


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_a_block_can_be_left_out(kind, graphs, quantised):
    blocks = convolution_blocks(graphs / f"{kind}.onnx")
    model, whole = _Model(quantised(kind, BLOCK)), _Model(quantised(kind))
    for node in model.convolutions:
        assert model.is_int8(node) == [blocks[node.name] != BLOCK] * 2
    rest = [node.input[0] for node in model.convolutions if blocks[node.name] != BLOCK]
    for name in rest:  # the calibration is the same
        scales = (each.values[each.made_by[name].input[1]] for each in (model, whole))
        assert len(set(map(float, scales))) == 1


def test_the_largest_magnitude_is_127(graphs, quantised):
    """The first convolution's input is the normalised picture, which can be computed here."""
    model = _Model(quantised("fp32"))
    pixels = np.concatenate(_batches(8)) / 255
    largest = np.abs((pixels - LABELS.mean) / LABELS.std).max()
    scale = model.values[model.made_by[model.convolutions[0].input[0]].input[1]]
    assert scale == pytest.approx(largest / 127, rel=0.01)


def test_nothing_is_left_of_pairs_that_nobody_reads(quantised):
    model = _Model(quantised("fp32", BLOCK))
    read = {name for node in model.nodes for name in node.input}
    assert all(node.output[0] in read for node in model.nodes if "Quantize" in node.op_type or "Dequ" in node.op_type)
    assert model.values.keys() <= read


@pytest.mark.openvino
def test_it_gives_the_labels_of_the_graph_that_it_was(graphs, quantised):
    """Within 3 %, which int8 may flip; with the quantised convolutions really run in int8."""
    openvino = pytest.importorskip("openvino")
    for kind in ("fp32", "fp16"):
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        whole, found = (
            openvino.Core().compile_model(path, "CPU", settings) for path in (graphs / "fp32.onnx", quantised(kind))
        )
        same = [(whole([image])[0] == found([image])[0]).mean() for image in _batches(4, "test")]
        assert 0.97 < np.mean(same) < 1


@pytest.mark.openvino
def test_nncf_leaves_the_same_block_out(graphs, tmp_path):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    quantize_onnx(graphs / "fp32.onnx", tmp_path / "model.xml", _batches(2), [BLOCK])
    blocks = convolution_blocks(graphs / "fp32.onnx")
    floating = set()
    for node in openvino.Core().read_model(tmp_path / "model.xml").get_ops():
        if node.get_type_name() == "Convolution":
            value = node.input_value(1).get_node()
            while value.get_type_name() in ("Reshape", "Multiply", "Convert"):
                value = value.input_value(0).get_node()
            if value.get_element_type().get_type_name() != "i8":
                floating.add(node.get_friendly_name().removesuffix("/WithoutBiases"))
    assert floating == {name for name, block in blocks.items() if block == BLOCK}


def _types(plan, names):
    """Of the inputs of the convolutions that the text in a plan of TensorRT-RTX lists, in its own words, by name."""
    found = {}
    for program in plan.split(_PROGRAM)[1:]:
        types = {name.decode(): kind.decode() for name, kind in _TENSOR.findall(program)}
        for line in program.decode(errors="replace").splitlines():
            name = line.split('name="')[1].split('"')[0] if "corrltn={" in line else None
            if name in names:
                inputs = line.split("input={")[1].split('"')[1:4:2]
                found[name] = {types[each] for each in inputs if each in types}
    return found


@pytest.mark.tensorrt_rtx
def test_tensorrt_rtx_computes_it_in_int8(graphs, quantised, tmp_path):
    """Read back from the plan: int8 but for the block that is left out, which is half precision, as all the rest is."""
    blocks = convolution_blocks(graphs / "fp16.onnx")
    floating = [name for name, block in blocks.items() if block == BLOCK]
    options = {"flavour": "tensorrt-rtx", "precision": "int8", "compute_capabilities": ("sm89",)}
    path = tmp_path / "x.engine"
    built = build_tensorrt_engine(quantised("fp16", BLOCK), path, floating=floating, **options)
    assert built.precision == "int8"
    assert built.convolutions == len(blocks)
    types = _types(path.read_bytes(), blocks)
    assert len(types) == built.convolutions_in_plan >= len(blocks) - 3
    assert {name for name, kinds in types.items() if kinds == {"int8"}} == types.keys() - set(floating)
    assert all(types[name] == {"half"} for name in types.keys() & set(floating))
    assert types.keys() & set(floating)


@pytest.mark.tensorrt_rtx
def test_what_is_not_in_int8_as_promised_is_refused(graphs, quantised, tmp_path):
    options = {"flavour": "tensorrt-rtx", "compute_capabilities": ("sm89",)}
    for graph, more, message in (
        (quantised("fp16", BLOCK), {"precision": "int8"}, "is in fp32, not int8"),
        (graphs / "fp16.onnx", {"precision": "int8"}, "is in fp32, not int8"),
    ):
        with pytest.raises(BuildError, match=message):
            build_tensorrt_engine(graph, tmp_path / "x.engine", **more, **options)
    blocks = convolution_blocks(graphs / "fp16.onnx")
    with pytest.raises(BuildError, match="is in int8, not floating point"):
        build_tensorrt_engine(quantised("fp16"), tmp_path / "x.engine", precision="int8", floating=blocks, **options)
    assert not list(tmp_path.iterdir())


def _refuse(message, graph, batches, tmp_path):
    with pytest.raises(BuildError, match=message):
        quantize_to_qdq(graph, tmp_path / "q.onnx", batches)
    assert not (tmp_path / "q.onnx").exists()


def test_what_cannot_be_quantised_is_told_in_a_line(graphs, quantised, tmp_path):
    graph = graphs / "fp32.onnx"
    _refuse("needs pictures to calibrate on, and there are none", graph, [], tmp_path)
    _refuse(r"fp32\.onnx: cannot be quantised: .+", graph, [np.zeros((1, 32, 96, 3), np.uint8)], tmp_path)
    (tmp_path / "broken.onnx").write_bytes(b"nonsense")
    _refuse(r"broken\.onnx: cannot be quantised: .+", tmp_path / "broken.onnx", _batches(1), tmp_path)
    everything = set(convolution_blocks(graph).values())
    with pytest.raises(BuildError, match="all convolutions stay in floating point"):
        leave_in_floating_point(quantised("fp32"), graph, tmp_path / "q.onnx", everything)
    assert not (tmp_path / "q.onnx").exists()


def test_nothing_is_said(graphs, tmp_path, capfd, caplog):
    quantize_to_qdq(graphs / "fp32.onnx", tmp_path / "q.onnx", _batches(1))
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.name == "root"]


def test_a_missing_package_names_the_extra(graphs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match=r'"onnxruntime" is not installed: .*\[int8\]'):
        quantize_to_qdq(graphs / "fp32.onnx", tmp_path / "q.onnx", _batches(1))


def test_batches_are_as_large_as_the_contract_says(small_network, tmp_path):
    contract = replace(LABELS, min_batch=2, max_batch=2)
    export_onnx(small_network("fpn_resnet18"), tmp_path / "m.onnx", contract, plan=ALGEBRA)
    frames = [sample.image for sample in Scenes("train", size=(64, 96), length=2)]
    quantize_to_qdq(tmp_path / "m.onnx", tmp_path / "q.onnx", [pack(frames, contract)])
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(tmp_path / "q.onnx").graph.node)
