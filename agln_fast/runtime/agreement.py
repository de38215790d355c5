"""How much of an engine's labels must be those of the fp32 reference."""

from __future__ import annotations

from agln_fast.errors import ConfigError

__all__ = ["check_minimum"]


def check_minimum(min_agreement: float | None) -> None:
    """Refuse an agreement outside 0..1 before any work is done.

    Raises:
        ConfigError: it is.
    """
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise ConfigError(f"min_agreement {min_agreement}: must be from 0 to 1")
