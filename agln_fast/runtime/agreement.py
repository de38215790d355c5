"""How much of an engine's labels must be those of the fp32 reference."""

from __future__ import annotations

from agln_fast.errors import ConfigError

__all__ = ["MINIMUM_AGREEMENT", "check_minimum"]

# fp32 engines differ from the reference by rounding only: plain share of equal labels. Half precision may flip labels
# where two classes are all but tied: share weighted by the margin between them. int8 flips more of them.
MINIMUM_AGREEMENT = {"fp32": 0.999, "fp16": 0.99, "bf16": 0.99, "int8": 0.97}


def check_minimum(min_agreement: float | None) -> None:
    """Refuse an agreement outside 0..1 before any work is done.

    Raises:
        ConfigError: it is.
    """
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise ConfigError(f"min_agreement {min_agreement}: must be from 0 to 1")
