"""PyAV, which brings FFmpeg along: imported where it is used, and its errors in our words."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from agln_fast.errors import MissingPackageError, printable
from agln_fast.telemetry import import_quietly

__all__ = ["check_library", "library", "reason"]


def check_library() -> None:
    """
    Raises:
        MissingPackageError: PyAV is not installed.
    """
    if find_spec("av") is None:
        raise MissingPackageError("av", "video")


def library() -> Any:
    """The module `av`.

    Raises:
        MissingPackageError: it is not installed.
    """
    check_library()
    return import_quietly("av")


def reason(error: Exception) -> str:
    """Why FFmpeg failed, without its numbers."""
    return printable(getattr(error, "strerror", None) or error)
