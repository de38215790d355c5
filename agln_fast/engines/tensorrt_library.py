"""The packages of TensorRT and TensorRT-RTX, and what is known of them without a GPU. It loads without PyTorch."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Literal

from agln_fast.errors import BackendError, ConfigError, MissingPackageError, choose

__all__ = ["RTX_CAPABILITIES", "Flavour", "check_rtx_capabilities", "import_library", "library_version"]

Flavour = Literal["tensorrt", "tensorrt-rtx"]

RTX_CAPABILITIES = ("sm80", "sm86", "sm89", "sm120")
"""What TensorRT-RTX engines are built for. TensorRT-RTX does not serve sm90 and sm100; TensorRT does."""

_RTX_SUPPORTED = ("sm75", *RTX_CAPABILITIES, "sm121")
_DATA_CENTRE = ("sm90", "sm100", "sm103")

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


def check_rtx_capabilities(asked: Sequence[str]) -> tuple[str, ...]:
    """The compute capabilities that an engine of tensorrt-rtx is built for; none asked for means `RTX_CAPABILITIES`.

    Raises:
        ConfigError: an unknown one, or one that tensorrt-rtx does not serve.
    """
    for capability in asked:
        if capability in _DATA_CENTRE:
            raise ConfigError(f"compute capability {capability!r}: tensorrt-rtx does not serve it, tensorrt does")
        choose("compute capability", capability, _RTX_SUPPORTED)
    return tuple(dict.fromkeys(asked)) or RTX_CAPABILITIES
