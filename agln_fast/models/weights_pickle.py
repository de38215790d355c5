"""Read the pickle inside a `.pth` file without calling anything that it names.

Python's unpickler runs code, and PyTorch's with `weights_only` still hands values of the file to functions of PyTorch,
and to those of NumPy where their scalars are allowed, which a crafted file can crash. This one calls nothing: tensors
become `StoredTensor`, dictionaries plain `dict`, and all else that is known to stand beside weights becomes `Inert`.
Each object costs the file at least a byte of a bounded pickle, so that memory is bounded, too.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import torch

from agln_fast.errors import CheckpointError, printable
from agln_fast.models.weights_beside import DICTIONARIES, is_harmless

__all__ = ["MOST_PICKLE_BYTES", "NOT_PYTORCH", "Inert", "Storage", "StoredTensor", "read_pickle"]

# The 600 tensors of a ResNet-101 need 36,000 steps and 100 kB, an optimizer's state three times that.
MOST_PICKLE_BYTES = 16 << 20
_MOST_STEPS = 1_000_000
_MOST_DIMENSIONS = 8
_LONGEST_NAME = 200

NOT_PYTORCH = "truncated, damaged, or not a checkpoint of PyTorch"


@dataclass(frozen=True)
class Inert:
    """Something that is not used. `what` says in messages what stands there; `tensor`: a tensor, but no dense one."""

    what: str
    tensor: bool = False


@dataclass(frozen=True)
class Storage:
    """A run of bytes that tensors are cut from: `nbytes` from byte `start` of the file's record `key`."""

    key: str
    dtype: torch.dtype
    start: int
    nbytes: int


@dataclass(frozen=True)
class StoredTensor:
    """What a tensor claims to be: elements of `dtype` in `storage`; `offset` and `stride` count elements."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of a dense copy."""
        return math.prod(self.shape) * self.dtype.itemsize

    def fits(self) -> bool:
        """Whether its storage holds all its elements, and at least as many as it claims."""
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        return 0 in self.shape or max(self.nbytes, (last + 1) * self.dtype.itemsize) <= self.storage.nbytes


def read_pickle(file: BinaryIO, dtypes: dict[str, torch.dtype] | None = None) -> object:
    """The object that the pickle at the file's position describes; `file` is left behind its end.

    Args:
        dtypes: filled with the type of each storage that the pickle names, by key.

    Raises:
        CheckpointError: truncated, damaged, too large, or it names something that is not known to be harmless. The
            message does not name the file.
    """
    machine = _Machine(file, {} if dtypes is None else dtypes)
    try:
        return machine.run()
    except (IndexError, KeyError, TypeError, ValueError, OverflowError, RecursionError, struct.error):
        raise CheckpointError(NOT_PYTORCH) from None
    finally:
        machine.refuse_unknown()  # goes before whatever else is wrong


_Value = object
_Maker = Callable[[Sequence[_Value]], _Value]


@dataclass(frozen=True)
class _Global(Inert):
    """What the name `what` stands for: `make` is given the arguments that the named function would get."""

    make: _Maker = field(kw_only=True)
    dtype: torch.dtype | None = None
    known: bool = True


_CONSTANTS: dict[bytes, Callable[[], _Value]] = {
    pickle.NONE: lambda: None,
    pickle.NEWTRUE: lambda: True,
    pickle.NEWFALSE: lambda: False,
    pickle.EMPTY_TUPLE: tuple,
    pickle.EMPTY_LIST: list,
    pickle.EMPTY_DICT: dict,
    pickle.EMPTY_SET: lambda: Inert("set"),
}
_NUMBERS = {pickle.BININT: "<i", pickle.BININT1: "<B", pickle.BININT2: "<H", pickle.BINFLOAT: ">d"}
_TUPLES = {pickle.TUPLE1: 1, pickle.TUPLE2: 2, pickle.TUPLE3: 3}
_TEXTS = {pickle.BINUNICODE: "<I", pickle.SHORT_BINUNICODE: "<B", pickle.BINUNICODE8: "<Q"}
# Python 2 wrote names as bytes.
_OLD_TEXTS = {pickle.BINSTRING: "<I", pickle.SHORT_BINSTRING: "<B"}
_BYTES = {pickle.BINBYTES: "<I", pickle.SHORT_BINBYTES: "<B", pickle.BINBYTES8: "<Q", pickle.BYTEARRAY8: "<Q"}
_LONGS = {pickle.LONG1: "<B", pickle.LONG4: "<I"}
_GETS = {pickle.BINGET: "<B", pickle.LONG_BINGET: "<I"}
_PUTS = {pickle.BINPUT: "<B", pickle.LONG_BINPUT: "<I"}


class _Machine:
    """The stack machine of pickle's protocols 2 to 5, without its power to call."""

    def __init__(self, file: BinaryIO, dtypes: dict[str, torch.dtype]) -> None:
        self._file = file
        self._dtypes = dtypes
        self._bytes_left = MOST_PICKLE_BYTES
        self._steps_left = _MOST_STEPS
        self._stack: list[_Value] = []
        self._outer: list[list[_Value]] = []  # the stacks below each mark
        self._memo: dict[int, _Value] = {}
        self._unknown = ""  # the first name that is not known
        self._called = ""  # the first one of these that is called, and not only as the class of an object
        self._model = ""  # the class of the outermost module of PyTorch

    def refuse_unknown(self) -> None:
        """
        Raises:
            CheckpointError: something was named that is not known to be harmless.
        """
        if self._unknown and self._model and not self._called:
            raise CheckpointError(
                f"refused: it holds a whole model, of class '{printable(self._model)}', whose code would have to run; "
                "load it where that code is, and save the weights: torch.save(model.state_dict(), 'weights.pth')"
            )
        if self._unknown:
            raise CheckpointError(
                f"refused: besides weights it wants to load '{printable(self._called or self._unknown)}', which could "
                "run code; save a plain state dict instead"
            )

    def run(self) -> _Value:
        while True:
            self._spend(1)
            code = self._take(1)
            if code == pickle.STOP:
                return self._stack.pop()
            self._step(code)

    def _step(self, code: bytes) -> None:
        stack = self._stack
        if code in _PUTS:
            self._memo[self._number(_PUTS[code])] = stack[-1]
        elif code in _GETS:
            stack.append(self._memo[self._number(_GETS[code])])
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code]())
        elif code in _NUMBERS:
            stack.append(struct.unpack(_NUMBERS[code], self._take(struct.calcsize(_NUMBERS[code])))[0])
        elif code in _TEXTS:
            stack.append(self._sized(_TEXTS[code]).decode("utf-8", "surrogatepass"))
        elif code in _OLD_TEXTS:
            stack.append(self._sized(_OLD_TEXTS[code]).decode("utf-8", "replace"))
        elif code in _BYTES:
            stack.append(self._sized(_BYTES[code]))
        elif code in _LONGS:
            stack.append(int.from_bytes(self._sized(_LONGS[code]), "little", signed=True))
        elif code in _TUPLES:
            items = tuple(stack.pop() for _ in range(_TUPLES[code]))
            stack.append(items[::-1])
        elif code == pickle.MARK:
            self._outer.append(stack)
            self._stack = []
        elif code == pickle.TUPLE:
            items = tuple(self._above_mark())
            self._stack.append(items)
        elif code == pickle.SETITEM:
            value, key = stack.pop(), stack.pop()
            _put(stack[-1], [key, value])
        elif code == pickle.SETITEMS:
            pairs = self._above_mark()
            _put(self._stack[-1], pairs)
        elif code == pickle.APPEND:
            value = stack.pop()
            _extend(stack[-1], [value])
        elif code in (pickle.APPENDS, pickle.ADDITEMS):
            values = self._above_mark()
            _extend(self._stack[-1], values)
        elif code == pickle.FROZENSET:
            self._above_mark()
            self._stack.append(Inert("frozenset"))
        elif code == pickle.GLOBAL:
            stack.append(self._named(self._line(), self._line()))
        elif code == pickle.STACK_GLOBAL:
            name, module = stack.pop(), stack.pop()
            if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > _LONGEST_NAME:
                raise ValueError(code)
            stack.append(self._named(module, name))
        elif code in (pickle.REDUCE, pickle.NEWOBJ):
            arguments, function = stack.pop(), stack.pop()
            if code == pickle.REDUCE and isinstance(function, _Global) and not function.known:
                self._called = self._called or function.what
            stack.append(self._call(function, arguments))
        elif code == pickle.NEWOBJ_EX:
            _, arguments, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif code == pickle.BINPERSID:
            identity = stack.pop()
            stack.append(_class_of_module(identity) or self._storage(identity))
        elif code == pickle.BUILD:  # the state of an object, e.g. the versions beside a state dict
            attributes = stack.pop()
            if isinstance(attributes, dict) and attributes.keys() >= {"_parameters", "_modules"}:
                self._model = stack[-1].what if isinstance(stack[-1], Inert) else ""
        elif code == pickle.POP:
            stack.pop()
        elif code == pickle.POP_MARK:
            self._above_mark()
        elif code == pickle.MEMOIZE:
            self._memo[len(self._memo)] = stack[-1]
        elif code == pickle.PROTO:
            self._take(1)
        elif code == pickle.FRAME:
            self._take(8)
        else:
            raise ValueError(code)

    def _spend(self, steps: int) -> None:
        self._steps_left -= steps
        if self._steps_left < 0:
            raise CheckpointError(
                f"more than {_MOST_STEPS:,} values beside the weights; save a plain state dict instead"
            )

    def _take(self, count: int) -> bytes:
        self._bytes_left -= count
        if self._bytes_left < 0:
            raise CheckpointError(
                f"more than {MOST_PICKLE_BYTES >> 20} MiB beside the weights; save a plain state dict instead"
            )
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointError(NOT_PYTORCH)
        return data

    def _number(self, layout: str) -> int:
        number: int = struct.unpack(layout, self._take(struct.calcsize(layout)))[0]
        return number

    def _sized(self, layout: str) -> bytes:
        return self._take(self._number(layout))

    def _line(self) -> str:
        line = self._file.readline(_LONGEST_NAME)
        if not line.endswith(b"\n"):
            raise ValueError(line)
        return line[:-1].decode()

    def _above_mark(self) -> list[_Value]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _named(self, module: str, name: str) -> _Value:
        found = _global(module, name)
        if not found.known:
            self._unknown = self._unknown or found.what
        return found

    def _storage(self, identity: _Value) -> Storage:
        storage = _storage(identity)
        self._dtypes[storage.key] = storage.dtype
        return storage

    def _call(self, function: _Value, arguments: _Value) -> _Value:
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError(function)
        if arguments and isinstance(arguments[0], list):
            self._spend(len(arguments[0]))  # a list can be named again and again at no cost
        return function.make(arguments)


def _put(target: _Value, keys_and_values: list[_Value]) -> None:
    if isinstance(target, Inert):
        return
    if not isinstance(target, dict):
        raise ValueError(target)
    for key, value in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
        # The hash of others may recurse as deeply as the file nests them, and those of numbers may all be the same.
        target[key if isinstance(key, str) else Inert(type(key).__name__)] = value


def _extend(target: _Value, values: list[_Value]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif not isinstance(target, Inert):
        raise ValueError(target)


def _dictionary(arguments: Sequence[_Value]) -> _Value:
    """What `OrderedDict()`, `OrderedDict(pairs)` (Python 2), `Counter(dict)` and `defaultdict(kind)` hold."""
    first = arguments[0] if arguments else None
    if isinstance(first, dict):
        return first
    made: dict[_Value, _Value] = {}
    for pair in first if isinstance(first, list) else ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(pair)
        _put(made, list(pair))
    return made


def _tensor(arguments: Sequence[_Value], dtype: _Value = None) -> _Value:
    """`_rebuild_tensor(storage, offset, shape, stride, …)`."""
    storage, offset, shape, stride = arguments[:4]
    if not isinstance(storage, Storage):
        return Inert("tensor without storage", tensor=True)
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise ValueError(shape)
    if len(shape) > _MOST_DIMENSIONS or not all(_is_count(n) for n in (offset, *shape, *stride)):
        raise ValueError(shape)
    kind = dtype.dtype if isinstance(dtype, _Global) and dtype.dtype else storage.dtype
    return StoredTensor(storage, kind, offset, shape, stride)  # type: ignore[arg-type]


def _tensor_of_type(arguments: Sequence[_Value]) -> _Value:
    """`_rebuild_from_type_v2(function, type, arguments, state)`: a subclass, or a tensor with attributes."""
    function, _, inner = arguments[:3]
    # Not itself once more: the recursion would be as deep as the file likes.
    if not isinstance(function, _Global) or function.make is _tensor_of_type or not isinstance(inner, tuple):
        raise ValueError(function)
    return function.make(inner)


def _is_count(value: _Value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _storage(identity: _Value) -> Storage:
    """A persistent id: ("storage", type, key, location, elements), in old files followed by None or a view."""
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise ValueError(identity)
    kind, key, count = identity[1], identity[2], identity[4]
    if not isinstance(kind, _Global) or kind.dtype is None or not isinstance(key, str) or not _is_count(count):
        raise ValueError(identity)
    start = 0
    if len(identity) == 6 and identity[5] is not None:
        _, start, count = identity[5]
        if not _is_count(start) or not _is_count(count):
            raise ValueError(identity)
    return Storage(key, kind.dtype, start * kind.dtype.itemsize, count * kind.dtype.itemsize)


def _class_of_module(identity: _Value) -> _Value:
    """A persistent id of PyTorch before 1.6: ("module", class, file, source of the class); None if it is another."""
    if not isinstance(identity, tuple) or len(identity) != 4 or identity[0] != "module":
        return None
    return identity[1] if isinstance(identity[1], _Global) and not identity[1].known else None


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "QInt8Storage": torch.qint8,
    "QUInt8Storage": torch.quint8,
    "QInt32Storage": torch.qint32,
    "UntypedStorage": torch.uint8,
}
_MAKERS: dict[str, _Maker] = {
    **dict.fromkeys(DICTIONARIES, _dictionary),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": lambda arguments: _tensor(arguments, arguments[6]),
    "torch._utils._rebuild_parameter": lambda arguments: arguments[0],
    "torch._utils._rebuild_parameter_with_state": lambda arguments: arguments[0],
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    "torch._utils._rebuild_qtensor": lambda _: Inert("quantised tensor", tensor=True),
    "torch._utils._rebuild_sparse_tensor": lambda _: Inert("sparse tensor", tensor=True),
    "torch._utils._rebuild_nested_tensor": lambda _: Inert("nested tensor", tensor=True),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda _: Inert("tensor without values", tensor=True),
}
_RENAMED = {"__builtin__": "builtins", "torch.tensor": "torch._tensor", "torch.cuda": "torch", "torch.storage": "torch"}


def _global(module: str, name: str) -> _Global:
    """The stand-in for `module.name`."""
    renamed = _RENAMED.get(module, module)
    full = f"{renamed}.{name}"
    if full in _MAKERS:
        return _Global(full, make=_MAKERS[full])
    dtype = _STORAGES.get(name, vars(torch).get(name)) if renamed == "torch" else None
    if not isinstance(dtype, torch.dtype):
        dtype = None
    known = dtype is not None or is_harmless(renamed, name)
    return _Global(full if known else f"{module}.{name}", make=lambda _: Inert(full), dtype=dtype, known=known)
