"""Graphs with nodes of our ops: ONNX's own evaluator, with the references behind them, gives what the network gives."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch.utils._pytree import tree_map_only

import agln_fast
from agln_fast.bench.race.weights import random_network
from agln_fast.contract import IOContract
from agln_fast.deployment import DeployedNetwork
from agln_fast.export import layers as layers_module
from agln_fast.export import records
from agln_fast.export.layers import make_layers
from agln_fast.export.nodes import DOMAIN, _array, _tensor, evaluators, operators
from agln_fast.export.onnx import export_onnx
from agln_fast.export.records import Record
from agln_fast.kernels.registration import OPS
from agln_fast.plan import fuse as fuse_module
from agln_fast.plan.fuse import fused_plan

CASES = {
    "fcn": ("fcn_resnet18", {}),
    "fcn of mmseg": ("fcn_concat_resnet18c", {}),
    "fpn": ("fpn_resnet18", {}),
    "agln, paper": ("agln_resnet18", {"formulation": "paper"}),
    "agln, release": ("agln_resnet18", {"formulation": "release"}),
    "agln-minus": ("agln_minus_resnet18", {"formulation": "release"}),
    "agln-lite": ("agln_lite_resnet18", {"formulation": "release"}),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(params=CASES)
def network(request, small_network, monkeypatch):
    monkeypatch.setattr(fuse_module, "_FEWEST_CHANNELS", 16)  # as wide ones are: conv5 is mixed
    name, overrides = CASES[request.param]
    return small_network(name, **overrides)


def _exported(network, tmp_path, contract, precision="fp32"):
    file = tmp_path / "model.onnx"
    export_onnx(network, file, contract, precision, plan=fused_plan(network.config))
    return file


def _run(file, image):
    return ReferenceEvaluator(str(file), new_ops=evaluators()).run(None, {"image": image})[0]


def _image(contract, batch):
    return np.random.default_rng(0).integers(0, 256, (batch, contract.height, contract.width, 3), np.uint8)


@torch.inference_mode()
def _exact(network, contract, image):
    """Logits in float64, of the reference network."""
    deployed = DeployedNetwork(network.double(), contract, network.config.num_classes)
    logits = deployed.network(deployed.normalise(torch.from_numpy(image)))
    network.float()
    return logits.numpy()


def test_fp32_gives_the_reference_networks_logits(network, tmp_path):
    contract = IOContract(43, 37, 1, 3, output="logits")
    file = _exported(network, tmp_path, contract)
    nodes = Counter(node.op_type for node in onnx.load(file).graph.node if node.domain == DOMAIN)
    assert nodes["UpsampleBilinear"] > 0
    assert ("AttentionPool" in nodes) == (network.config.architecture == "agln")
    for batch in (1, 3):
        image = _image(contract, batch)
        exact = _exact(network, contract, image)
        assert np.abs(_run(file, image) - exact).max() <= 2e-5 * np.abs(exact).max()


def test_labels_are_the_reference_networks(network, tmp_path):
    contract = IOContract(37, 43, 1, 3)
    image = _image(contract, 3)
    labels = _run(_exported(network, tmp_path, contract), image)
    exact = _exact(network, contract, image)
    first, second = -np.sort(-exact, 1)[:, :2].swapaxes(0, 1)
    clear = first - second > 4e-5 * np.abs(exact).max()  # as far as the logits may be off, either way
    assert clear.mean() > 0.99
    assert labels.dtype == np.uint8
    assert (labels == exact.argmax(1))[clear].all()


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_half_precision_is_that_of_the_fused_network(network, tmp_path, precision):
    """As far off as the fused network itself in PyTorch, twice at most; both round at other places."""
    contract = IOContract(43, 37, 2, 2, output="logits")
    image = _image(contract, 2)
    exact = _exact(network, contract, image)
    found = _run(_exported(network, tmp_path, contract, precision), image)
    fused = agln_fast.fuse(network).to(DTYPES[precision])
    with torch.inference_mode():
        fused = DeployedNetwork(fused, contract, network.config.num_classes)(torch.from_numpy(image)).numpy()
    errors = [np.abs(each - exact).max() / np.abs(exact).max() for each in (found, fused)]
    assert errors[0] <= 2 * errors[1]


def test_every_op_is_an_operator():
    assert {each.op for each in operators().values()} == set(OPS)
    assert "AttentionPool" in operators()


@pytest.mark.parametrize("name", list(operators()))
def test_arguments_come_back(name):
    """What an op was called with, of a node's inputs and attributes; lists of tensors come last there."""
    operator = operators()[name]
    given = [
        {"List[Tensor]": [f"t{number}", f"u{number}"], "bool": True}.get(parameter.type, f"t{number}")
        for number, parameter in enumerate(operator.parameters)
    ]
    inputs, attributes = operator.split(given)
    bound = operator.bind(inputs, attributes)
    assert [bound[parameter.name] for parameter in operator.parameters] == given
    assert len(operator.input_names(len(inputs))) == len(inputs)


def test_weights_of_large_networks_are_constants(tmp_path):
    """Of a view of weights the exporter makes a node, which is folded whatever their size: a layer reads them."""
    network = random_network("agln_release_resnet18", 5)
    graph = onnx.load(_exported(network, tmp_path, IOContract(64, 64))).graph
    constants = {tensor.name for tensor in graph.initializer}
    pools = [node for node in graph.node if node.op_type == "AttentionPool"]
    assert len(pools) == 3
    for node in pools:
        assert set(node.input[1:]) <= constants


class _Layers:
    """In the place of records, which need a compiler: what each layer would be called with, and the reference for it.

    Types and strides of results are those that the op's fake promises of its kernel.
    """

    def __init__(self):
        self._calls = {}

    def record(self, layer, op, inputs, arguments, batches, capabilities):
        given = arguments([port.empty(batches[-1]) for port in inputs])
        meta = tree_map_only(torch.Tensor, lambda x: x.to("meta"), given)
        results = getattr(torch.ops.agln, op).default(**meta)
        results = results if isinstance(results, tuple) else (results,)
        ports = tuple(records._port_of(op, result, batches[-1]) for result in results)
        name = f"{layer} {len(self._calls)}"
        self._calls[name] = OPS[op].reference, arguments, inputs
        return Record(name, tuple(inputs), ports, (), {})

    def evaluators(self, names):
        """`names`: of a layer's node that of its record."""
        layers = self

        def run(self, *arrays, **attributes):
            reference, arguments, inputs = layers._calls[names[self.onnx_node.name]]
            tensors = [_tensor(array) for array in arrays]
            assert [x.dtype for x in tensors] == [port.dtype for port in inputs]
            results = reference(**arguments(tensors))
            results = results if isinstance(results, tuple) else (results,)
            return tuple(_array(x.view(torch.int8) if x.dtype == torch.uint8 else x) for x in results)

        return [type(name, (OpRun,), {"op_domain": "", "_run": run}) for name in operators()]


def _run_layered(file, image, monkeypatch):
    """As `_run`, of the graph that TensorRT is given."""
    layers = _Layers()
    monkeypatch.setattr(layers_module, "record", layers.record)
    model = ir.load(file)
    names = {node: record.layer for node, record in make_layers(model, [len(image)], ["sm90"]).items()}
    assert names
    assert not any(node.domain == DOMAIN for node in model.graph)
    layered = file.with_name("layered.onnx")
    ir.save(model, layered)
    return ReferenceEvaluator(str(layered), new_ops=layers.evaluators(names)).run(None, {"image": image})[0]


@pytest.mark.parametrize("output", ["labels", "logits"])
def test_the_graph_that_tensorrt_is_given_computes_the_same(network, output, tmp_path, monkeypatch):
    """Its layers take what the ops took, in order, and what they give comes back as the ops gave it."""
    contract = IOContract(37, 43, 2, 2, output=output)
    file, image = _exported(network, tmp_path, contract), _image(contract, 2)
    wanted, found = _run(file, image), _run_layered(file, image, monkeypatch)
    assert found.dtype == wanted.dtype
    if output == "labels":
        assert (found == wanted).all()
        assert len(np.unique(found)) > 2
    else:
        assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("classes", [200, 300])
def test_labels_of_many_classes_come_through_layers(classes, small_network, tmp_path, monkeypatch):
    """200 need all bits of the bytes that a layer gives; 300 are int32."""
    contract = IOContract(64, 96)
    file, image = _exported(small_network("fpn_resnet18", classes), tmp_path, contract), _image(contract, 1)
    wanted, found = _run(file, image), _run_layered(file, image, monkeypatch)
    assert found.dtype == wanted.dtype == ("uint8" if classes == 200 else "int32")
    assert found.max() > 128
    assert (found == wanted).all()
