"""Engine libraries report on their use, unasked. Here they are imported with that switched off.

    onnxruntime   uploads events, and keeps a device identifier below the home folder; its switch is the variable
                  ORT_DISABLE_TELEMETRY, which it reads once, when it loads
    openvino      sends an event when it is imported, and keeps an identifier below the home folder, by the package
                  openvino_telemetry; has a stub for where that is not installed
    nncf          the same at each quantisation

`AGLN_FAST_ALLOW_TELEMETRY=1` leaves the libraries as they are. So does a program that imports one itself, earlier.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from agln_fast import environment

__all__ = ["import_quietly"]

_REPORTER = "openvino_telemetry"
_lock = threading.Lock()


def import_quietly(library: str) -> Any:
    """The module `library`, one of those above or another.

    Raises:
        ImportError: it is not installed.
    """
    if environment.allow_telemetry() or library in sys.modules:
        return import_module(library)
    environment.forbid_reports()
    with _absent(_REPORTER):
        return import_module(library)


@contextmanager
def _absent(package: str) -> Iterator[None]:
    """Let imports of `package` fail inside the block, as if it were not installed."""
    with _lock:
        before = sys.modules.get(package)
        sys.modules[package] = None  # type: ignore[assignment]  # how the import system is told so
        try:
            yield
        finally:
            del sys.modules[package]
            if before is not None:
                sys.modules[package] = before
