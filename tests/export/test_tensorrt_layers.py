"""Engines of TensorRT-RTX with our kernels: they are built, and their plans hold our layers as they were asked for."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from agln_fast.artefact import LAYERS_FILE
from agln_fast.bench.race.weights import random_network
from agln_fast.contract import IOContract
from agln_fast.errors import BuildError, ConfigError
from agln_fast.export import tensorrt_layers as module
from agln_fast.export.layers import _as_bytes
from agln_fast.export.nodes import DOMAIN
from agln_fast.export.onnx import export_onnx
from agln_fast.export.plugins import library, obstacle
from agln_fast.export.tensorrt_layers import build_engine_with_layers
from agln_fast.plan.fuse import fused_plan
from agln_fast.tensorrt_library import RTX_CAPABILITIES

pytestmark = [
    pytest.mark.tensorrt_rtx,
    pytest.mark.skipif(obstacle() is not None, reason=str(obstacle())),
]
NETWORKS = "fpn_resnet18", "agln_release_resnet18", "agln_lite_resnet18"
TYPES = {"fp16": "half", "fp32": "float"}
_LAYER = re.compile(r'custom_layer=\{ name="([^"]+)" output=\{([^}]*)\} input=\{([^}]*)\}')
_TENSOR = re.compile(
    r'tensor=\{[^\n]* dims=\{ ([^}]*) \}[^\n]* name="([^"]+)"[^\n]* strides=\{ ([^}]*) \}[^\n]* type=(\w+)'
)
_USE = re.compile(r'sub_tensor=\{ base="([^"]+)"[^\n]* name="([^"]+)"')
BATCH, SIDE = 2, 64


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Our layers are compiled once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AGLN_FAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def exported(small_network, tmp_path_factory):
    def export(name, precision, contract=None):
        network, folder = small_network(name), tmp_path_factory.mktemp("exported")
        contract = contract or IOContract(SIDE, SIDE, BATCH, BATCH)
        export_onnx(network, folder / "model.onnx", contract, precision, plan=fused_plan(network.config))
        return folder / "model.onnx"

    return export


def _read(plan):
    """The layers of ours in a plan, which is one program for all capabilities, name -> inputs and outputs; and tensors,
    name -> dims, strides and type. Those of kHWC8 have the channels in two dimensions, and a name for each use."""
    (text,) = (text for text in plan.decode("latin1").split("header {\n")[1:] if _LAYER.search(text))
    layers = {
        name: (re.findall('"([^"]+)"', inputs), re.findall('"([^"]+)"', outputs))
        for name, outputs, inputs in _LAYER.findall(text)
    }
    tensors = {
        name: ([*map(int, dims.split())], [*map(int, strides.split())], kind)
        for dims, name, strides, kind in _TENSOR.findall(text)
        if (dims + strides).replace(" ", "").isdigit()
    }
    return layers, tensors | {use: tensors[base] for base, use in _USE.findall(text) if base in tensors}


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_plan_holds_our_layers(name, precision, exported, tmp_path):
    file = exported(name, precision)
    wanted = {node.name: node.op_type for node in onnx.load(file).graph.node if node.domain == DOMAIN}
    engine = tmp_path / "model.engine"
    built = build_engine_with_layers(file, engine, flavour="tensorrt-rtx", precision=precision, batch=(BATCH, BATCH))
    assert built.compute_capabilities == RTX_CAPABILITIES
    assert built.size_bytes == engine.stat().st_size
    plan = engine.read_bytes()
    layers, tensors = _read(plan)
    assert layers.keys() == wanted.keys()
    maps = 0
    for inputs, outputs in layers.values():
        for tensor in (*inputs, *outputs):
            dims, strides, kind = tensors.get(tensor, ((), (), ""))
            if len(dims) >= 4 and dims[0] == BATCH:
                maps += 1
                assert kind == TYPES[precision]
                if precision == "fp32":  # B, C, H, W
                    assert (strides[1], strides[3]) == (1, dims[1])
                else:  # B, C / 8, 8, H, W
                    assert (strides[1:3], strides[4]) == ([8, 1], 8 * dims[1])
    assert maps > len(layers)
    for op, count in Counter(wanted.values()).items():
        mark = b"AGLN\x01\0\0\0" + len(op).to_bytes(4, "little") + op.encode()
        assert plan.count(mark) >= count


def test_a_range_of_batches(exported, tmp_path):
    file = exported("fpn_resnet18", "fp16", IOContract(SIDE, SIDE, 1, 3))
    engine = tmp_path / "model.engine"
    built = build_engine_with_layers(
        file, engine, flavour="tensorrt-rtx", precision="fp16", batch=(1, 3), compute_capabilities=("sm89",)
    )
    assert built.compute_capabilities == ("sm89",)
    layers, _ = _read(engine.read_bytes())
    assert len(layers) == sum(node.domain == DOMAIN for node in onnx.load(file).graph.node)


@pytest.mark.parametrize("precision", TYPES)
def test_logits_of_any_number_of_classes(precision, exported, tmp_path):
    """Five channels: no format of TensorRT has them last, so this layer takes and gives them in order."""
    file = exported("fpn_resnet18", precision, IOContract(SIDE, SIDE, 2, 2, output="logits"))
    engine = tmp_path / "x.engine"
    options = {"flavour": "tensorrt-rtx", "precision": precision, "compute_capabilities": ("sm89",)}
    build_engine_with_layers(file, engine, batch=(2, 2), **options)
    layers, _ = _read(engine.read_bytes())
    assert len(layers) == sum(node.domain == DOMAIN for node in onnx.load(file).graph.node)


def test_one_image_is_no_weight(tmp_path):
    """A batch of one looks like any side of one: what is an activation is known by where it comes from."""
    network = random_network("agln_release_resnet18", 5)
    export_onnx(network, tmp_path / "x.onnx", IOContract(64, 64), "fp16", plan=fused_plan(network.config))
    built = build_engine_with_layers(
        tmp_path / "x.onnx",
        tmp_path / "x.engine",
        flavour="tensorrt-rtx",
        precision="fp16",
        batch=(1, 1),
        compute_capabilities=("sm89",),
    )
    assert built.convolutions > 20


def test_what_fails_in_the_child_is_one_line_here(exported, tmp_path, monkeypatch):
    file = exported("fpn_resnet18", "fp16")
    options = {"flavour": "tensorrt-rtx", "precision": "fp16", "batch": (2, 2), "compute_capabilities": ("sm89",)}
    with pytest.raises(ConfigError, match="our kernels need sm80 or newer, not sm75"):
        build_engine_with_layers(file, tmp_path / "x", **{**options, "compute_capabilities": ("sm75",)})
    with pytest.raises(BuildError, match="is in fp16, not fp32 as asked"):
        build_engine_with_layers(file, tmp_path / "x", **{**options, "precision": "fp32"})
    monkeypatch.setattr(module, "library", lambda: file)  # no library at all
    with pytest.raises(BuildError, match="cannot load the library of our layers"):
        build_engine_with_layers(file, tmp_path / "x", **options)
    monkeypatch.undo()
    monkeypatch.setattr(module, "_UNVERSIONED", {"tensorrt-rtx": "libnothing.so"})
    with pytest.raises(BuildError, match=r"tensorrt-rtx ended its process \(SIG(ABRT|SEGV)\)"):
        build_engine_with_layers(file, tmp_path / "x", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_library_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("AGLN_FAST_CACHE", str(tmp_path))
    first = library()
    assert first.name == LAYERS_FILE
    before = first.stat().st_mtime_ns
    assert library() == first
    assert first.stat().st_mtime_ns == before


def test_bytes_come_back_as_they_were(tmp_path):
    """A layer gives int8: its bits are those of uint8. What is cast to that is in its range, or the cast may do
    anything."""
    raw = ir.Value(name="raw", type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape([256]))
    nodes = []
    labels = _as_bytes(raw, nodes)
    (number,) = nodes[-1].inputs
    for value, name, dtype in ((number, "number", ir.DataType.FLOAT), (labels, "labels", ir.DataType.UINT8)):
        value.name, value.dtype, value.shape = name, dtype, ir.Shape([256])
    graph = ir.Graph([raw], [number, labels], nodes=nodes, opset_imports={"": 22})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "x.onnx")
    wanted = np.arange(256).astype(np.uint8)
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    found, given = session.run(None, {"raw": wanted.view(np.int8)})
    assert (found == wanted).all()
    assert given.dtype == np.uint8
    assert (given == wanted).all()
