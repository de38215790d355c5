"""Kind `fused`: the fused network with our kernels, on any CUDA device. These are the facts; `fused_network` runs it.

Without CUDA, it is the same network on the CPU.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from agln_fast.engines.torch import NetworkKind
from agln_fast.precision import Precision

if TYPE_CHECKING:
    from agln_fast.engines.fused_network import FusedEngine

__all__ = ["Fused", "gpu_obstacle"]


def gpu_obstacle(device: str = "cuda") -> str | None:
    """Why the kernels cannot run on a CUDA device that is there, and what to do, or None."""
    if find_spec("triton") is None:
        return "its kernels need Triton, which is not installed: pip install triton (Linux only)"
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"its kernels need a GPU of sm80 or later, and this one is sm{major}{minor}; try backend torch"
    return None


class Fused(NetworkKind):
    """Has rewrites of its own: no plan changes it."""

    name = "fused"
    target = "cuda"
    settings = "one precision throughout, CUDA graph on GPUs"

    def automatic(self) -> tuple[Precision, ...]:
        return ("fp16",)

    def default_device(self) -> str:
        return "cpu" if self.obstacle("fp32", "cuda") else "cuda"

    def _obstacle(self, precision: Precision, where: str) -> str | None:
        return super()._obstacle(precision, where) or (gpu_obstacle() if where == "cuda" else None)

    def _engine(self) -> type[FusedEngine]:
        from agln_fast.engines.fused_network import FusedEngine

        return FusedEngine
