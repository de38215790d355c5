"""Requests and responses of the Open Inference Protocol as they come over the wire: JSON, binary tensors, protobuf.

The specifications: KServe's "Open Inference Protocol (V2)", and Triton's extension "binary tensor data".
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import math
import reprlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from agln_fast.errors import ConfigError, choose, printable
from agln_fast.serving.line import Times
from agln_fast.serving.protocol import INPUTS, OUTPUTS, Array

if TYPE_CHECKING:
    from mlserver.grpc.dataplane_pb2 import ModelInferRequest, ModelInferResponse

__all__ = ["HEADER_LENGTH", "Request", "Response", "read_binary", "read_json", "read_protobuf"]

HEADER_LENGTH: Final = "inference-header-content-length"
"""The HTTP header that says where JSON ends and binary tensors begin."""

_DATATYPES = {"uint8": "UINT8", "int32": "INT32", "float32": "FP32", "object": "BYTES"}
_LARGEST_TIMEOUT_S = 24 * 3600.0
_LARGEST_SIDE = 2**31 - 1


@dataclass(frozen=True)
class Request:
    """inputs, outputs: the protocol's. timeout_s: seconds until the deadline, None for the server's own.

    binary: names of the outputs to send as binary tensors, over HTTP.
    """

    inputs: Mapping[str, Array | Sequence[bytes]]
    outputs: tuple[str, ...] = ()
    id: str = ""
    timeout_s: float | None = None
    binary: frozenset[str] = field(default=frozenset())


@dataclass(frozen=True)
class Response:
    """outputs: the protocol's."""

    model: str
    version: str
    id: str
    outputs: dict[str, Array]
    times: Times

    def to_json(self, binary: frozenset[str] = frozenset()) -> tuple[dict[str, Any], list[bytes]]:
        """The JSON object, with arrays in it, and the binary tensors that follow it: those of `binary`, in order."""
        tensors, blobs = [], []
        for name, array in self.outputs.items():
            tensor: dict[str, Any] = {"name": name, "datatype": _DATATYPES[str(array.dtype)], "shape": array.shape}
            if name in binary:
                blobs.append(_to_bytes(array))
                tensor["parameters"] = {"binary_data_size": len(blobs[-1])}
            elif array.dtype == object:
                tensor["parameters"] = {"content_type": "base64"}
                tensor["data"] = [base64.b64encode(item).decode() for item in array]
            else:
                tensor["data"] = np.ascontiguousarray(array).reshape(-1)
            tensors.append(tensor)
        document = {
            "model_name": self.model,
            "model_version": self.version,
            "id": self.id,
            "parameters": asdict(self.times),
            "outputs": tensors,
        }
        return document, blobs

    def to_protobuf(self) -> ModelInferResponse:
        """As raw tensors. Times are strings: the message has no type for other numbers than whole ones."""
        from mlserver.grpc.dataplane_pb2 import ModelInferResponse

        message = ModelInferResponse(model_name=self.model, model_version=self.version, id=self.id)
        for key, value in asdict(self.times).items():
            if isinstance(value, int):
                message.parameters[key].int64_param = value
            else:
                message.parameters[key].string_param = str(value)
        for name, array in self.outputs.items():
            message.outputs.add(name=name, datatype=_DATATYPES[str(array.dtype)], shape=array.shape)
            message.raw_output_contents.append(_to_bytes(array))
        return message


def read_json(document: Any) -> Request:
    """
    Raises:
        ConfigError: it is no request of the protocol, or one that this server does not know.
    """
    return read_binary(document, b"")


def read_binary(document: Any, blobs: bytes) -> Request:
    """A request whose JSON object `document` was followed by binary tensors.

    Raises:
        ConfigError: as `read_json`.
    """
    inputs: dict[str, Array | list[bytes]] = {}
    rest = memoryview(blobs)
    for tensor in _get(document, "inputs", list):
        size = _get(_get(tensor, "parameters", dict, {}), "binary_data_size", int, None)
        if size is None:
            data: Any = _get(tensor, "data", list)
        elif 0 <= size <= len(rest):
            data, rest = bytes(rest[:size]), rest[size:]
        else:
            raise ConfigError(f"binary_data_size {size}: {len(rest)} bytes are left behind the JSON object")
        name = _get(tensor, "name", str)
        _add(inputs, name, read_tensor(name, _get(tensor, "datatype", str), _get(tensor, "shape", list), data))
    if len(rest):
        raise ConfigError(f"{len(rest)} bytes behind the last binary tensor: wrong binary_data_size?")
    parameters, asked = _get(document, "parameters", dict, {}), _get(document, "outputs", list, [])
    everything = _get(parameters, "binary_data_output", bool, False)
    names = [choose("output", _get(output, "name", str), OUTPUTS) for output in asked]
    binary = {
        name: _get(_get(output, "parameters", dict, {}), "binary_data", bool, everything)
        for name, output in zip(names or ["labels"], asked or [{}], strict=True)
    }
    return Request(
        inputs,
        tuple(names),
        _get(document, "id", str, ""),
        read_timeout(parameters.get("timeout")),
        frozenset(name for name, is_binary in binary.items() if is_binary),
    )


_NEEDED = object()


def _get(values: Any, key: str, kind: type[Any], default: Any = _NEEDED) -> Any:
    """`values[key]`, of that type and no other; `default` where it is missing or null."""
    if not isinstance(values, dict):
        raise ConfigError(f"no request of the Open Inference Protocol: {_cut(values)} where an object belongs")
    found = values.get(key)
    if found is None and default is not _NEEDED:
        return default
    if type(found) is not kind:
        raise ConfigError(f"no request of the Open Inference Protocol: {key} is {_cut(found)}")
    return found


def _add(inputs: dict[str, Array | list[bytes]], name: str, value: Array | list[bytes]) -> None:
    if name in inputs:
        raise ConfigError(f"input {name!r} comes twice")
    inputs[name] = value


def _cut(value: Any) -> str:
    return printable(reprlib.repr(value), 60)


def read_protobuf(message: ModelInferRequest) -> Request:
    """
    Raises:
        ConfigError: as `read_json`.
    """
    raw, inputs = list(message.raw_input_contents), dict[str, Array | list[bytes]]()
    if raw and len(raw) != len(message.inputs):
        raise ConfigError(f"{len(raw)} raw_input_contents for {len(message.inputs)} inputs")
    for index, tensor in enumerate(message.inputs):
        lists = [list(values) for _, values in tensor.contents.ListFields()]
        if len(lists) + bool(raw) > 1:
            raise ConfigError(f"input {_cut(tensor.name)}: its values come in more than one way")
        data: Any = raw[index] if raw else lists[0] if lists else []
        _add(inputs, tensor.name, read_tensor(tensor.name, tensor.datatype, list(tensor.shape), data))
    timeout = message.parameters.get("timeout", None)
    chosen = timeout.WhichOneof("parameter_choice") if timeout is not None else None
    return Request(
        inputs,
        tuple(choose("output", output.name, OUTPUTS) for output in message.outputs),
        message.id,
        read_timeout(getattr(timeout, chosen) if chosen else None),
    )


def read_timeout(microseconds: Any) -> float | None:
    """Seconds from a request's parameter `timeout`, which Triton counts in microseconds; 0 or None for none.

    Raises:
        ConfigError: it is no number of that kind.
    """
    if microseconds is None or microseconds == 0 or microseconds == "":
        return None
    seconds = math.nan
    if not isinstance(microseconds, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            seconds = 1e-6 * int(microseconds)
    if not 0 < seconds <= _LARGEST_TIMEOUT_S:
        raise ConfigError(f"timeout {_cut(microseconds)}: give whole microseconds, a day at most")
    return seconds


def read_tensor(name: str, datatype: str, shape: Sequence[int], data: bytes | Iterable[Any]) -> Array | list[bytes]:
    """An input of the protocol from bytes as they are sent, or from a list.

    Args:
        name, datatype, shape: as the request says.
        data: of BYTES either each with its length before it, or a list of base64 strings or of bytes.

    Raises:
        ConfigError: an unknown name, another datatype than its own, or a shape that the data do not have.
    """
    expected = INPUTS[choose("input", name, INPUTS)]
    if datatype != expected.datatype:
        raise ConfigError(f"input {name!r}: datatype {_cut(datatype)}: needs {expected.datatype}")
    # Before anything is computed with it: sides have no bound in JSON, and their number none either.
    if not 1 <= len(shape) <= 4 or not all(type(side) is int and 0 <= side <= _LARGEST_SIDE for side in shape):
        raise ConfigError(f"input {name!r}: shape {_cut(list(shape))}: needs 1 to 4 whole numbers")
    count = math.prod(shape)
    if datatype == "BYTES":
        items = _split(data) if isinstance(data, bytes) else [_file(item) for item in data]
        if len(items) != count:
            raise ConfigError(f"input {name!r}: shape {list(shape)} says {count} images, and {len(items)} came")
        return items
    array = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else _whole_numbers(name, list(data))
    if array.size != count:
        raise ConfigError(f"input {name!r}: shape {list(shape)} says {count} values, and {array.size} came")
    return array.reshape(tuple(shape))


def _whole_numbers(name: str, values: list[Any]) -> Array:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of several lengths
        array = np.empty(1, object)
    if array.size and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255):
        raise ConfigError(f"input {name!r}: UINT8 needs whole numbers from 0 to 255")
    return array.astype(np.uint8)


def _file(item: Any) -> bytes:
    if isinstance(item, bytes):
        return item
    try:
        return base64.b64decode(item, validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise ConfigError("input 'image': needs base64 in JSON") from None


def _split(data: bytes) -> list[bytes]:
    """What `_to_bytes` joined."""
    items, at = [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data):
            raise ConfigError("input 'image': BYTES that end too early: each needs its length before it, in 4 bytes")
        items.append(data[at + 4 : end])
        at = end
    return items


def _to_bytes(array: Array) -> bytes:
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(item)) + item for item in array)
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
