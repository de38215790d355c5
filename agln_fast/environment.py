"""Every environment variable that agln-fast reads, and nothing else does (docs/environment.md lists them)."""

from __future__ import annotations

import os

from agln_fast.errors import ConfigError

__all__ = ["default_threads", "max_pixels"]


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


def _positive(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"environment variable {name}={text!r}: must be a positive whole number")
    return int(text)
