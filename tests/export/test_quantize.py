"""int8: what is quantised and what is not, what it costs in accuracy, and that a failure leaves nothing behind."""

from __future__ import annotations

import logging
import resource
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest
import rich

import agln_fast
from agln_fast.contract import IOContract
from agln_fast.data.scenes import Scenes
from agln_fast.errors import BuildError, ConfigError, MissingPackageError
from agln_fast.export.onnx import export_onnx
from agln_fast.export.quantize import quantize_onnx
from agln_fast.metrics import SegmentationMetrics
from agln_fast.runtime.images import pack

openvino = pytest.importorskip("openvino", reason="needs the package openvino")
nncf = pytest.importorskip("nncf", reason="needs the package nncf")

LABELS = IOContract(64, 96)
MOVES = ("Reshape", "Transpose", "Convert", "Squeeze", "Unsqueeze", "MaxPool")  # what makes no new values


def _frames(count, contract=LABELS, split="train"):
    return [sample.image for sample in Scenes(split, size=(contract.height, contract.width), length=count)]


def _batches(count, contract=LABELS):
    return [pack([frame], contract) for frame in _frames(count, contract)]


@pytest.fixture(scope="module")
def graph(small_network, tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    export_onnx(small_network(), path, LABELS)
    return path


@pytest.fixture(scope="module")
def engine(graph, tmp_path_factory):
    path = tmp_path_factory.mktemp("engine") / "model.int8.xml"
    quantize_onnx(graph, path, _batches(8))
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Two convolutions with biases, for what does not depend on the network."""
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        tiny (uint8[1,64,96,3] image) => (uint8[1,64,96] labels) {
            pixels = Cast<to=1>(image)
            planes = Transpose<perm=[0, 3, 1, 2]>(pixels)
            hidden = Conv<pads=[1, 1, 1, 1]>(planes, first, first_bias)
            active = Relu(hidden)
            logits = Conv<pads=[1, 1, 1, 1]>(active, second, second_bias)
            indices = ArgMax<axis=1, keepdims=0>(logits)
            labels = Cast<to=2>(indices)
        }
    """)
    random = np.random.default_rng(0)
    for name, dims in (("first", (16, 3, 3, 3)), ("second", (5, 16, 3, 3))):
        for suffix, shape in (("", dims), ("_bias", dims[:1])):
            values = random.standard_normal(shape, np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name + suffix))
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    onnx.save(model, path)
    return path


def _above(value):
    """Types of the operations that make `value`, past those that make no new values."""
    node = value.get_node()
    kind = node.get_type_name()
    if kind not in (*MOVES, "Concat"):
        return {kind}
    values = node.input_values() if kind == "Concat" else [node.input_value(0)]
    return set().union(*map(_above, values))


def _below(node):
    """Types of the operations that read what `node` makes, past those that make no new values."""
    readers = [target.get_node() for target in node.output(0).get_target_inputs()]
    below = [_below(reader) if reader.get_type_name() in MOVES else {reader.get_type_name()} for reader in readers]
    return set().union(*below)


def _nodes(model, kind):
    """Operations of one type. What reads them is there as long as `model` is."""
    return [node for node in model.get_ops() if node.get_type_name() == kind]


def _labels(path, frames, contract):
    """(N, H, W), in fp32 but for what the file says is int8."""
    compiled = openvino.Core().compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    return np.concatenate([compiled([pack([frame], contract)])[0] for frame in frames])


@pytest.fixture(scope="module")
def model(engine):
    return openvino.Core().read_model(engine)


def test_every_convolution_is_quantised(model):
    """Its input is rounded to 256 levels, its weights are int8; what is left is fp32, not fp16."""
    convolutions = _nodes(model, "Convolution")
    assert convolutions
    for node in convolutions:
        assert _above(node.input_value(0)) == {"FakeQuantize"}
    assert all(node.get_levels() == 256 for node in _nodes(model, "FakeQuantize"))
    kinds = Counter(node.get_element_type().get_type_name() for node in _nodes(model, "Constant") if node.shape)
    assert kinds["i8"] >= len(convolutions)
    assert "f16" not in kinds


def test_attention_is_not_quantised(model):
    """Neither what goes into the products of two activations and the softmaxes, nor what comes out of the latter."""
    softmaxes, products = _nodes(model, "Softmax"), _nodes(model, "MatMul")
    assert softmaxes
    assert products
    for node in [*softmaxes, *products]:
        assert not any("FakeQuantize" in _above(value) for value in node.input_values())
    for node in softmaxes:
        assert _below(node) == {"MatMul"}


def test_names_of_nodes_do_not_matter(graph, engine, tmp_path):
    model = onnx.load(graph)
    for number, node in enumerate(model.graph.node):
        node.name = f"n{number}"
    onnx.save(model, tmp_path / "renamed.onnx")
    quantize_onnx(tmp_path / "renamed.onnx", tmp_path / "model.xml", _batches(8))
    assert (tmp_path / "model.bin").read_bytes() == engine.with_suffix(".bin").read_bytes()


def test_sums_and_products_with_constants_are_not_quantised(tiny, tmp_path):
    """Resizes are written as products with constant matrices, and the energy goes through them."""
    model = onnx.load(tiny)
    matrix = np.random.default_rng(1).standard_normal((96, 96), np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(matrix, "matrix"))
    nodes = list(model.graph.node)
    nodes[4].input[0] = "sum"
    nodes[4:4] = [
        onnx.helper.make_node("MatMul", ["active", "matrix"], ["resized"]),
        onnx.helper.make_node("Add", ["active", "resized"], ["sum"]),
    ]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, tmp_path / "model.onnx")
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "model.xml", _batches(1))
    quantised = openvino.Core().read_model(tmp_path / "model.xml")
    (product,) = _nodes(quantised, "MatMul")
    assert not any("FakeQuantize" in _above(value) for value in product.input_values())
    assert _below(product) == {"Add"}
    assert {kind for node in _nodes(quantised, "FakeQuantize") for kind in _below(node)} == {"Convolution"}


@pytest.mark.parametrize("largest", [2, 4])
def test_calibration_follows_the_contract(largest, tiny, tmp_path):
    """Float images in batches of two; an engine for two to four still takes four."""
    contract = replace(LABELS, layout="float_nchw", min_batch=2, max_batch=largest)
    model = onnx.load(tiny)
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, contract.input_shape)
    model.graph.input[0].CopyFrom(image)
    model.graph.node[0].CopyFrom(onnx.helper.make_node("Identity", ["image"], ["planes"]))
    del model.graph.node[1]
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    onnx.save(model, tmp_path / "model.onnx")
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "model.xml", [pack(_frames(2), contract)] * 2)
    batch = pack(_frames(largest, split="test"), contract)
    found, expected = (
        openvino.Core().compile_model(tmp_path / name, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([batch])[0]
        for name in ("model.xml", "model.onnx")
    )
    assert found.shape == (largest, 64, 96)
    assert 0.9 < (found == expected).mean() < 1


@pytest.mark.slow
def test_a_trained_network_keeps_its_accuracy(tmp_path):
    """Within half a point of mean IoU on 80 scenes that it was not calibrated on, 1.3 million pixels."""
    contract = IOContract(128, 128)
    export_onnx(agln_fast.load_checkpoint("agln_nano"), tmp_path / "model.onnx", contract)
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "model.xml", _batches(32, contract))
    scenes = list(Scenes("test", length=80))
    frames, truth = [sample.image for sample in scenes], np.stack([sample.labels for sample in scenes])
    miou = {}
    for name in ("model.onnx", "model.xml"):
        metrics = SegmentationMetrics(12)
        metrics.update(_labels(tmp_path / name, frames, contract), truth)
        miou[name] = metrics.mean_iou
    assert miou["model.onnx"] > 0.5
    assert abs(miou["model.xml"] - miou["model.onnx"]) < 0.005


def test_nothing_is_said(tiny, tmp_path, capfd, monkeypatch):
    """NNCF's progress goes to rich's console, its remarks to its logger; both are as before afterwards."""
    console, logger = rich.get_console(), logging.getLogger("nncf")
    before = console.quiet, logger.level
    quantize, during = nncf.quantize, []

    def spy(*args, **kwargs):
        during.append((console.quiet, logger.level))
        return quantize(*args, **kwargs)

    monkeypatch.setattr(nncf, "quantize", spy)
    quantize_onnx(tiny, tmp_path / "model.xml", _batches(1))
    assert capfd.readouterr() == ("", "")
    assert during == [(True, logging.ERROR)]
    assert (console.quiet, logger.level) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]


def _refuse(graph, path, message, batches=None):
    """`quantize_onnx` fails with `message`, and the folder of `path` holds what it held before."""
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(BuildError, match=message):
        quantize_onnx(graph, path, _batches(1) if batches is None else batches)
    assert sorted(path.parent.rglob("*")) == before


def test_what_cannot_be_calibrated_on_is_refused(tiny, tmp_path):
    _refuse(tiny, tmp_path / "model.xml", "needs pictures to calibrate on, and there are none", [])
    message = r"model\.onnx: cannot be quantised: .+"
    _refuse(tiny, tmp_path / "model.xml", message, [*_batches(1), np.zeros((1, 32, 96, 3), np.uint8)])


@pytest.mark.parametrize("content", [None, b"", b"nonsense" * 100])
def test_graphs_that_cannot_be_read_are_refused(content, tmp_path):
    broken = tmp_path / "broken.onnx"
    if content is not None:
        broken.write_bytes(content)
    _refuse(broken, tmp_path / "model.xml", r"broken\.onnx: OpenVINO cannot read it: .+; export it again")


def test_a_graph_of_another_contract_cannot_be_quantised(tiny, tmp_path):
    """It takes bytes in planes of colour, and is given floats."""
    message = r"model\.onnx: cannot be quantised: .+"
    _refuse(tiny, tmp_path / "model.xml", message, _batches(1, replace(LABELS, layout="float_nchw")))
    assert not rich.get_console().quiet


def test_a_full_disk_leaves_nothing_behind(tiny, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        _refuse(tiny, tmp_path / "model.xml", r"model\.xml: cannot be written \(.+\); check the folder and its free")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_both_files_or_neither(tiny, tmp_path):
    """The weights are in place when the graph turns out not to fit: a folder has its name."""
    (tmp_path / "model.xml").mkdir()
    _refuse(tiny, tmp_path / "model.xml", r"model\.xml: cannot be written")


def test_a_folder_that_is_not_there_is_named(tiny, tmp_path):
    with pytest.raises(BuildError, match=r"none/model\.xml: cannot be written"):
        quantize_onnx(tiny, tmp_path / "none" / "model.xml", _batches(1))


@pytest.mark.parametrize("package", ["nncf", "openvino"])
def test_missing_packages_name_the_extra(package, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf'"{package}" is not installed: pip install "agln-fast\[int8\]"'):
        quantize_onnx(tiny, tmp_path / "model.xml", _batches(1))


def test_int8_is_no_type_of_an_export(small_network, tmp_path):
    with pytest.raises(ConfigError, match="ONNX export in 'int8': it is fp32, fp16, bf16; int8 is made of the fp32"):
        export_onnx(small_network(), tmp_path / "model.onnx", LABELS, "int8")
    assert not list(tmp_path.iterdir())
