"""What runs a fused network, on CUDA captured as a graph: the engine of kind `fused`."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from agln_fast import memory
from agln_fast.contract import IOContract
from agln_fast.deployment import DeployedNetwork
from agln_fast.engines.fused import gpu_obstacle
from agln_fast.engines.torch_network import NetworkEngine, dtype_of, exact_float32
from agln_fast.errors import BackendError
from agln_fast.machine import gpus
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.convolution import WAYS, choose_convolutions
from agln_fast.plan.fuse import fuse
from agln_fast.plan.network import InferenceNetwork

__all__ = ["FusedDeployment", "FusedEngine"]

_PROGRAMS = 8  # shapes that are kept ready; on CUDA each holds the memory of one run
_WARM_UP = 3  # runs before a capture: kernels are compiled, algorithms chosen, memory is found

_capturing = threading.Lock()  # what cuDNN is told during a capture holds for the whole process


class FusedDeployment(DeployedNetwork):
    """A fused network behind an `IOContract`."""

    scale: Tensor
    shift: Tensor

    def __init__(self, network: InferenceNetwork, contract: IOContract, num_classes: int) -> None:
        super().__init__(network, contract, num_classes)
        mean, std = self.mean.double(), self.std.double()
        self.register_buffer("scale", (1 / (255 * std)).float(), persistent=False)
        self.register_buffer("shift", (-mean / std).float(), persistent=False)

    def normalise(self, image: Tensor) -> Tensor:
        """As in `DeployedNetwork`, in one pass, with one multiplication and one addition."""
        dtype = next(self.network.parameters()).dtype
        if self.contract.layout == "uint8_nhwc":
            normalised = torch.empty(image.shape, dtype=dtype, device=image.device).permute(0, 3, 1, 2)
            return torch.addcmul(self.shift, image.permute(0, 3, 1, 2), self.scale, out=normalised)
        return image.to(dtype)


class _Graph:
    """The network for one shape of input as a CUDA graph between static buffers, pinned on the host's side.

    With `in_place` the result is not copied to the host: what each call gives lies on the device.

    Nothing of cuBLAS may lie inside: its workspace belongs to the stream, and PyTorch frees it when any graph of that
    stream goes.
    """

    def __init__(self, network: FusedDeployment, image: Tensor, pool: Any, *, in_place: bool = False) -> None:
        """`image` is a first input, on the host; the current stream captures and replays.

        `pool` is the memory of all graphs of a backend: only one of them runs at a time, and leaves nothing there.
        """
        self._in_place = in_place
        self._stream = torch.cuda.current_stream()
        self._host_image = _pinned(image).copy_(image)
        with _capturing, exact_float32(benchmark=True):
            on_device = self._host_image.to(network.mean.device)
            _choose_convolutions(network, on_device)
            for _ in range(_WARM_UP):
                result = network(on_device)
            self._result = result if in_place else _pinned(result)
            self._graph = torch.cuda.CUDAGraph()
            # "thread_local": work of other threads, on streams of their own, goes on meanwhile.
            with torch.cuda.graph(self._graph, pool, stream=self._stream, capture_error_mode="thread_local"):
                on_device.copy_(self._host_image, non_blocking=True)
                if in_place:
                    self._result = network(on_device)  # as long as it is held, no other graph writes there
                else:
                    self._result.copy_(network(on_device), non_blocking=True)
        self._device_image = on_device  # the graph reads its memory

    def __call__(self, image: Tensor) -> Tensor:
        self._host_image.copy_(image)
        self._graph.replay()
        if not self._in_place:
            self._stream.synchronize()
        result = self._result.clone()  # on the device, the stream does that, too
        if self._in_place:
            self._stream.synchronize()
        return result


def _choose_convolutions(network: FusedDeployment, image: Tensor) -> None:
    """As `choose_convolutions`, which takes half a minute for a new shape: what it chose is remembered by GPU, driver
    and versions."""
    facts = _facts(image.device)
    if facts is None:
        choose_convolutions(network, image)
        return
    file = memory.place("convolutions", facts, ("agln-fast", "torch", "triton"))
    known = _remembered(file)
    before = len(known)
    choose_convolutions(network, image, known=known)
    if len(known) > before:
        memory.remember(file, _remembered(file) | known)  # others may have chosen for other shapes meanwhile


def _facts(device: torch.device) -> dict[str, Any] | None:
    """What a choice of convolutions depends on beside versions of packages; None where there is none to make."""
    if device.type != "cuda":
        return None
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": torch.cuda.get_device_capability(device),
        "driver": [gpu.driver for gpu in gpus()],
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
    }


def _remembered(file: Path) -> dict[str, str]:
    found = memory.recall(file)
    return {job: way for job, way in found.items() if way in WAYS} if isinstance(found, dict) else {}


def _pinned(like: Tensor) -> Tensor:
    """Host memory that the GPU copies to and from by itself."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


class FusedEngine(NetworkEngine):
    """Runs a network that is in memory, fused (`agln_fast.fuse`), in one precision throughout, with TF32 off.

    On CUDA, a graph is captured for each shape of input, from a pinned image to pinned labels: both copies,
    normalisation and argmax lie inside. The shapes used last are kept. Each backend has a stream of its own, so that
    several run side by side.

    Sums, energies and softmaxes are float32 in every precision. CPUs without half-precision arithmetic emulate it:
    slow, but rounded alike. The network given is not changed.
    """

    name = "fused"

    def _deploy(self, network: SegmentationNetwork, contract: IOContract) -> FusedDeployment:
        self._programs: OrderedDict[tuple[torch.Size, torch.dtype, bool], Callable[[Tensor], Tensor]] = OrderedDict()
        self._stream: torch.cuda.Stream | None = None
        if self._device.type == "cuda":
            if obstacle := gpu_obstacle(self.device):
                raise BackendError(f"fused cannot use device {self.device!r}: {obstacle}")
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()
        fused = fuse(network).to(self._device, dtype_of(self.precision))
        deployed = FusedDeployment(fused, contract, network.config.num_classes)
        if self._stream is not None:  # the weights were made on another one
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return deployed

    def _forward(self, image: Tensor, *, in_place: bool) -> Tensor:
        reader = None if self._stream is None else torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            key = image.shape, image.dtype, in_place
            program = self._programs.pop(key, None) or self._prepare(image, in_place)
            self._programs[key] = program
            result = program(image)
        if result.is_cuda and reader is not None:
            result.record_stream(reader)  # its memory is this stream's, and the caller reads it on another one
        return result

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """The network is of the right type already."""
        with exact_float32(), torch.cuda.stream(self._stream):
            yield

    def _prepare(self, image: Tensor, in_place: bool) -> Callable[[Tensor], Tensor]:
        """The program for images of one shape; the one used least recently goes first, so that its memory is free."""
        network = cast(FusedDeployment, self._network)
        wanted = network.contract.input_shape
        dtype = torch.uint8 if network.contract.layout == "uint8_nhwc" else torch.float32
        if tuple(image.shape[1:]) != wanted[1:] or image.dtype != dtype:
            raise BackendError(f"image of {image.dtype} {tuple(image.shape)}: the engine takes {wanted} of {dtype}")
        while len(self._programs) >= _PROGRAMS:
            self._programs.popitem(last=False)
        if self._stream is None:
            return exact_float32()(network)
        return _Graph(network, image, self._pool, in_place=in_place)

    def _release(self) -> None:
        self._programs.clear()
        super()._release()
