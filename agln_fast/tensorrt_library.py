"""The packages of TensorRT and TensorRT-RTX, and what is known of them without a GPU. It loads without PyTorch."""

from __future__ import annotations

import importlib
import logging
import tempfile
import threading
from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from agln_fast import environment
from agln_fast.errors import BackendError, ConfigError, MissingPackageError, choose

__all__ = [
    "RTX_CAPABILITIES",
    "Flavour",
    "check_rtx_capabilities",
    "import_library",
    "library_version",
    "load_layers",
    "shared_logger",
]

Flavour = Literal["tensorrt", "tensorrt-rtx"]

RTX_CAPABILITIES = ("sm80", "sm86", "sm89", "sm120")
"""What TensorRT-RTX engines are built for. TensorRT-RTX does not serve sm90 and sm100; TensorRT does."""

_RTX_SUPPORTED = ("sm75", *RTX_CAPABILITIES, "sm121")
_DATA_CENTRE = ("sm90", "sm100", "sm103")

_LAYER = "AttentionPool", "1", "agln"  # one of ours: name, version, namespace
_loading = threading.Lock()

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


def load_layers(library: Any, data: bytes) -> None:
    """Register our layers, whose library `data` is, in `library`, for this process; once.

    Raises:
        BackendError: it cannot be loaded.
    """
    registry = library.get_plugin_registry()

    def are_there() -> bool:
        return registry.get_creator(*_LAYER) is not None

    with _loading:
        if are_there():
            return
        # What is loaded are the bytes that were checked, not what lies under a name by now.
        with tempfile.NamedTemporaryFile(prefix="agln_layers_", suffix=".so") as file:
            file.write(data)
            file.flush()
            environment.let_layers_be_asked_for()
            registry.load_library(file.name)
        if not are_there():
            reason = shared_logger(library).last_error
            raise BackendError(f"{library.__name__} cannot load the library of our layers: {reason}")


def shared_logger(library: Any) -> Any:
    """The `ILogger` for all uses of `library` in this process; it forwards to the Python logger "agln_fast.tensorrt".

    It keeps the latest hundred messages in each of `errors` and `warnings`, until `clear()`; `last_error` is one line.
    """
    # While one of its objects lives, the library itself keeps to the first logger and ignores all others, so a logger
    # for each build or engine would be silent, or be freed while it is still in use.
    return _logger(library.ILogger)


@cache
def _logger(interface: Any) -> Any:
    levels = {
        interface.Severity.INTERNAL_ERROR: logging.ERROR,
        interface.Severity.ERROR: logging.ERROR,
        interface.Severity.WARNING: logging.WARNING,
        interface.Severity.INFO: logging.INFO,
        interface.Severity.VERBOSE: logging.DEBUG,
    }
    python_logger = logging.getLogger("agln_fast.tensorrt")
    # Without any handler Python prints warnings to standard error; here they come back in results and errors.
    python_logger.addHandler(logging.NullHandler())

    class Logger(interface):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=100)
            self.warnings: deque[str] = deque(maxlen=100)

        def log(self, severity: Any, message: str) -> None:
            level = levels[severity]
            python_logger.log(level, "%s", message)
            if level == logging.ERROR:
                self.errors.append(message)
            elif level == logging.WARNING:
                self.warnings.append(message)

        def clear(self) -> None:
            self.errors.clear()
            self.warnings.clear()

        @property
        def last_error(self) -> str:
            return " ".join(self.errors[-1].split()) if self.errors else "the library gave no reason"

    return Logger()


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
