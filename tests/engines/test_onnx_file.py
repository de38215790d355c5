"""The reader of ONNX files against the package onnx, and against bytes that are no ONNX file."""

from __future__ import annotations

import onnx
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from agln_fast.engines.onnx_file import graph_precision, parse_graph
from agln_fast.errors import BackendError, BundleError


def _tensor(name: str, kind: int = TensorProto.FLOAT, *, external: bool = False) -> TensorProto:
    tensor = helper.make_tensor(name, kind, [1, 1, 1, 1], [1.0])
    if external:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="elsewhere.bin")
    return tensor


def _model(*, convolutions: int = 1, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    nodes = [helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(convolutions)]
    image = helper.make_tensor_value_info("x0", kind, [1, 1, 4, 4])
    result = helper.make_tensor_value_info(f"x{convolutions}", kind, [1, 1, 4, 4])
    weights = [_tensor(f"w{i}", kind) for i in range(convolutions)]
    return helper.make_model(helper.make_graph(nodes, "g", [image], [result], weights))


@given(
    kind=st.sampled_from([TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16]), convolutions=st.integers(1, 4)
)
def test_the_type_of_convolutions(kind, convolutions):
    data = _model(convolutions=convolutions, kind=kind).SerializeToString()
    names = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
    assert graph_precision(parse_graph(data, "m"), "m") == names[kind]


def test_convolutions_of_several_types_have_none():
    model = _model(convolutions=2)
    model.graph.initializer[1].CopyFrom(_tensor("w1", TensorProto.FLOAT16))
    with pytest.raises(BackendError, match="not of one floating-point type"):
        graph_precision(parse_graph(model.SerializeToString(), "m"), "m")


def _in_initializer(model, tensor):
    model.graph.initializer.append(tensor)


def _in_constant(model, tensor):
    model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))


def _in_list(model, tensor):
    model.graph.node.append(helper.make_node("Custom", [], ["c"], domain="d", values=[tensor]))


def _in_branch(model, tensor):
    branch = helper.make_graph([], "b", [], [], [tensor])
    model.graph.node.append(helper.make_node("If", ["condition"], ["c"], then_branch=branch, else_branch=branch))


def _in_function(model, tensor):
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    model.functions.append(helper.make_function("d", "f", [], ["c"], [node], []))


def _in_sparse(model, tensor):
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [4]))


def _in_training(model, tensor):
    model.training_info.add().algorithm.initializer.append(tensor)


def _in_graphs_in_graphs(model, tensor):
    graph = helper.make_graph([], "b", [], [], [tensor])
    for _ in range(30):
        graph = helper.make_graph([helper.make_node("Loop", [], [], body=graph)], "b", [], [])
    model.graph.node.append(helper.make_node("Loop", [], [], body=graph))


@pytest.mark.parametrize(
    "put",
    [
        _in_initializer,
        _in_constant,
        _in_list,
        _in_branch,
        _in_function,
        _in_sparse,
        _in_training,
        _in_graphs_in_graphs,
    ],
)
def test_data_in_another_file_is_refused_wherever_it_is(put):
    inside, outside = _model(), _model()
    put(inside, _tensor("t"))
    put(outside, _tensor("t", external=True))
    parse_graph(inside.SerializeToString(), "m")
    with pytest.raises(BundleError, match="lie in another file"):
        parse_graph(outside.SerializeToString(), "m")


@pytest.mark.parametrize("number", [1, 2**32 + 1, 2**63 + 1])
def test_a_place_that_readers_cut_down_to_external_is_external(number):
    """Readers take the lowest 32 bits of `data_location`."""
    varint = bytes((number >> 7 * i & 0x7F) | 0x80 for i in range(9)) + bytes([number >> 63 & 1])
    tensor = bytes([14 << 3]) + varint
    data = _model().SerializeToString()
    graph = bytes([5 << 3 | 2, len(tensor)]) + tensor  # one more initializer
    data += bytes([7 << 3 | 2, len(graph)]) + graph  # merged with the graph before
    assert onnx.ModelProto.FromString(data).graph.initializer[1].data_location == TensorProto.EXTERNAL
    with pytest.raises(BundleError):
        parse_graph(data, "m")


@given(st.data())
def test_damaged_bytes_are_read_as_onnx_reads_them_or_refused(draw):
    data = bytearray(_model(convolutions=2).SerializeToString())
    for _ in range(draw.draw(st.integers(1, 3))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    data = bytes(data[: draw.draw(st.integers(0, len(data)))])
    try:
        graph = parse_graph(data, "m")
        model = onnx.ModelProto.FromString(data)
    except (BackendError, BundleError, DecodeError):  # onnx looks at parts that this reader passes over
        return
    assert graph.types.keys() == {tensor.name.encode() for tensor in model.graph.initializer}


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\x08\x0a", id="a version, and no graph"),
        pytest.param(b"\x3a\xff\xff\xff\xff\x0f", id="a graph of 4 GiB"),
        pytest.param(b"\x3a" + b"\xff" * 20, id="a length without an end"),
        pytest.param(b"\x38\x01", id="a number for a graph"),
        pytest.param(b"\x00\x00", id="a field without a number"),
        pytest.param(b"\x3b", id="a group"),
        pytest.param(b"PK\x03\x04" + bytes(100), id="a zip"),
    ],
)
def test_what_is_no_onnx_file_is_refused(data):
    with pytest.raises(BackendError, match=r"^m: not an ONNX file"):
        parse_graph(data, "m")
