"""Contestants of a race in turns, so that a machine that slows down is as slow for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

__all__ = ["rounds"]

_REST_S = 0.2  # threads of other libraries may spin for a while after a run, and take a core from the next contestant


def rounds(runs: Sequence[Callable[[], object]], rest_s: float | None = None) -> Iterator[list[float]]:
    """Call each of `runs` once a round, and yield the seconds that they took; round after round, without an end.

    `rest_s`: seconds of rest before each run; None for enough, whoever runs.
    """
    rest_s = _REST_S if rest_s is None else rest_s
    while True:
        seconds = []
        for run in runs:
            time.sleep(rest_s)
            before = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - before)
        yield seconds
