"""What a video is made from: frames with their times."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from types import TracebackType
from typing import Any, Self

from agln_fast.runtime.images import ImageArray
from agln_fast.video.selection import Selection

__all__ = ["Colours", "Frame", "Source"]


@dataclass(frozen=True)
class Colours:
    """How the samples of a video are to be read, by FFmpeg's numbers; 2 is "not said", which players guess."""

    matrix: int = 2
    primaries: int = 2
    transfer: int = 2


@dataclass(frozen=True)
class Frame:
    """One upright frame.

    image: (H, W, 3) uint8 RGB. index: its place in the source, from 0. time: in the output, s. duration: s, 0 if it is
    not known. sound: packets (PyAV) of the source's audio that came before it, in the output's time.
    """

    image: ImageArray
    index: int
    time: Fraction
    duration: Fraction = Fraction(0)
    sound: tuple[Any, ...] = field(default=(), repr=False)


class Source(ABC):
    """Frames, once, in one thread; another may `stop` it. Use it in a `with` statement.

    name: for messages. rate, total: frames a second, and in all, about; None if nobody knows. time_base: of which times
    are multiples, s. aspect: of a pixel, width / height; None for square. audio: streams (PyAV) that `Frame.sound`
    belongs to. So far: damaged, how many frames were skipped because they could not be decoded; damage, why the first
    could not; broken, why reading ended early.
    """

    name: str
    rate: Fraction | None
    total: int | None
    time_base: Fraction
    aspect: Fraction | None = None
    colours: Colours = Colours()
    audio: tuple[Any, ...] = ()
    damaged: int = 0
    damage: str | None = None
    broken: str | None = None

    def __init__(self) -> None:
        self._stopped = threading.Event()

    @abstractmethod
    def frames(self, selection: Selection) -> Iterator[Frame]:
        """Those that are wanted; what cannot be decoded is counted and skipped."""

    def last_sound(self) -> tuple[Any, ...]:
        """Packets that came after the last frame."""
        return ()

    def _skip(self, why: str) -> None:
        self.damaged += 1
        self.damage = self.damage or why

    def stop(self) -> None:
        """Let `frames` end with the one that it is at."""
        self._stopped.set()

    def close(self) -> None:
        """Release what it holds, when nobody is in `frames` any more."""
        self.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
