"""Images through the steps of a segmenter, the steps side by side: one thread reads, one runs the engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

__all__ = ["Steps", "side_by_side"]

S = TypeVar("S")
P = TypeVar("P")
O = TypeVar("O")  # noqa: E741  # output, between prepared and finished
R = TypeVar("R")


@dataclass(frozen=True)
class Steps(Generic[S, P, O, R]):
    """How a source becomes a result: prepare each, run 1 to `most` of what was prepared at once, finish each output."""

    prepare: Callable[[S], P]
    run: Callable[[list[P]], Iterable[O]]
    finish: Callable[[O], R]
    most: int


def side_by_side(sources: Iterator[S], steps: Steps[S, P, O, R], *, in_flight: int) -> Generator[R, None, None]:
    """`finish` of `run` of `prepare` of each source, in order.

    Sources are taken and prepared in one thread, batches run in another, and the caller's finishes. A run takes what is
    prepared by then, 1 to `steps.most`, and waits for no more: a slow source is not delayed, a fast one fills batches.

    At most `in_flight` sources have been taken whose results the caller has not asked to go on from. What a step or the
    source raises is raised in its place, behind the results before it, and ends the generator. So does closing it:
    then the threads are waited for, which takes as long as the step that each is in, and as the source if it is asked.
    """
    line: _Line[P, O] = _Line(SimpleQueue(), SimpleQueue(), threading.Semaphore(in_flight), threading.Event())
    # The process may end with a generator that nobody has closed, and waits for no daemon.
    threads = [
        threading.Thread(target=_prepare, args=(sources, steps.prepare, line), name="agln-fast read", daemon=True),
        threading.Thread(target=_run, args=(steps.run, steps.most, line), name="agln-fast engine", daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        while not isinstance(output := line.outputs.get(), _End):
            result = steps.finish(output)
            del output
            yield result
            del result
            line.permits.release()
        if output.error is not None:
            raise output.error
    finally:
        line.stopped.set()
        line.permits.release()
        line.prepared.put(_End())
        for thread in threads:
            thread.join()


@dataclass(frozen=True)
class _End:
    """Stands behind the last one; error: what ended it."""

    error: BaseException | None = None


@dataclass(frozen=True)
class _Line(Generic[P, O]):
    """What lies between the threads. The permits bound both queues."""

    prepared: SimpleQueue[P | _End]
    outputs: SimpleQueue[O | _End]
    permits: threading.Semaphore
    stopped: threading.Event


def _prepare(sources: Iterator[S], prepare: Callable[[S], P], line: _Line[P, O]) -> None:
    end = _End()
    try:
        while line.permits.acquire() and not line.stopped.is_set():
            try:
                source = next(sources)
            except StopIteration:
                break
            line.prepared.put(prepare(source))
            del source
    except BaseException as error:
        end = _End(error)
    line.prepared.put(end)


def _run(run: Callable[[list[P]], Iterable[O]], most: int, line: _Line[P, O]) -> None:
    end: _End | None = None
    try:
        while end is None:
            batch, end = _batch(line.prepared, most)
            if line.stopped.is_set():
                break
            if batch:
                for output in run(batch):
                    line.outputs.put(output)
    except BaseException as error:
        end = _End(error)
    line.outputs.put(end or _End())


def _batch(prepared: SimpleQueue[P | _End], most: int) -> tuple[list[P], _End | None]:
    """One that is waited for, and those that are there behind it."""
    batch: list[P] = []
    with suppress(Empty):
        while len(batch) < most:
            one = prepared.get_nowait() if batch else prepared.get()
            if isinstance(one, _End):
                return batch, one
            batch.append(one)
    return batch, None
