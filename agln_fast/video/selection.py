"""Which frames of a source are wanted."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from agln_fast.errors import ConfigError, printable

__all__ = ["Selection", "parse_frames", "parse_rate"]

_ROUNDING = Fraction(1, 1000)  # s; Matroska rounds times to milliseconds


@dataclass(frozen=True)
class Selection:
    """Frames `start` up to but not including `stop` (None: to the end), of these each `every`th.

    fps: at most so many a second: the others are dropped, and none is repeated; None for all.
    seconds: so long from the first wanted one on; None for no limit.

    Raises:
        ConfigError: a value makes no sense.
    """

    start: int = 0
    stop: int | None = None
    every: int = 1
    fps: Fraction | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"every {self.every}: must be at least 1")
        if self.seconds is not None and not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise ConfigError(f"seconds {self.seconds}: must be above 0")

    def chooser(self) -> Callable[[int, Fraction], bool | None]:
        """A function of a frame's index, from 0, and its time, s: whether it is wanted; None from the end on."""
        began: Fraction | None = None
        slot = -1
        limit = None if self.seconds is None else Fraction(str(self.seconds))  # 0.4 as it is written

        def wanted(index: int, time: Fraction) -> bool | None:
            nonlocal began, slot
            if self.stop is not None and index >= self.stop:
                return None
            if index < self.start:
                return False
            began = time if began is None else began
            if limit is not None and time - began >= limit:
                return None
            if (index - self.start) % self.every:
                return False
            if self.fps is not None:
                at = math.floor((time - began + _ROUNDING) * self.fps)
                if at <= slot:
                    return False
                slot = at
            return True

        return wanted

    def count(self, frames: int | None, rate: Fraction | None) -> int | None:
        """About how many are wanted of so many, at a rate of `rate` a second; None if nobody knows."""
        ends = [end for end in (frames, self.stop) if end is not None]
        if self.seconds is not None and rate:
            ends.append(self.start + math.ceil(self.seconds * rate))
        if not ends:
            return None
        share = min(Fraction(1, self.every), self.fps / rate if self.fps and rate else Fraction(1))
        return math.ceil(max(0, min(ends) - self.start) * share)


def parse_frames(text: str) -> tuple[int, int | None]:
    """`A:B` as in Python's slices, from 0 and without B; either may be left out.

    Raises:
        ConfigError: something else, or no frame at all.
    """
    match = re.fullmatch(r"(\d{0,15}):(\d{0,15})", text)
    if match is None:
        raise ConfigError(f"frames {printable(repr(text))}: give A:B, from frame A up to but not including B, from 0")
    start, stop = int(match[1] or 0), int(match[2]) if match[2] else None
    if stop is not None and stop <= start:
        raise ConfigError(f"frames {text}: holds none; B must be above A")
    return start, stop


def parse_rate(text: str) -> Fraction:
    """Frames a second: `25`, `29.97`, `30000/1001`.

    Raises:
        ConfigError: something else, or not from 0.001 to 1000.
    """
    try:
        rate = Fraction(text)
    except (ValueError, ZeroDivisionError):
        rate = Fraction(0)
    if not Fraction(1, 1000) <= rate <= 1000:
        shown = printable(repr(text))
        raise ConfigError(f"fps {shown}: give frames a second from 0.001 to 1000, such as 25 or 30000/1001")
    return rate.limit_denominator(100_000)
