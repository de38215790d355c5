"""CUDA by its driver API (package cuda-bindings), for engines that run without PyTorch.

Nothing is loaded before the first call. Every call that fails raises, and names itself.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from agln_fast.errors import BackendError

__all__ = [
    "Device",
    "Graph",
    "Stream",
    "TwinBuffer",
    "compute_capability",
    "device_count",
    "device_identity",
    "has_bindings",
    "obstacle",
]

_NOT_INITIALISED = 3  # CUDA_ERROR_NOT_INITIALIZED


def has_bindings() -> bool:
    """Whether cuda-bindings is installed."""
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


@cache
def _initialised(process: int) -> tuple[Any | None, str]:
    """The module `cuda.bindings.driver`, ready for use in this process; or None, and why: nothing without a driver."""
    if not has_bindings():
        return None, 'package "cuda.bindings" is not installed'
    try:
        from cuda.bindings import driver

        (code,) = driver.cuInit(0)
    except Exception as error:  # its kinds are not documented, but for one
        missing = type(error).__name__ == "DynamicLibNotFoundError"
        return None, "" if missing else " ".join(str(error).split())
    if int(code) == 0:
        return driver, ""
    forked = "; this process was forked of one that uses CUDA: use spawn" if int(code) == _NOT_INITIALISED else ""
    return None, f"cuInit failed: {_explained(driver, code)}{forked}"


def _driver() -> Any | None:
    return _initialised(os.getpid())[0]


def _explained(driver: Any, code: Any) -> str:
    words = [driver.cuGetErrorName(code)[1], driver.cuGetErrorString(code)[1]]
    return ", ".join(word.decode() if isinstance(word, bytes) else str(word) for word in words)


def _call(function: str, *arguments: Any) -> Any:
    """What a function of the driver returns beside its code: nothing, a value, or a tuple of several.

    Raises:
        BackendError: its code is another than success, or there is no driver.
    """
    driver = _driver()
    if driver is None:
        raise BackendError(f"{function} cannot be called: {obstacle()}")
    try:
        code, *results = getattr(driver, function)(*arguments)
    except RuntimeError as error:  # the driver that is installed does not know the function
        raise BackendError(f"{function} failed: {error}; update the NVIDIA driver") from error
    if int(code) != 0:
        reason = _explained(driver, code)
        advice = "; free memory of the GPU, or take a smaller batch" if "OUT_OF_MEMORY" in reason else ""
        raise BackendError(f"{function} failed: {reason}{advice}")
    return results[0] if len(results) == 1 else tuple(results) or None


def obstacle() -> str | None:
    """Why no CUDA device can be used, or None."""
    _, reason = _initialised(os.getpid())
    if reason:
        return f"no CUDA device can be used: {reason}"
    try:
        return None if device_count() else "no CUDA device is present"
    except BackendError as error:
        return str(error)


def device_count() -> int:
    """CUDA devices that there are; 0 without cuda-bindings or a driver."""
    return 0 if _driver() is None else int(_call("cuDeviceGetCount"))


def device_identity(device: int) -> str:
    """The name of a device and the version of the driver: what compiled kernels depend on."""
    name = _call("cuDeviceGetName", 256, _call("cuDeviceGet", device))
    return f"{name.decode().rstrip(chr(0))}, driver {_call('cuDriverGetVersion')}"


def compute_capability(device: int = 0) -> str | None:
    """The compute capability of a CUDA device, e.g. "sm89"; None where it is not there.

    Raises:
        BackendError: the driver does not tell.
    """
    if device >= device_count():
        return None
    handle = _call("cuDeviceGet", device)
    names = _driver().CUdevice_attribute  # type: ignore[union-attr]
    major, minor = (
        _call("cuDeviceGetAttribute", getattr(names, f"CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{part}"), handle)
        for part in ("MAJOR", "MINOR")
    )
    return f"sm{major}{minor}"


@cache
def _primary_context(process: int, index: int) -> Any:
    """Kept until the process ends: without a user it would be destroyed, and what libraries have loaded into it."""
    return _call("cuDevicePrimaryCtxRetain", _call("cuDeviceGet", index))


class Device:
    """A CUDA device by its primary context, which it shares with whatever else of the process uses the device."""

    def __init__(self, index: int) -> None:
        """
        Raises:
            BackendError: it is not there, or cannot be used.
        """
        self.index = index
        self._context = _primary_context(os.getpid(), index)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make it this thread's device, and then the one from before again."""
        _call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent")


class Stream:
    """A stream of the current device, which waits for no other."""

    def __init__(self) -> None:
        self._handle = _call("cuStreamCreate", int(_driver().CUstream_flags.CU_STREAM_NON_BLOCKING))  # type: ignore[union-attr]

    @property
    def address(self) -> int:
        """As libraries want it."""
        return int(self._handle)

    def synchronize(self) -> None:
        """Wait for what it has been given; an error of that work comes out here."""
        _call("cuStreamSynchronize", self._handle)

    def capture(self, work: Callable[[], object]) -> Graph:
        """What `work` gives to this stream as a graph. It must not wait for the device, nor allocate on it.

        Raises:
            BackendError: it cannot be captured; the stream is as before.
        """
        modes = _driver().CUstreamCaptureMode  # type: ignore[union-attr]
        # Only this thread is watched: others may allocate meanwhile.
        _call("cuStreamBeginCapture", self._handle, modes.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
        try:
            work()
        except BaseException:
            self._abandon()
            raise
        graph = _call("cuStreamEndCapture", self._handle)
        try:
            return Graph(_call("cuGraphInstantiate", graph, 0), self)
        finally:
            _call("cuGraphDestroy", graph)

    def _abandon(self) -> None:
        """End a capture of which nothing comes."""
        try:
            graph = _call("cuStreamEndCapture", self._handle)
        except BackendError:  # the capture was invalid
            return
        if int(graph):
            _call("cuGraphDestroy", graph)

    def close(self) -> None:
        """Free it."""
        _call("cuStreamDestroy", self._handle)


class Graph:
    """Work that was captured: each call gives all of it to its stream at once."""

    def __init__(self, handle: Any, stream: Stream) -> None:
        self._handle, self._stream = handle, stream

    def __call__(self) -> None:
        _call("cuGraphLaunch", self._handle, self._stream.address)

    def close(self) -> None:
        """Free it."""
        _call("cuGraphExecDestroy", self._handle)


class TwinBuffer:
    """An array in page-locked memory of the host, from and to which the device copies by itself, and its twin there.

    host: of the given shape and dtype. address: of the twin.
    """

    def __init__(self, shape: Sequence[int], dtype: npt.DTypeLike) -> None:
        """On the current device.

        Raises:
            BackendError: there is not enough memory.
        """
        kind = np.dtype(dtype)
        size = math.prod(shape) * kind.itemsize
        self.address = int(_call("cuMemAlloc", size))
        try:
            self._pinned = int(_call("cuMemHostAlloc", size, 0))
        except BackendError:
            _call("cuMemFree", self.address)
            raise
        memory = (ctypes.c_ubyte * size).from_address(self._pinned)
        self.host: npt.NDArray[Any] = np.frombuffer(memoryview(memory), kind).reshape(shape)

    def upload(self, stream: Stream, count: int) -> None:
        """Copy the first `count` elements along the first dimension to the device, when `stream` gets there."""
        _call("cuMemcpyHtoDAsync", self.address, self._pinned, self.host[:count].nbytes, stream.address)

    def download(self, stream: Stream, count: int) -> None:
        """Copy them from the device."""
        _call("cuMemcpyDtoHAsync", self._pinned, self.address, self.host[:count].nbytes, stream.address)

    def close(self) -> None:
        """Free both; `host` must not be used any more."""
        del self.host
        try:
            _call("cuMemFreeHost", self._pinned)
        finally:
            _call("cuMemFree", self.address)
