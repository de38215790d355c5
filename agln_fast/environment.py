"""Every environment variable that agln-fast reads, and nothing else does (docs/environment.md lists them)."""

from __future__ import annotations

import os
from pathlib import Path

from agln_fast.errors import ConfigError

__all__ = ["cache_folder", "default_threads", "max_pixels", "tuning_seconds"]


def default_threads() -> int | None:
    """`AGLN_FAST_THREADS`: CPU threads of an engine when none are asked for; unset for the library's own choice.

    Raises:
        ConfigError: not a positive whole number.
    """
    return _positive("AGLN_FAST_THREADS")


def max_pixels() -> int:
    """`AGLN_FAST_MAX_PIXELS`: largest image, width x height, that is decoded; 89,478,485 unless set.

    The default, 256 MiB as 24-bit RGB, is where Pillow, too, suspects a decompression bomb.

    Raises:
        ConfigError: not a positive whole number.
    """
    return _positive("AGLN_FAST_MAX_PIXELS") or 89_478_485


def tuning_seconds() -> float:
    """`AGLN_FAST_TUNE_SECONDS`: wall clock to choose an engine's plan in; 120 unless set, 0 to time nothing.

    Raises:
        ConfigError: not a whole number.
    """
    if os.environ.get("AGLN_FAST_TUNE_SECONDS") == "0":
        return 0.0
    return float(_positive("AGLN_FAST_TUNE_SECONDS") or 120)


def cache_folder() -> Path:
    """`AGLN_FAST_CACHE`: where measurements are remembered; ~/.cache/agln-fast unless set."""
    return Path(os.environ.get("AGLN_FAST_CACHE") or Path.home() / ".cache" / "agln-fast")


def _positive(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"environment variable {name}={text!r}: must be a positive whole number")
    return int(text)
