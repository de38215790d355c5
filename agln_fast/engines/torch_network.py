"""What runs a network in eager PyTorch, on the CPU or a CUDA device: the engine of kind `torch`."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from agln_fast.artefact import Artefact
from agln_fast.contract import IOContract
from agln_fast.deployment import DeployedNetwork
from agln_fast.engines.base import Array, Engine
from agln_fast.errors import BackendError, BundleError
from agln_fast.forking import use_threads
from agln_fast.models.checkpoint import load_weights
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.watch import watching
from agln_fast.precision import PRECISIONS, Precision

__all__ = ["NetworkEngine", "dtype_of", "exact_float32", "network_of"]


_guard = threading.Lock()
_users = 0
_timing = 0  # of the users, those that let cuDNN time its algorithms
_timed_before = False  # what the process lets it do
_restore = ExitStack()


def _forget_other_threads() -> None:
    """In a forked process: whoever held the guard, or was in `exact_float32`, is not here to leave it."""
    global _guard, _users, _timing
    _guard = threading.Lock()
    if _users:
        _users = _timing = 0
        _restore.close()


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_forget_other_threads)


@contextmanager
def exact_float32(*, benchmark: bool = False) -> Iterator[None]:
    """float32 is float32, not TF32 or bfloat16, and sums of half precision are float32, whatever the process has set.

    PyTorch's settings hold for the whole process. Threads may be in here together: the first one changes the settings,
    the last one puts them back. `benchmark`: cuDNN times its algorithms, as long as anyone is here who asks for it.
    """
    global _users, _timing, _timed_before, _restore
    with _guard:
        if _users == 0:
            _timed_before = torch.backends.cudnn.benchmark
            _restore = _set_exact()
        _users += 1
        _timing += benchmark
        torch.backends.cudnn.benchmark = _timed_before or _timing > 0
    try:
        yield
    finally:
        with _guard:
            _users -= 1
            _timing -= benchmark
            torch.backends.cudnn.benchmark = _timed_before or _timing > 0
            if _users == 0:
                _restore.close()


def _set_exact() -> ExitStack:
    """Change the settings; closing the result puts them back. Where one cannot be changed, none is."""
    backends: Any = torch.backends  # some of it has no types
    operations = backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv
    with ExitStack() as stack:
        for operation in operations:  # which the older settings change, too, and do not put back
            stack.callback(setattr, operation, "fp32_precision", operation.fp32_precision)
        changes: list[tuple[Any, str, object]] = [
            (backends.cudnn, "allow_tf32", False),
            (backends.mkldnn.conv, "fp32_precision", "ieee"),  # of which the older settings know nothing
        ]
        try:
            older, _ = torch.get_float32_matmul_precision(), backends.cudnn.allow_tf32
        except RuntimeError:  # the process has used the newer settings, and PyTorch refuses to mix them
            changes = [(operation, "fp32_precision", "ieee") for operation in operations]
        else:
            stack.callback(torch.set_float32_matmul_precision, older)
            torch.set_float32_matmul_precision("highest")
        changes += [
            (backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", False),
            (backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
            (backends.cudnn, "enabled", True),
        ]
        for owner, name, value in changes:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        return stack.pop_all()


def dtype_of(precision: Precision) -> torch.dtype:
    """PyTorch's type of the numbers of `precision`."""
    return cast(torch.dtype, getattr(torch, PRECISIONS[precision].torch))


class NetworkEngine(Engine):
    """Runs a network that is in memory in eager PyTorch, with TF32 off. `threads` holds for the whole process."""

    name = "torch"

    def __init__(
        self,
        network: SegmentationNetwork,
        contract: IOContract,
        *,
        precision: Precision = "fp32",
        device: str = "cpu",
        threads: int | None = None,
    ) -> None:
        """
        Args:
            network: used as it is, not copied; moved to `device` and put into eval mode.
            precision: "fp32", or "fp16" and "bf16" under `torch.autocast`, which CPUs without such arithmetic emulate:
                slow, but rounded alike.

        Raises:
            BackendError: it cannot run on that device.
        """
        use_threads(threads)
        self.device = device
        self.precision = precision
        try:
            self._device = torch.device(self.device)
            if self._device.type not in ("cpu", "cuda"):
                raise RuntimeError("only cpu and cuda are supported")
            self._network = self._deploy(network, contract)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise BackendError(
                f"{self.name} cannot use device {self.device!r}: {reason}; `agln-fast doctor` shows more"
            ) from None

    def _deploy(self, network: SegmentationNetwork, contract: IOContract) -> DeployedNetwork:
        return DeployedNetwork(network.to(self._device).eval(), contract, network.config.num_classes)

    def _run(self, image: Array) -> Array:
        return cast(Array, self._checked(image, in_place=False).contiguous().numpy())

    def _run_in_place(self, image: Array) -> Any:
        return self._run(image) if self._device.type == "cpu" else self._checked(image, in_place=True)

    @torch.inference_mode()
    def _checked(self, image: Array, *, in_place: bool) -> Tensor:
        """`_forward`, whose errors become ours."""
        use_threads()  # perhaps another thread than the one that loaded
        try:
            return self._forward(torch.from_numpy(image), in_place=in_place)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise BackendError(
                f"{self.name} failed on {self.device} with an image of {image.shape}: {reason}"
            ) from error

    @torch.inference_mode()
    def run_blocks(self, image: Array) -> dict[str, Array]:
        """What each block of the network gives for one batch, as it runs for `run`, but for a CUDA graph."""
        use_threads()
        with self._gate.turn(), watching(self._network.network, _values) as found, self._arithmetic():
            self._network(torch.from_numpy(image).to(self._device))
        return found

    def _forward(self, image: Tensor, *, in_place: bool) -> Tensor:
        """From the host to the host, or with `in_place` to the device."""
        with self._arithmetic():
            result = cast(Tensor, self._network(image.to(self._device)))
        return result if in_place else result.cpu()

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """What the network runs in."""
        half = PRECISIONS[self.precision].half
        dtype = dtype_of(self.precision) if half else None
        with exact_float32(), torch.autocast(self._device.type, dtype, enabled=half, cache_enabled=False):
            yield

    def _release(self) -> None:
        del self._network


def _values(x: Tensor) -> Array:
    """On the host, at least float32: NumPy has no bfloat16."""
    return x.to("cpu", torch.promote_types(x.dtype, torch.float32), copy=True).numpy()


def network_of(artefact: Artefact, threads: int | None) -> SegmentationNetwork:
    """The network whose weights the artefact is, read with so many threads; see `use_threads`.

    Raises:
        BackendError: more threads than there may be.
        BundleError: it is not the one that the artefact says, or not as it was when the bundle was opened.
        CheckpointError: the file holds no weights.
    """
    use_threads(threads)
    name = str(artefact.file)
    network = load_weights(artefact.read(artefact.file), name)
    if network.config != artefact.model:
        raise BundleError(f"{name}: holds the weights of another network than the manifest says; build it again")
    return network
