"""ONNX files as bytes, looked at before a library opens them, without the package onnx.

It reads what it needs of the wire format of Protocol Buffers: a message is a row of fields, each with a number, which
says what it is, and a wire type, which says how long it is. Numbers are those of `onnx.proto` of ONNX 1.23.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from agln_fast.errors import BackendError, BundleError
from agln_fast.precision import PRECISIONS, Precision

__all__ = ["Graph", "graph_precision", "parse_graph"]

_BY_TYPE: dict[int, Precision] = {numbers.onnx: name for name, numbers in PRECISIONS.items() if numbers.bytes > 1}

# Message -> number of a field -> the message in it, on all ways to a tensor.
_INSIDE = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "OtherGraph", 2: "OtherGraph"},
    "Function": {7: "OtherNode", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Initializer", 15: "Sparse"},
    "OtherGraph": {1: "OtherNode", 5: "Tensor", 15: "Sparse"},
    "Node": {5: "Attribute"},
    "OtherNode": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "OtherGraph", 10: "Tensor", 11: "OtherGraph", 22: "Sparse", 23: "Sparse"},
    "Sparse": {1: "Tensor", 2: "Tensor"},
}
_INPUT, _OP_TYPE = 1, 4  # of a node
_DATA_TYPE, _NAME, _EXTERNAL_DATA, _DATA_LOCATION = 2, 8, 13, 14  # of a tensor
_EXTERNAL = 1  # a tensor's `data_location`
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
_LONGEST_VARINT = 10


@dataclass
class Graph:
    """What is asked about a file.

    types: `data_type` of each initializer of the main graph, by its name. weights: for each of its convolutions the
    name of the second input. external: data of a tensor, anywhere, lies in another file.
    """

    types: dict[bytes, int] = field(default_factory=dict)
    weights: list[bytes] = field(default_factory=list)
    external: bool = False


def parse_graph(data: bytes, name: str) -> Graph:
    """What there is to know about the ONNX file `name`, whose content is `data`.

    Raises:
        BackendError: not an ONNX file.
        BundleError: some of its data lies in other files, whose bytes nobody has checked.
    """
    graph = Graph()
    try:
        kinds = set()
        messages = [("Model", memoryview(data))]
        while messages:
            kind, message = messages.pop()
            kinds.add(kind)
            messages += _look_at(kind, message, graph)
        if "Graph" not in kinds:
            raise ValueError("no graph")
    except (ValueError, IndexError) as error:
        raise BackendError(f"{name}: not an ONNX file ({error})") from None
    if graph.external:
        raise BundleError(f"{name}: refused: some of its weights lie in another file; build the bundle again")
    return graph


def graph_precision(graph: Graph, name: str) -> Precision:
    """The one type that the weights of all convolutions have.

    Raises:
        BackendError: no convolution in it, or convolutions of several types.
    """
    found = {graph.types.get(weight) for weight in graph.weights}
    if len(found) != 1 or (kind := found.pop()) not in _BY_TYPE:
        raise BackendError(f"{name}: its convolutions are not of one floating-point type")
    return _BY_TYPE[kind]


def _look_at(kind: str, message: memoryview, graph: Graph) -> list[tuple[str, memoryview]]:
    """Note what a message says of itself, and return those in it."""
    inside = _INSIDE.get(kind, {})
    found, inputs, values = [], [], dict[int, int | memoryview]()
    for number, value in _fields(message):
        if number in inside:
            if isinstance(value, int):
                raise ValueError(f"field {number} of {kind} is no message")
            found.append((inside[number], value))
        elif number == _INPUT:
            inputs.append(value)
        else:
            values[number] = value
    if kind in ("Tensor", "Initializer"):
        graph.external |= _EXTERNAL_DATA in values or _number(values.get(_DATA_LOCATION)) == _EXTERNAL
    if kind == "Initializer":
        graph.types[_text(values.get(_NAME))] = _number(values.get(_DATA_TYPE))
    if kind == "Node" and _text(values.get(_OP_TYPE)) == b"Conv" and len(inputs) > 1:
        graph.weights.append(_text(inputs[1]))
    return found


def _text(value: int | memoryview | None) -> bytes:
    return value.tobytes() if isinstance(value, memoryview) else b""


def _number(value: int | memoryview | None) -> int:
    """As an int32, which readers cut longer numbers down to."""
    return value & 0xFFFFFFFF if isinstance(value, int) else 0


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Number and value of each field: a number, or bytes.

    Raises:
        ValueError, IndexError: it is no message.
    """
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise ValueError("a field without a number")
        if wire_type == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if wire_type == _BYTES:
            length, at = _varint(message, at)
        elif wire_type in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if wire_type == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if length > len(message) - at:
            raise ValueError("a field ends behind its message")
        yield number, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number that begins at `at`, and where the next thing begins."""
    number = 0
    for place in range(_LONGEST_VARINT):
        byte = message[at + place]
        number |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return number, at + place + 1
    raise ValueError("a number without an end")
