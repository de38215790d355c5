"""From a graph with nodes of our ops to one that TensorRT's parser takes: each becomes a layer of the plugin library.

A node gets the record of what it launches as an attribute, in base64: ONNX's strings are UTF-8. Maps are in TensorRT's
channels-last formats.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from agln_fast.errors import BuildError
from agln_fast.export.nodes import DOMAIN, operators
from agln_fast.export.records import Port, Record, record

__all__ = ["RECORD", "make_layers"]

RECORD = "record"
"""The attribute of a layer, and the field of a plugin, that holds a `Record`."""
_VERSION = {"plugin_version": "1", "plugin_namespace": "agln"}


def make_layers(model: ir.Model, batches: Sequence[int], capabilities: Sequence[str]) -> dict[str, Record]:
    """Change every node of ours in place; name of the node -> its record.

    Args:
        batches: all sizes that the engine shall run; the first side of activations is the batch.
        capabilities: of `agln_fast.kernels.devices.DEVICES`.

    Raises:
        BuildError: a node has a shape that is not known, or that TensorRT has no format for.
    """
    records = {}
    moving = _activations(model.graph)
    for node in list(model.graph):
        if node.domain == DOMAIN:
            records[str(node.name)] = _make_layer(model.graph, node, moving, batches, capabilities)
    return records


def _activations(graph: ir.Graph) -> set[ir.Value]:
    """What depends on the graph's input, in whose first side the batch is; all else is made of weights."""
    found = set(graph.inputs)
    for node in graph:
        if not found.isdisjoint(filter(None, node.inputs)):
            found.update(node.outputs)
    return found


def _make_layer(
    graph: ir.Graph, node: ir.Node, moving: set[ir.Value], batches: Sequence[int], capabilities: Sequence[str]
) -> Record:
    operator = operators()[node.op_type]
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if "dtype" in attributes:
        attributes["dtype"] = _torch_type(ir.DataType(attributes["dtype"]))
    present = [(place, *_whole(value)) for place, value in enumerate(node.inputs) if value is not None]

    def recorded(ports: Sequence[Port]) -> Record:
        def arguments(tensors: Sequence[Tensor]) -> dict[str, Any]:
            views: list[Tensor | None] = [None] * len(node.inputs)
            for (place, _, channels), port, tensor in zip(present, ports, tensors, strict=True):
                view = _as_given(port, tensor)
                views[place] = view if channels is None else view.narrow(1, 0, channels)
            return operator.bind(views, attributes)

        return record(operator.name, operator.op, ports, arguments, batches, capabilities)

    ports = [_port(value, value in moving) for _, value, _ in present]
    try:
        found = recorded(ports)
    except BuildError:  # a result whose channels no channels-last format has, such as logits
        ports = [replace(port, channels_last=False) for port in ports]
        found = recorded(ports)
    layer = ir.Node(
        "",
        node.op_type,
        [_arranged(graph, value, port) for (_, value, _), port in zip(present, ports, strict=True)],
        [
            *(ir.AttrString(name, text) for name, text in _VERSION.items()),
            ir.AttrString(RECORD, b64encode(found.to_bytes()).decode()),
        ],
        num_outputs=len(found.outputs),
        name=node.name,
    )
    nodes, results = [layer], []
    for old, raw, port in zip(node.outputs, layer.outputs, found.outputs, strict=True):
        raw.dtype, raw.shape = _onnx_type(port.dtype), _shape(port)
        result = raw
        if port.dtype == torch.uint8:
            raw.name = f"{old.name}_as_int8"
            result = _as_bytes(raw, nodes)
        assert old.dtype is not None
        result.name, result.dtype, result.shape = old.name, old.dtype, old.shape
        moving.add(result)
        results.append(result)
    graph.insert_before(node, nodes)
    ir.convenience.replace_all_uses_with(node.outputs, results, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    return found


def _as_bytes(raw: ir.Value, nodes: list[ir.Node]) -> ir.Value:
    """uint8 of the same bits as the int8 `raw`, by what is appended to `nodes`: no layer of TensorRT may give uint8,
    which is cast of floating point alone."""

    def add(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        given = [ir.convenience.convert_attribute(name, value) for name, value in attributes.items()]
        nodes.append(ir.Node("", op_type, inputs, given))
        return nodes[-1].outputs[0]

    def constant(value: float) -> ir.Value:
        return add("Constant", value=ir.tensor(np.float32(value)))

    number = add("DequantizeLinear", raw, constant(1.0))
    negative = add("Less", number, constant(0.0))
    number = add("Where", negative, add("Add", number, constant(256.0)), number)
    return add("Cast", number, to=int(ir.DataType.UINT8))


def _whole(value: ir.Value) -> tuple[ir.Value, int | None]:
    """Where `value` is the first channels of a map, that map, whose rows are as the op wants them, and their number."""
    slicing = value.producer()
    if slicing is None or slicing.op_type != "Slice" or len(slicing.inputs) != 5 or value.shape is None:
        return value, None
    whole, *numbers = slicing.inputs
    constants = [None if each is None else ir.convenience.get_const_tensor(each) for each in numbers]
    start, _, axis, step = [None if each is None else each.numpy().tolist() for each in constants]
    channels = value.shape[1] if len(value.shape) == 4 else None
    if whole is None or (start, axis, step) != ([0], [1], [1]) or not isinstance(channels, int):
        return value, None
    return whole, channels


def _port(value: ir.Value, moves: bool) -> Port:
    """How a layer takes `value`: maps with the channels last, filters of one input channel each likewise. `moves`: it
    is an activation.

    Raises:
        BuildError: its shape is not known.
    """
    shape = value.shape
    if shape is None or value.dtype is None or not all(isinstance(side, int) for side in shape[1:]):
        raise BuildError(f"{value.name}: its shape {shape} is not fixed, so no layer can be made that takes it")
    sides = tuple(side if isinstance(side, int) else -1 for side in shape)
    dtype = _torch_type(value.dtype)
    if not moves:
        if value.is_initializer() and len(sides) == 4 and sides[1] == 1:
            order = 1, 2, 3, 0
            return Port(tuple(sides[side] for side in order), dtype, order=order)
        return Port(sides, dtype)
    return Port((-1, *sides[1:]), dtype, channels_last=len(sides) == 4)


def _as_given(port: Port, tensor: Tensor) -> Tensor:
    """As the op is called with it."""
    return tensor.permute(_inverse(port.order)) if port.order else tensor


def _arranged(graph: ir.Graph, value: ir.Value, port: Port) -> ir.Value:
    """`value`, an initializer in the order of `port`."""
    if not port.order:
        return value
    name = f"{value.name}_as_it_lies"
    if name not in graph.initializers:
        assert value.const_value is not None
        array = np.ascontiguousarray(value.const_value.numpy().transpose(port.order))
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _shape(port: Port) -> ir.Shape:
    return ir.Shape(["batch" if side < 0 else side for side in port.shape])


def _torch_type(kind: ir.DataType) -> torch.dtype:
    return _TYPES[kind]


def _onnx_type(dtype: torch.dtype) -> ir.DataType:
    if dtype == torch.uint8:
        return ir.DataType.INT8
    return next(kind for kind, known in _TYPES.items() if known == dtype)


_TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT32: torch.int32,
}
