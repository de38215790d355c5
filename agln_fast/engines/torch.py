"""Backend `torch`: the reference network itself, of a bundle or in memory, on the CPU or a CUDA device."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar, cast

import torch
from torch import Tensor

from agln_fast.bundle import Bundle
from agln_fast.contract import IOContract, Precision
from agln_fast.deployment import DeployedNetwork
from agln_fast.engines.base import Array, Backend
from agln_fast.errors import BackendError, BundleError
from agln_fast.forking import use_threads
from agln_fast.manifest import EngineRecord
from agln_fast.models.checkpoint import load_weights
from agln_fast.models.networks import SegmentationNetwork

__all__ = ["NetworkBackend", "TorchBackend", "exact_float32", "network_of"]

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}
_NO_INT8 = "{} has no int8, which is for OpenVINO: take fp32, bf16 or fp16"


_guard = threading.Lock()
_users = 0
_restore = ExitStack()


def _forget_other_threads() -> None:
    """In a forked process: whoever held the guard, or was in `exact_float32`, is not here to leave it."""
    global _guard, _users
    _guard = threading.Lock()
    if _users:
        _users = 0
        _restore.close()


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_forget_other_threads)


@contextmanager
def exact_float32(*, benchmark: bool = False) -> Iterator[None]:
    """float32 is float32, not TF32 or bfloat16, and sums of half precision are float32, whatever the process has set.

    PyTorch's settings hold for the whole process. Threads may be in here together: the first one changes the settings,
    the last one puts them back. `benchmark`: cuDNN times its algorithms.
    """
    global _users, _restore
    with _guard:
        if _users == 0:
            _restore = _set_exact()
        _users += 1
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = before or benchmark
    try:
        yield
    finally:
        with _guard:
            torch.backends.cudnn.benchmark = before
            _users -= 1
            if _users == 0:
                _restore.close()


def _set_exact() -> ExitStack:
    """Change the settings; closing the result puts them back."""
    stack = ExitStack()
    stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    torch.set_float32_matmul_precision("highest")
    for name in ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction"):
        stack.callback(setattr, torch.backends.cuda.matmul, name, getattr(torch.backends.cuda.matmul, name))
        setattr(torch.backends.cuda.matmul, name, False)
    stack.enter_context(torch.backends.cudnn.flags(enabled=True, allow_tf32=False))
    return stack


class NetworkBackend(Backend):
    """Runs a network that is in memory in eager PyTorch, with TF32 off. `threads` holds for the whole process."""

    name: ClassVar[str] = "torch"

    @classmethod
    def obstacle(cls, engine: EngineRecord) -> str | None:
        return _NO_INT8.format(cls.name) if engine.precision == "int8" else None

    def __init__(
        self,
        network: SegmentationNetwork,
        contract: IOContract,
        *,
        precision: Precision = "fp32",
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        """
        Args:
            network: used as it is, not copied; moved to `device` and put into eval mode.
            precision: "fp32", or "fp16" and "bf16" under `torch.autocast`, which CPUs without such arithmetic emulate:
                slow, but rounded alike.
            device: None for the backend's own.

        Raises:
            BackendError: it cannot run on that device, or not in that precision.
        """
        if precision == "int8":
            raise BackendError(_NO_INT8.format(self.name))
        use_threads(threads)
        self.device = device or self.default_device()
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

    @torch.inference_mode()
    def _run(self, image: Array) -> Array:
        use_threads()  # perhaps another thread than the one that loaded
        try:
            return cast(Array, self._forward(torch.from_numpy(image)).numpy())
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise BackendError(
                f"{self.name} failed on {self.device} with an image of {image.shape}: {reason}"
            ) from error

    def _forward(self, image: Tensor) -> Tensor:
        """From host to host."""
        autocast = torch.autocast(
            self._device.type, _AUTOCAST.get(self.precision), enabled=self.precision in _AUTOCAST, cache_enabled=False
        )
        with exact_float32(), autocast:
            return cast(Tensor, self._network(image.to(self._device)).cpu())

    def _release(self) -> None:
        del self._network


def network_of(bundle: Bundle, file: str, threads: int | None) -> SegmentationNetwork:
    """The network whose weights are the file of that name in the bundle, read with so many threads; see `use_threads`.

    Raises:
        BackendError: more threads than there may be.
        BundleError: it is not the one that the manifest describes, or not as it was when the bundle was opened.
        CheckpointError: the file holds no weights.
    """
    use_threads(threads)
    name = str(bundle.path / file)
    network = load_weights(bundle.read(file), name)
    if network.config != bundle.manifest.model:
        raise BundleError(f"{name}: holds the weights of another network than the manifest says; build it again")
    return network


class TorchBackend(NetworkBackend):
    """Runs the bundle's weights as they are, without rewrites."""

    def __init__(self, bundle: Bundle, engine: EngineRecord, *, device: str | None, threads: int | None) -> None:
        network, precision = network_of(bundle, engine.file, threads), cast(Precision, engine.precision)
        super().__init__(network, bundle.manifest.contract, precision=precision, device=device, threads=threads)
