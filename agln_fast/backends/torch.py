"""Backend `torch`: the reference network itself, on the CPU or a CUDA device."""

from __future__ import annotations

from typing import ClassVar, cast

import torch

from agln_fast.backends.base import Array, Backend
from agln_fast.bundle import Bundle, EngineRecord
from agln_fast.contract import DeployedNetwork
from agln_fast.errors import BackendError
from agln_fast.models.checkpoint import load_checkpoint

__all__ = ["TorchBackend"]


class TorchBackend(Backend):
    """Runs the bundle's fp32 weights in eager PyTorch, with TF32 off. `threads` holds for the whole process."""

    name: ClassVar[str] = "torch"

    @classmethod
    def obstacle(cls, engine: EngineRecord) -> str | None:
        return None

    def __init__(self, bundle: Bundle, engine: EngineRecord, *, device: str | None, threads: int | None) -> None:
        self.device = device or "cpu"
        self.precision = "fp32"
        if threads is not None:
            torch.set_num_threads(threads)
        try:
            self._device = torch.device(self.device)
            if self._device.type not in ("cpu", "cuda"):
                raise RuntimeError("only cpu and cuda are supported")
            network = load_checkpoint(bundle.path / engine.file).to(self._device)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise BackendError(
                f"torch cannot use device {self.device!r}: {reason}; `agln-fast doctor` shows more"
            ) from None
        manifest = bundle.manifest
        self._network: DeployedNetwork | None = DeployedNetwork(network, manifest.contract, manifest.model.num_classes)

    @torch.inference_mode()
    def run(self, image: Array) -> Array:
        assert self._network is not None, "the backend is closed"
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                result = self._network(torch.from_numpy(image).to(self._device))
        finally:
            torch.set_float32_matmul_precision(precision)
        return cast(Array, result.cpu().numpy())

    def close(self) -> None:
        self._network = None
