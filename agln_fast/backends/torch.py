"""Backend `torch`: the reference network itself, of a bundle or in memory, on the CPU or a CUDA device."""

from __future__ import annotations

from typing import ClassVar, cast

import torch

from agln_fast.backends.base import Array, Backend
from agln_fast.bundle import Bundle, EngineRecord
from agln_fast.contract import DeployedNetwork, IOContract, Precision
from agln_fast.errors import BackendError
from agln_fast.models.checkpoint import load_checkpoint
from agln_fast.models.networks import SegmentationNetwork

__all__ = ["NetworkBackend", "TorchBackend"]

_AUTOCAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


class NetworkBackend(Backend):
    """Runs a network that is in memory in eager PyTorch, with TF32 off. `threads` holds for the whole process."""

    name: ClassVar[str] = "torch"

    @classmethod
    def obstacle(cls, engine: EngineRecord) -> str | None:
        return None

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
            device: None for "cpu".

        Raises:
            BackendError: it cannot run on that device.
        """
        self.device = device or "cpu"
        self.precision = precision
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            self._device = torch.device(self.device)
            if self._device.type not in ("cpu", "cuda"):
                raise RuntimeError("only cpu and cuda are supported")
            network = network.to(self._device).eval()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise BackendError(
                f"torch cannot use device {self.device!r}: {reason}; `agln-fast doctor` shows more"
            ) from None
        self._network: DeployedNetwork | None = DeployedNetwork(network, contract, network.config.num_classes)

    @torch.inference_mode()
    def run(self, image: Array) -> Array:
        assert self._network is not None, "the backend is closed"
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        autocast = torch.autocast(
            self._device.type, _AUTOCAST.get(self.precision), enabled=self.precision in _AUTOCAST, cache_enabled=False
        )
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), autocast:
                result = self._network(torch.from_numpy(image).to(self._device))
        finally:
            torch.set_float32_matmul_precision(precision)
        return cast(Array, result.cpu().numpy())

    def close(self) -> None:
        self._network = None


class TorchBackend(NetworkBackend):
    """Runs the bundle's fp32 weights."""

    def __init__(self, bundle: Bundle, engine: EngineRecord, *, device: str | None, threads: int | None) -> None:
        network = load_checkpoint(bundle.path / engine.file)
        super().__init__(network, bundle.manifest.contract, device=device, threads=threads)
