"""CUDA by its driver API (package cuda-bindings), for engines that run without PyTorch.

Nothing is loaded before the first call. Every call that fails raises, and names itself.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from agln_fast.errors import BackendError

__all__ = ["Device", "Graph", "Stream", "TwinBuffer", "compute_capability", "device_count", "has_bindings"]


def has_bindings() -> bool:
    """Whether cuda-bindings is installed."""
    return find_spec("cuda") is not None and find_spec("cuda.bindings") is not None


@cache
def _driver() -> Any | None:
    """The module `cuda.bindings.driver`, initialised; None without it, without a driver, or without a device."""
    if not has_bindings():
        return None
    from cuda.bindings import driver

    try:
        (code,) = driver.cuInit(0)
    except Exception:  # no libcuda: the kind of error is not documented
        return None
    return driver if int(code) == 0 else None


def _call(function: str, *arguments: Any) -> Any:
    """What a function of the driver returns beside its code: nothing, a value, or a tuple of several.

    Raises:
        BackendError: its code is another than success, or there is no driver.
    """
    driver = _driver()
    if driver is None:
        raise BackendError("no CUDA driver can be used here: `agln-fast doctor` shows more")
    code, *results = getattr(driver, function)(*arguments)
    if int(code) != 0:
        words = [driver.cuGetErrorName(code)[1], driver.cuGetErrorString(code)[1]]
        name, reason = (word.decode() if isinstance(word, bytes) else str(word) for word in words)
        advice = "; free memory of the GPU, or take a smaller batch" if name == "CUDA_ERROR_OUT_OF_MEMORY" else ""
        raise BackendError(f"{function} failed: {name}, {reason}{advice}")
    return results[0] if len(results) == 1 else tuple(results) or None


def device_count() -> int:
    """CUDA devices that there are; 0 without cuda-bindings or a driver."""
    return 0 if _driver() is None else int(_call("cuDeviceGetCount"))


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


class Device:
    """A CUDA device by its primary context, which it shares with whatever else of the process uses the device."""

    def __init__(self, index: int) -> None:
        """
        Raises:
            BackendError: it is not there, or cannot be used.
        """
        self.index = index
        self._handle = _call("cuDeviceGet", index)
        self._context = _call("cuDevicePrimaryCtxRetain", self._handle)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make it this thread's device, and then the one from before again."""
        _call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            _call("cuCtxPopCurrent")

    def close(self) -> None:
        """Give it back; nothing that was made on it may be there any more."""
        _call("cuDevicePrimaryCtxRelease", self._handle)


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
        _call("cuMemFreeHost", self._pinned)
        _call("cuMemFree", self.address)
