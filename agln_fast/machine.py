"""What numbers were measured on."""

from __future__ import annotations

import platform
from importlib.metadata import version
from typing import Any

import torch

__all__ = ["machine"]


def machine(threads: int | None = None) -> dict[str, Any]:
    """Processor, threads, GPU, and versions, as plain JSON types; `threads` of the CPU, None for PyTorch's."""
    found: dict[str, Any] = {
        "cpu": str(torch.cpu.get_capabilities().get("cpu_name", platform.processor())),
        "threads": threads or torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
    }
    for package in ("agln-fast", "torch", "triton", "onnxruntime", "openvino", "nncf", "tensorrt", "tensorrt-rtx"):
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            found[package] = None
    return found
