"""The packages of TensorRT and TensorRT-RTX, and what is known of them without a GPU. It loads without PyTorch."""

from __future__ import annotations

import importlib
from typing import Any, Literal

from agln_fast.errors import BackendError, MissingPackageError

__all__ = ["RTX_CAPABILITIES", "Flavour", "import_library", "library_version"]

Flavour = Literal["tensorrt", "tensorrt-rtx"]

RTX_CAPABILITIES = ("sm80", "sm86", "sm89", "sm120")
"""What TensorRT-RTX engines are built for. TensorRT-RTX does not serve sm90 and sm100; TensorRT does."""

_HINTS: dict[Flavour, str] = {
    "tensorrt": "its full libraries come only from NVIDIA's own package index: where that is out of reach, "
    "a plain pip install fails",
    "tensorrt-rtx": "",
}


def import_library(flavour: Flavour) -> Any:
    """Import and return the Python package of `flavour`.

    Raises:
        MissingPackageError: it is not installed.
        BackendError: it is installed and does not load.
    """
    name = flavour.replace("-", "_")
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise MissingPackageError(name, flavour, _HINTS[flavour]) from None
        reason = " ".join(str(error).split())
        raise BackendError(f'package "{name}" is installed but does not load: {reason}') from error


def library_version(flavour: Flavour) -> str | None:
    """The version of the library of `flavour`, e.g. "1.7.1.116"; None where it cannot be imported."""
    try:
        return str(import_library(flavour).__version__)
    except BackendError:
        return None
