"""What a figure of features may be asked for, checked without the network: it loads without PyTorch."""

from __future__ import annotations

from agln_fast.errors import ConfigError

__all__ = ["LEVELS", "check_index", "check_panels"]

LEVELS = 3
"""Of every decoder of the family: 1/16, 1/8 and 1/4 of the image."""

_MOST_PANELS = 12


def check_index(name: str, index: int, count: int) -> int:
    """`index` from the front, 0..count - 1.

    Raises:
        ConfigError: out of range.
    """
    if not -count <= index < count:
        raise ConfigError(f"{name} {index}: there are {count}, 0..{count - 1} (or -1 for the last)")
    return index % count


def check_panels(descriptors: int, channels: int) -> None:
    """
    Raises:
        ConfigError: more panels of a kind than 12, or none.
    """
    for name, count in (("descriptors", descriptors), ("channels", channels)):
        if not 1 <= count <= _MOST_PANELS:
            raise ConfigError(f"{name} {count}: must be from 1 to {_MOST_PANELS}")
