"""What an op launches, as data: Triton's kernels compiled for each GPU, with their grids and arguments.

An op's own launcher is called on CPU tensors, with a driver under Triton that compiles for a GPU and notes each launch
in the place of making it. Grids, tiles and numbers may depend on the batch in any way: they are noted for each size.
The plugin library (`plugins/plugin.cpp`) reads what `Record.to_bytes` writes, and knows nothing else of any op.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agln_fast.errors import BuildError
from agln_fast.kernels.devices import DEVICES
from agln_fast.kernels.registration import OPS

__all__ = ["PTX", "Argument", "Launch", "Noted", "Place", "Port", "Program", "Record", "record", "recording"]

PTX = "ptx"
"""In the place of a capability: what the driver compiles itself, for all GPUs that have no binary of their own."""
_PTX_OF = "sm80"  # and later: that of others may have instructions that no other GPU has
_SMALL = "sm86"  # whose tiles fit the shared memory of all
_MAGIC, _FORMAT = b"AGLN", 1
_ALIGNMENT = 256  # of what lies in the workspace, bytes
_TYPES = [torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int32]
_MEMORY = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::new_empty_strided"}
_SCALARS = {"i32": "<i", "u32": "<I", "i64": "<q", "u64": "<Q", "fp32": "<f", "fp64": "<d"}


@dataclass(frozen=True)
class Port:
    """A tensor that a layer takes or gives.

    shape: -1 for the batch. channels_last: the channels of a pixel lie side by side, those of half precision padded to
    a multiple of 8 (TensorRT's kHWC8, and kHWC for float32); otherwise it is contiguous (kLINEAR).
    order: of weights whose dimensions lie otherwise in memory than the op has them: those of the op, as they lie.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool = False
    order: tuple[int, ...] = ()

    def empty(self, batch: int) -> Tensor:
        """A tensor that lies in memory as TensorRT has it."""
        shape = [batch if side < 0 else side for side in self.shape]
        if not self.channels_last:
            return torch.empty(shape, dtype=self.dtype)
        count, channels, height, width = shape
        padded = channels if self.dtype == torch.float32 else channels + -channels % 8
        return torch.empty(count, height, width, padded, dtype=self.dtype)[..., :channels].permute(0, 3, 1, 2)


class Place(IntEnum):
    """Where a kernel finds an argument."""

    INPUT = 0
    OUTPUT = 1
    WORKSPACE = 2
    VALUE = 3


@dataclass(frozen=True)
class Argument:
    """Of a kernel: `offset` bytes behind the start of an input, an output or the workspace, or a value.

    index: of the input or output. value: the bytes of a number.
    """

    place: Place
    index: int = 0
    offset: int = 0
    value: bytes = b""


@dataclass(frozen=True)
class Launch:
    """kernel: its name in `binary`, of `Record.binaries`. grid, threads: of a launch, and of a block; shared: bytes."""

    binary: int
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Program:
    """All launches for one batch on one GPU. workspace: bytes that they need beside inputs and outputs."""

    launches: tuple[Launch, ...]
    workspace: int


@dataclass(frozen=True)
class Record:
    """A layer, by its name in ONNX. programs: capability ("sm89", or "ptx") and batch -> what is launched."""

    layer: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    binaries: tuple[bytes, ...]
    programs: dict[tuple[str, int], Program]

    def to_bytes(self) -> bytes:
        """For the plugin library; little-endian, strings and lists after their length of 32 bits, a CRC-32 last. A
        capability is its number, and PTX that of the first one that can run it, negative."""
        parts = [_MAGIC, _number(_FORMAT), _text(self.layer.encode())]
        for ports in (self.inputs, self.outputs):
            parts.append(_number(len(ports)))
            for port in ports:
                numbers = _TYPES.index(port.dtype), port.channels_last, len(port.shape), *port.shape
                parts += map(_number, numbers)
        parts += [_number(len(self.binaries)), *map(_text, self.binaries), _number(len(self.programs))]
        for (capability, batch), program in self.programs.items():
            number = -_digits(_PTX_OF) if capability == PTX else _digits(capability)
            parts += [_number(number), _number(batch), struct.pack("<Q", program.workspace)]
            parts.append(_number(len(program.launches)))
            for launch in program.launches:
                parts += [_number(launch.binary), _text(launch.kernel.encode())]
                parts += map(_number, (*launch.grid, launch.threads, launch.shared, len(launch.arguments)))
                for each in launch.arguments:
                    parts += [_number(each.place), _number(each.index), struct.pack("<Q", each.offset)]
                    parts.append(_text(each.value))
        data = b"".join(parts)
        return data + struct.pack("<I", zlib.crc32(data))


def _digits(capability: str) -> int:
    return int(capability.removeprefix("sm"))


def _number(value: int) -> bytes:
    return struct.pack("<i", value)


def _text(value: bytes) -> bytes:
    return _number(len(value)) + value


@dataclass(frozen=True)
class Noted:
    """A launch as it was asked for. compiled: Triton's. arguments: type and value of each that the kernel takes.
    keywords: constants and options, by their names."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: list[tuple[str, Any]]
    keywords: dict[str, Any]


class _Driver:
    """Stands in for Triton's: a device that is compiled for, and never run on."""

    def __init__(self, capability: str) -> None:
        self._number = _digits(capability)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._number, 32)

    def get_current_device(self) -> int:
        return self._number  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recording(capability: str) -> Iterator[list[Noted]]:
    """Kernels are compiled for `capability` and noted, in the place of being launched."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: list[Noted] = []
    run = JITFunction.run

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        own = {name: value for name, value in kwargs.items() if name in self.arg_names}
        bound = self.signature.bind(*args, **own)
        bound.apply_defaults()
        size = grid(bound.arguments) if callable(grid) else grid
        types = compiled.src.signature
        arguments = chain(*(_flat(types[name], value) for name, value in bound.arguments.items()))
        found.append(Noted(compiled, tuple(size), list(arguments), kwargs))
        return compiled

    with patch.object(driver, "_active", _Driver(capability)), patch.object(JITFunction, "run", note):
        yield found


def _flat(kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """Types and values of what a kernel takes of an argument: tuples in order, nothing of constants."""
    if isinstance(kind, tuple):
        for one, part in zip(kind, value, strict=True):
            yield from _flat(one, part)
    elif kind != "constexpr":
        yield kind, value


def record(
    layer: str,
    op: str,
    inputs: Sequence[Port],
    arguments: Callable[[Sequence[Tensor]], dict[str, Any]],
    batches: Sequence[int],
    capabilities: Sequence[str],
) -> Record:
    """Of a call of `op` with `arguments` of the `inputs`, for each of `batches` and `capabilities`, and PTX for later
    ones.

    Raises:
        BuildError: it needs something that a layer of TensorRT has not.
    """
    binaries: dict[bytes, int] = {}
    programs: dict[tuple[str, int], Program] = {}
    outputs: tuple[Port, ...] = ()
    for capability in (*capabilities, PTX):
        device, tiles_of = (_PTX_OF, _SMALL) if capability == PTX else (capability, capability)
        for batch in batches:
            given = [port.empty(batch) for port in inputs]
            with recording(device) as found, _OnlyLaunches(op):
                results = OPS[op].launch((), arguments(given), (tiles_of, DEVICES[tiles_of].processors))
            results = results if isinstance(results, tuple) else (results,)
            ports = tuple(_port_of(op, result, batch) for result in results)
            if outputs not in ((), ports):
                raise BuildError(f"{op} gives {outputs} for one batch or GPU, and {ports} for another")
            outputs = ports
            places = _Places(given, results)
            launches = tuple(_launch(op, noted, places, binaries, capability) for noted in found)
            programs[capability, batch] = Program(launches, places.workspace)
    return Record(layer, tuple(inputs), outputs, tuple(binaries), programs)


class _OnlyLaunches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses what a launcher does beside launching: it would not be in the record."""

    def __init__(self, op: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._op = op

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func._schema.name not in _MEMORY:
            raise BuildError(f"{self._op}: its launcher calls {func._schema.name}, which a layer would not do")
        return func(*args, **(kwargs or {}))


def _port_of(op: str, result: Tensor, batch: int) -> Port:
    """What describes `result`, whose first side is the batch.

    Raises:
        BuildError: TensorRT has no format for it.
    """
    shape = (-1, *result.shape[1:])
    for channels_last in (False, True):
        port = Port(shape, result.dtype, channels_last)
        if channels_last <= (result.ndim == 4) and port.empty(batch).stride() == result.stride():
            return port
    raise BuildError(
        f"{op} gives {tuple(result.shape)} with strides {result.stride()}, which TensorRT has no format for"
    )


class _Places:
    """Where tensors lie: in inputs, in outputs, or in a workspace, which grows by all others."""

    def __init__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self.workspace = 0
        self._known = {_storage(x): Argument(Place.INPUT, index) for index, x in enumerate(inputs)}
        self._known |= {_storage(x): Argument(Place.OUTPUT, index) for index, x in enumerate(outputs)}

    def of(self, tensor: Tensor) -> Argument:
        """The place of its first element."""
        storage = _storage(tensor)
        if storage not in self._known:
            self._known[storage] = Argument(Place.WORKSPACE, offset=self.workspace)
            self.workspace += -(-tensor.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
        place = self._known[storage]
        offset = int(tensor.storage_offset()) * tensor.element_size()
        return Argument(place.place, place.index, place.offset + offset)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _launch(op: str, noted: Noted, places: _Places, binaries: dict[bytes, int], capability: str) -> Launch:
    metadata, compiled = noted.compiled.metadata, noted.compiled
    needs = {
        "clusters": metadata.num_ctas != 1,
        "a cooperative grid": metadata.launch_cooperative_grid,
        "a programmatic launch": metadata.launch_pdl,
        "scratch memory": metadata.global_scratch_size or metadata.profile_scratch_size,
    }
    if wanted := [what for what, needed in needs.items() if needed]:
        raise BuildError(f"{op}: kernel {metadata.name} needs {' and '.join(wanted)}, which a plugin does not give")
    binary = compiled.asm["ptx"].encode() + b"\0" if capability == PTX else compiled.asm["cubin"]
    arguments = [_argument(kind, value, places) for kind, value in noted.arguments]
    arguments += 2 * [Argument(Place.VALUE, value=bytes(8))]  # scratch memory, for all devices and for profiles: none
    x, y, z = (*noted.grid, 1, 1)[:3]
    return Launch(
        binaries.setdefault(binary, len(binaries)),
        metadata.name,
        (x, y, z),
        32 * metadata.num_warps,
        metadata.shared,
        tuple(arguments),
    )


def _argument(kind: str, value: Any, places: _Places) -> Argument:
    if not kind.startswith("*"):
        return Argument(Place.VALUE, value=struct.pack(_SCALARS[kind], value))
    return Argument(Place.VALUE, value=bytes(8)) if value is None else places.of(value)
