"""Exported graphs: names, types and metadata as promised, and the network's own function."""

from __future__ import annotations

import functools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from packaging.version import Version

from agln_fast.contract import IOContract
from agln_fast.deployment import DeployedNetwork
from agln_fast.engines.onnx_file import graph_precision, parse_graph
from agln_fast.errors import BackendError, BuildError
from agln_fast.export.onnx import OPSET, export_onnx

UINT8 = IOContract(64, 96, output="logits")

resizes_fast = pytest.mark.skipif(
    Version(onnx.__version__) < Version("1.23"), reason="ONNX's evaluator resizes pixel by pixel before 1.23: hours"
)


def _run(path, image):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": image})[0]


def _run_in_true_half(path, image):
    """ONNX's own NumPy evaluator: ONNX Runtime computes float16 graphs of a CPU in float32 and hides overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        return ReferenceEvaluator(str(path)).run(None, {"image": image})[0]


def _image(contract, batch=1):
    random = np.random.default_rng(1)
    if contract.layout == "uint8_nhwc":
        return random.integers(0, 256, (batch, contract.height, contract.width, 3), np.uint8)
    return random.standard_normal((batch, 3, contract.height, contract.width), np.float32)


@pytest.fixture(scope="module")
def exported(small_network, tmp_path_factory):
    """`exported(contract, precision)`: the file of `small_network()`, made once."""

    @functools.cache
    def export(contract, precision):
        path = tmp_path_factory.mktemp("exported") / "model.onnx"
        export_onnx(small_network(), path, contract, precision, metadata={"agln_fast.classes": "a\nb"})
        return path

    return lambda contract=UINT8, precision="fp32": export(contract, precision)


CONTRACTS = {
    "uint8 to logits": UINT8,
    "uint8 to labels, odd size, fixed batch of 3": IOContract(43, 37, 3, 3),
    "float to logits, batch range": IOContract(64, 96, 1, 3, layout="float_nchw", output="logits"),
}


@pytest.mark.parametrize("case", CONTRACTS)
@torch.inference_mode()
def test_graph_is_the_network_behind_its_contract(case, small_network, exported):
    contract, network = CONTRACTS[case], small_network()
    path = exported(contract)
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["image"]
    assert [value.name for value in graph.output] == [contract.output]
    shape = [dim.dim_param or dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert tuple(shape) == contract.input_shape
    for batch in {contract.min_batch, contract.max_batch}:
        image = _image(contract, batch)
        expected = DeployedNetwork(network, contract, 5)(torch.from_numpy(image)).numpy()
        actual = _run(path, image)
        assert actual.dtype == expected.dtype
        if contract.output == "labels":
            assert (actual == expected).mean() > 0.999
        else:
            # Twice the error that PyTorch itself has in float32, measured against float64.
            exact = DeployedNetwork(small_network().double(), contract, 5)(torch.from_numpy(image)).numpy()
            error = np.abs(expected - exact).max()
            assert np.abs(actual - exact).max() <= 2 * error + 1e-5 * np.abs(exact).max()


def test_graph_is_clean(exported):
    """BN is folded, every resize is one Resize, and the opset is the one promised."""
    model = onnx.load(exported())
    kinds = Counter(node.op_type for node in model.graph.node)
    assert kinds["BatchNormalization"] == 0
    # To the laterals, to the concatenation (the finest map, too, to its own size), to the image.
    assert kinds["Resize"] == 3 + 4 + 1
    assert model.opset_import[0].version == OPSET >= 20


def test_metadata_says_what_it_is(exported):
    properties = {item.key: item.value for item in onnx.load(exported()).metadata_props}
    assert IOContract.from_dict(json.loads(properties["agln_fast.contract"])) == UINT8
    assert properties["agln_fast.classes"] == "a\nb"


def test_nothing_tells_where_it_was_made(exported):
    """Files are given away: the lines of code that PyTorch's exporter notes have paths of the machine."""
    content = exported().read_bytes()
    assert b".py" not in content
    assert str(Path(torch.__file__).parents[1]).encode() not in content
    assert b"name_scopes" in content  # of which blocks are found


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_types_are_those_asked_for(precision, exported):
    """Every convolution has the type; everything that feeds a softmax is float32."""
    path = exported(precision=precision)
    assert graph_precision(parse_graph(path.read_bytes(), "m.onnx"), "m.onnx") == precision
    model = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    softmaxes = [node for node in model.graph.node if node.op_type == "Softmax"]
    assert len(softmaxes) == 3 + 6 + 6  # SABs, SDMs, channel attentions
    assert {types[node.input[0]] for node in softmaxes} == {onnx.TensorProto.FLOAT}


@pytest.fixture(scope="module")
def overflowing(small_network):
    """A network whose channel-attention energies exceed the largest float16."""
    network = small_network("agln_straight_resnet18", formulation="release")
    with torch.no_grad():
        for lateral in network.decoder.lateral:
            lateral[1].weight.fill_(64)
    return network


@resizes_fast
@torch.inference_mode()
def test_energies_that_overflow_float16_do_no_harm(overflowing, tmp_path):
    contract = IOContract(256, 256, output="logits")
    image = _image(contract)
    energies = []
    lrm = overflowing.decoder.cfb[2][0].lrm
    hook = lrm.register_forward_pre_hook(
        lambda _, inputs: energies.append(inputs[0].flatten(2) @ inputs[1].flatten(2).transpose(1, 2))
    )
    reference = DeployedNetwork(overflowing, contract, 5)(torch.from_numpy(image))
    hook.remove()
    assert energies[0].max() > 2 * torch.finfo(torch.float16).max

    export_onnx(overflowing, tmp_path / "half.onnx", contract, "fp16")
    assert np.isfinite(_run_in_true_half(tmp_path / "half.onnx", image)).all()
    logits = torch.from_numpy(_run(tmp_path / "half.onnx", image))
    top = reference.topk(2, 1).values
    margin = top[:, 0] - top[:, 1]
    same = logits.argmax(1) == reference.argmax(1)
    assert margin[same].sum() / margin.sum() > 0.99


@resizes_fast
@torch.inference_mode()
def test_the_overflow_test_would_notice(overflowing, tmp_path, monkeypatch):
    monkeypatch.setattr("agln_fast.plan.network.wide", lambda x: x)
    contract = IOContract(256, 256, output="logits")
    export_onnx(overflowing, tmp_path / "half.onnx", contract, "fp16")
    assert not np.isfinite(_run_in_true_half(tmp_path / "half.onnx", _image(contract))).all()


def test_the_network_is_not_changed(small_network, tmp_path):
    network = small_network("fpn_resnet18")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    export_onnx(network, tmp_path / "m.onnx", UINT8, "fp16")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_a_refused_export_leaves_nothing(small_network, tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise RuntimeError("no such operator\nlong explanation")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(BuildError, match=r"^ONNX export failed: no such operator$"):
        export_onnx(small_network(), tmp_path / "m.onnx", UINT8)
    assert not list(tmp_path.iterdir())


def test_precision_of_foreign_files():
    for foreign in (b"nothing of the kind", b""):
        with pytest.raises(BackendError, match=r"^x: not an ONNX file|^x: .* not of one floating-point type"):
            graph_precision(parse_graph(foreign, "x"), "x")


def test_more_than_256_classes_give_wider_labels(small_network, tmp_path):
    contract = IOContract(32, 32)
    export_onnx(small_network("fpn_resnet18", num_classes=300), tmp_path / "m.onnx", contract)
    assert _run(tmp_path / "m.onnx", _image(contract)).dtype == np.int32


def test_exported_lite_network_has_grouped_convolutions(small_network, tmp_path):
    network = small_network("agln_lite_resnet18")
    export_onnx(network, tmp_path / "m.onnx", UINT8)
    groups = [
        attribute.i
        for node in onnx.load(tmp_path / "m.onnx").graph.node
        if node.op_type == "Conv"
        for attribute in node.attribute
        if attribute.name == "group"
    ]
    assert groups.count(network.config.channels) == 12  # Ψ and Φ of six CFBs
