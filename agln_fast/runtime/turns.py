"""Contestants of a race in turns, so that a machine that slows down is as slow for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

__all__ = ["rounds"]

_REST_S = 0.02  # threads of OpenMP spin for a while after a run, and would take a core from the next contestant


def rounds(runs: Sequence[Callable[[], object]]) -> Iterator[list[float]]:
    """Call each of `runs` once a round, and yield the seconds that they took; round after round, without an end."""
    while True:
        seconds = []
        for run in runs:
            time.sleep(_REST_S)
            before = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - before)
        yield seconds
