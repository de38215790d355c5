"""Stand-ins for CUDA's driver and for TensorRT: memory is the host's, and work is done when someone waits for it.

The driver keeps to what the real one promises where engines rely on it: what a stream is given is done no sooner than
somebody waits for the stream; copies and launches between the beginning and the end of a capture are not done but
recorded, and are given to the stream at each launch of the graph; what is freed is gone, and must not be in use.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

__all__ = ["Driver", "Library"]

_FAILED = 719


class Driver:
    """In the place of the module `cuda.bindings.driver`.

    devices: their compute capabilities. failing: functions that fail from now on. calls: how often each was called.
    alive: handles and addresses of what has not been freed.
    """

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=0, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=1
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, *devices: tuple[int, int]) -> None:
        self.devices = devices
        self.version = 13000
        self.failing: set[str] = set()
        self.calls: Counter[str] = Counter()
        self.alive: dict[int, Any] = {}
        self.contexts: list[int] = []
        self._captured: dict[int, list[Callable[[], None]]] = {}
        self._queued: list[tuple[int, Callable[[], None]]] = []
        self._next = 100

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("cu") or name.startswith("cuGetError"):
            return value

        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            if name in self.failing:
                if name == "cuStreamEndCapture":
                    self._captured.clear()  # it is over all the same
                return (_FAILED, None)
            result = value(*arguments)
            return (0,) if result is None else (0, result)

        return call

    def submit(self, stream: int, work: Callable[[], None]) -> None:
        """Do it later, or record it."""
        assert self.alive[stream] == "stream"
        if stream in self._captured:
            self._captured[stream].append(work)
        else:
            self._queued.append((stream, work))

    def _new(self, what: Any) -> int:
        self._next += 1
        self.alive[self._next] = what
        return self._next

    def _memory(self, size: int) -> int:
        memory = (ctypes.c_ubyte * size)()
        self.alive[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def _free(self, handle: int) -> None:
        assert self.contexts, "no device is current"
        assert not self._queued, "it may be in use"
        del self.alive[int(handle)]

    def cuGetErrorName(self, code: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, b"CUDA_ERROR_LAUNCH_FAILED"

    def cuGetErrorString(self, code: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, b"unspecified launch failure"

    def cuDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.devices)

    def cuDeviceGet(self, index: int) -> int:  # noqa: N802
        return index

    def cuDeviceGetName(self, length: int, device: int) -> bytes:  # noqa: N802
        return f"GPU of {self.devices[device]}".encode().ljust(length, b"\0")

    def cuDriverGetVersion(self) -> int:  # noqa: N802
        return self.version

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> int:  # noqa: N802
        return self.devices[device][attribute]

    def cuDevicePrimaryCtxRetain(self, device: int) -> int:  # noqa: N802
        return device

    cuStreamDestroy = cuGraphDestroy = cuGraphExecDestroy = cuMemFree = _free  # noqa: N815
    cuMemFreeHost = _free  # noqa: N815

    def cuCtxPushCurrent(self, context: int) -> None:  # noqa: N802
        self.contexts.append(context)

    def cuCtxPopCurrent(self) -> int:  # noqa: N802
        return self.contexts.pop()

    def cuStreamCreate(self, flags: int) -> int:  # noqa: N802
        assert self.contexts, "no device is current"
        return self._new("stream")

    def cuStreamSynchronize(self, stream: int) -> None:  # noqa: N802
        assert stream not in self._captured, "a wait cannot be captured"
        for _, work in [each for each in self._queued if each[0] == stream]:
            work()
        self._queued = [each for each in self._queued if each[0] != stream]

    def cuStreamBeginCapture(self, stream: int, mode: int) -> None:  # noqa: N802
        self._captured[stream] = []

    def cuStreamEndCapture(self, stream: int) -> int:  # noqa: N802
        return self._new(self._captured.pop(stream))

    def cuGraphInstantiate(self, graph: int, flags: int) -> int:  # noqa: N802
        return self._new(self.alive[graph])

    def cuGraphLaunch(self, graph: int, stream: int) -> None:  # noqa: N802
        for work in self.alive[graph]:
            self.submit(stream, work)

    def cuMemAlloc(self, size: int) -> int:  # noqa: N802
        assert self.contexts, "no device is current"
        return self._memory(size)

    def cuMemHostAlloc(self, size: int, flags: int) -> int:  # noqa: N802
        return self._memory(size)

    def cuMemcpyHtoDAsync(self, to: int, source: int, size: int, stream: int) -> None:  # noqa: N802
        self.submit(stream, lambda: ctypes.memmove(to, source, size) and None)

    def cuMemcpyDtoHAsync(self, to: int, source: int, size: int, stream: int) -> None:  # noqa: N802
        self.submit(stream, lambda: ctypes.memmove(to, source, size) and None)


class Library:
    """In the place of the modules `tensorrt` and `tensorrt_rtx`: an engine that halves the red of each pixel.

    largest: batch. refuses: the names of functions that return what they do where they fail.
    """

    __name__ = "tensorrt"
    TensorIOMode = SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    CudaGraphStrategy = SimpleNamespace(DISABLED="disabled")
    EngineValidity = SimpleNamespace(INVALID="invalid")
    EngineInvalidityDiagnostics = SimpleNamespace(__members__={"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2})

    def __init__(self, driver: Driver, version: str = "1.2.3", size: tuple[int, int] = (32, 48)) -> None:
        self.__version__ = version
        self.driver, self.size = driver, size
        self.refuses: set[str] = set()
        self.shapes: list[list[tuple[int, ...]]] = []
        self.enqueued = 0
        self.compiled = 0

        class ILogger:
            Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2, INFO=3, VERBOSE=4)

        self.ILogger = ILogger

    def Runtime(self, log: Any) -> _Runtime:  # noqa: N802
        return _Runtime(self, log)

    def fails(self, function: str, log: Any) -> bool:
        if function in self.refuses:
            log.log(1, f"{function} said no")
        return function in self.refuses


class _Runtime:
    engine_header_size = 4

    def __init__(self, library: Library, log: Any) -> None:
        self.library, self.log = library, log

    def get_engine_validity(self, header: bytes) -> tuple[str, int]:
        return ("invalid", 3) if "get_engine_validity" in self.library.refuses else ("valid", 0)

    def deserialize_cuda_engine(self, data: bytes) -> _Engine | None:
        return None if self.library.fails("deserialize_cuda_engine", self.log) else _Engine(self.library, self.log)


class _Engine:
    ports = ("image", "INPUT", "UINT8"), ("labels", "OUTPUT", "UINT8")
    num_io_tensors = 2

    def __init__(self, library: Library, log: Any) -> None:
        self.library, self.log = library, log
        self.shapes = {"image": (-1, *library.size, 3), "labels": (-1, *library.size)}

    def get_tensor_name(self, index: int) -> str:
        return self.ports[index][0]

    def get_tensor_mode(self, name: str) -> str:
        return next(port[1] for port in self.ports if port[0] == name)

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=next(port[2] for port in self.ports if port[0] == name))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def create_runtime_config(self) -> _Config:
        return _Config(self.library)

    def create_execution_context(self, config: _Config | None = None) -> _Context | None:
        if self.library.fails("create_execution_context", self.log):
            return None
        context = _Context(self, config)
        self.library.shapes.append(context.shapes)
        return context


class _Config:
    def __init__(self, library: Library) -> None:
        self._cache: Callable[[], _Cache | None] = lambda: None
        self.has_cache = False

    @property
    def cache(self) -> _Cache | None:
        return self._cache()

    def create_runtime_cache(self) -> _Cache:
        return _Cache()

    def set_runtime_cache(self, cache: _Cache) -> bool:
        self._cache, self.has_cache = weakref.ref(cache), True  # as the library: it keeps no cache alive
        return True


class _Cache:
    def __init__(self) -> None:
        self.kernels: set[bytes] = set()

    def deserialize(self, data: bytes) -> bool:
        if not data.startswith(b"kernels"):
            return False
        self.kernels = set(data.split()[1:])
        return True

    def serialize(self) -> bytes:
        return b" ".join([b"kernels", *sorted(self.kernels)])


class _Context:
    def __init__(self, engine: _Engine, config: _Config | None) -> None:
        self.engine, self.config = engine, config
        self.shapes: list[tuple[int, ...]] = []
        self.addresses: dict[str, int] = {}

    def __del__(self) -> None:
        assert self.config is None or not self.config.has_cache or self.config.cache, "its cache went before it"

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.engine.library.fails("set_input_shape", self.engine.log):
            return False
        self.shapes.append(tuple(shape))
        return True

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[-1]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape if name == "image" else self.shape[:3]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        library = self.engine.library
        library.enqueued += 1
        if library.fails("execute_async_v3", self.engine.log):
            return False
        if self.config is not None and self.config.cache is not None:
            kernel = f"batch{self.shape[0]}".encode()
            library.compiled += kernel not in self.config.cache.kernels
            self.config.cache.kernels.add(kernel)
        shape = self.shape

        def work() -> None:
            image = _at(self.addresses["image"], shape)
            _at(self.addresses["labels"], shape[:3])[:] = image[..., 0] // 2

        library.driver.submit(stream, work)
        return True


def _at(address: int, shape: tuple[int, ...]) -> Any:
    size = int(np.prod(shape))
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), np.uint8).reshape(shape)
