"""ONNX files as bytes, looked at before a library opens them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import onnx

from agln_fast.errors import BackendError, BundleError
from agln_fast.precision import PRECISIONS, Precision

__all__ = ["graph_precision", "parse_graph"]

_BY_TYPE: dict[int, Precision] = {numbers.onnx: name for name, numbers in PRECISIONS.items() if numbers.bytes > 1}


def parse_graph(data: bytes, name: str) -> onnx.ModelProto:
    """The model in the ONNX file `name`, whose content is `data`.

    Raises:
        BackendError: not an ONNX file.
        BundleError: some of its data lies in other files, whose bytes nobody has checked.
    """
    try:
        model: onnx.ModelProto = onnx.ModelProto.FromString(data)
    except Exception as error:  # protobuf raises several unrelated types
        raise BackendError(f"{name}: not an ONNX file ({type(error).__name__})") from None
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data for tensor in _tensors(model)):
        raise BundleError(f"{name}: refused: some of its weights lie in another file; build the bundle again")
    return model


def graph_precision(model: onnx.ModelProto, name: str) -> Precision:
    """The one type that the weights of all convolutions have.

    Raises:
        BackendError: no convolution in it, or convolutions of several types.
    """
    types = {initializer.name: initializer.data_type for initializer in model.graph.initializer}
    found = {types.get(node.input[1]) for node in model.graph.node if node.op_type == "Conv" and len(node.input) > 1}
    if len(found) != 1 or (kind := found.pop()) not in _BY_TYPE:
        raise BackendError(f"{name}: its convolutions are not of one floating-point type")
    return _BY_TYPE[cast(int, kind)]


def _tensors(model: onnx.ModelProto) -> Iterator[Any]:
    """Every tensor of the model, in whatever part of it."""
    messages: list[Any] = [model]
    while messages:
        message = messages.pop()
        if isinstance(message, onnx.TensorProto):
            yield message
            continue
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                messages += [value] if hasattr(value, "ListFields") else value
