"""Requests through the steps of a segmenter: some threads read images, one runs the engine, some encode answers."""

from __future__ import annotations

import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from queue import Empty, PriorityQueue
from typing import Any, Generic, TypeVar

from agln_fast.errors import AglnError, BackendError
from agln_fast.runtime.images import ImageSource
from agln_fast.runtime.result import Result
from agln_fast.runtime.stages import Steps
from agln_fast.serving.protocol import Array, check_pixels, sources_of, write_outputs

__all__ = ["Answer", "Failure", "Line", "Task", "Times"]

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """A request: `number` names it; inputs and outputs are the protocol's.

    sent, deadline: seconds of `time.monotonic`, one clock for all processes of a machine; past the deadline nothing of
    it is run any more. urgent: ahead of those that wait.
    """

    number: int
    inputs: Mapping[str, Array | Sequence[bytes]]
    outputs: tuple[str, ...]
    sent: float
    deadline: float = math.inf
    urgent: bool = False


@dataclass(frozen=True)
class Times:
    """Milliseconds that a request waited, was decoded, was in the engine and was encoded; images in the engine's batch.

    Of a request of several images: the longest waiting, the largest batch, and the rest summed.
    """

    queue_ms: float = 0.0
    decode_ms: float = 0.0
    engine_ms: float = 0.0
    encode_ms: float = 0.0
    batch_size: int = 0


@dataclass(frozen=True)
class Failure:
    """Why there are no outputs. status: of HTTP."""

    status: int
    message: str


@dataclass(frozen=True)
class Answer:
    """outputs: the protocol's, or a failure."""

    number: int
    outputs: dict[str, Array] | Failure
    times: Times = Times()


class Line:
    """Takes tasks, and gives an answer to each that is not cancelled, in any order. Close it in the end.

    A run of the engine takes what is prepared by then, up to `steps.most` images, of one task or of several; it waits
    `wait_s` for more, which is worth it only where a larger batch costs little more. Only as many images are decoded
    ahead as fill the next batches: the others wait as the bytes that came.
    """

    def __init__(
        self,
        steps: Steps[ImageSource, Any, Any, Result],
        answer: Callable[[Answer], None],
        *,
        readers: int = 2,
        wait_s: float = 0.0,
    ) -> None:
        """`answer` is called in several threads at once. `readers`: threads that decode, and as many that encode."""
        self._steps, self._answer, self._wait_s = steps, answer, wait_s
        self._inbox, self._prepared = _Queue[_Job](), _Queue[_Image]()
        self._places = threading.Semaphore(2 * steps.most + readers)
        self._jobs: dict[int, _Job] = {}
        self._closed = False
        self._encoders = ThreadPoolExecutor(readers, "agln-fast encode")
        self._threads = [
            threading.Thread(target=self._read, name="agln-fast read", daemon=True) for _ in range(readers)
        ]
        self._threads.append(threading.Thread(target=self._run, name="agln-fast engine", daemon=True))
        for thread in self._threads:
            thread.start()

    def put(self, task: Task) -> None:
        """Take a task."""
        job = self._jobs[task.number] = _Job(task)
        if not task.urgent:
            self._inbox.put(job)
            return
        try:  # here and now: readers may be waiting for a place, and one picture of the engine's size takes no time
            self._open(job)
            for index in range(len(job.sources)):
                self._prepare(job, index)
        except Exception as error:
            self._fail(job, error)

    def cancel(self, number: int) -> None:
        """Nobody waits for that task any more, if it is there still: what has not begun of it is left out."""
        if job := self._jobs.get(number):
            self._end(job)

    def close(self) -> None:
        """End the threads, each after what it is doing; what waits is not answered."""
        self._closed = True
        self._inbox.end(len(self._threads) - 1)
        self._prepared.end(1)
        for _ in self._threads:
            self._places.release()
        for thread in self._threads:
            thread.join()
        self._encoders.shutdown()

    def _read(self) -> None:
        """An image of a job; then the rest of it waits behind other jobs."""
        while (job := self._inbox.get()) is not None:
            try:
                if not job.sources:
                    self._open(job)
                self._places.acquire()
                if self._closed:
                    return
                if self._is_over(job):
                    self._places.release()
                    continue
                try:
                    self._prepare(job, job.read)
                except BaseException:
                    self._places.release()
                    raise
                job.read += 1
                if job.read < len(job.sources):
                    self._inbox.put(job)
            except Exception as error:
                self._fail(job, error)

    def _open(self, job: _Job) -> None:
        job.sources = sources_of(job.task.inputs)
        check_pixels(job.sources)
        job.results = [None] * len(job.sources)

    def _prepare(self, job: _Job, index: int) -> None:
        began = time.monotonic()
        prepared = self._steps.prepare(job.sources[index])
        spent = time.monotonic() - began
        job.decode += spent
        self._prepared.put(_Image(job, index, prepared, spent), job.task.urgent)

    def _give_back(self, images: Sequence[_Image]) -> None:
        """Their places; what is urgent took none."""
        if taken := sum(not image.job.task.urgent for image in images):
            self._places.release(taken)

    def _run(self) -> None:
        while (first := self._prepared.get()) is not None:
            taken = self._fill([first])
            batch = [each for each in taken if not self._is_over(each.job)]
            self._give_back([each for each in taken if each not in batch])
            if not batch:
                continue
            began = time.monotonic()
            try:
                outputs = list(self._steps.run([each.prepared for each in batch]))
            except Exception as error:
                self._give_back(batch)
                for each in batch:
                    self._fail(each.job, error if isinstance(error, AglnError) else BackendError(f"engine: {error}"))
                continue
            spent = time.monotonic() - began
            for job in {id(each.job): each.job for each in batch}.values():
                job.engine += spent
            for each, output in zip(batch, outputs, strict=True):
                each.job.add(len(batch), began - each.job.task.sent - each.spent)
                self._encoders.submit(self._finish, each, output)

    def _fill(self, batch: list[_Image]) -> list[_Image]:
        until = time.monotonic() + (0 if batch[0].job.task.urgent else self._wait_s)
        while len(batch) < self._steps.most:
            try:
                following = self._prepared.get(max(0.0, until - time.monotonic()))
            except Empty:
                break
            if following is None:
                self._prepared.end(1)
                break
            batch.append(following)
        return batch

    def _finish(self, image: _Image, output: Any) -> None:
        job, began = image.job, time.monotonic()
        try:
            if self._is_over(job, deadline=False):
                return
            result = self._steps.finish(output)
            if job.finished(image.index, result, time.monotonic() - began):
                began = time.monotonic()
                outputs = write_outputs(job.results, job.task.outputs)
                job.encode += time.monotonic() - began
                if self._end(job):
                    self._answer(Answer(job.task.number, outputs, job.times()))
        except Exception as error:
            self._fail(job, error)
        finally:
            self._give_back([image])

    def _is_over(self, job: _Job, *, deadline: bool = True) -> bool:
        """Whether it has been answered or cancelled, or is answered now that it is late."""
        if deadline and time.monotonic() > job.task.deadline and self._end(job):
            self._answer(Answer(job.task.number, Failure(504, "the deadline passed before it could be run")))
        return job.ended

    def _fail(self, job: _Job, error: Exception) -> None:
        if not self._end(job):
            return
        if isinstance(error, AglnError):
            status = 500 if isinstance(error, BackendError) else 400
            self._answer(Answer(job.task.number, Failure(status, str(error))))
            return
        traceback.print_exception(error, file=sys.stderr)
        self._answer(Answer(job.task.number, Failure(500, f"{type(error).__name__}: see the server's log")))

    def _end(self, job: _Job) -> bool:
        """Whether it was not yet over: the one who ends it answers."""
        with job.lock:
            ended, job.ended = job.ended, True
        self._jobs.pop(job.task.number, None)
        return not ended


@dataclass
class _Job:
    """A task on its way; seconds."""

    task: Task
    sources: Sequence[ImageSource] = ()
    read: int = 0
    results: list[Any] = field(default_factory=list)
    decode: float = 0.0
    engine: float = 0.0
    waited: float = 0.0
    encode: float = 0.0
    batch: int = 0
    missing: int | None = None
    ended: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, batch: int, waited: float) -> None:
        """One of its images was in a batch."""
        self.batch, self.waited = max(self.batch, batch), max(self.waited, waited)

    def finished(self, index: int, result: Result, seconds: float) -> bool:
        """Whether it was the last of them."""
        with self.lock:
            self.results[index] = result
            self.encode += seconds
            self.missing = (len(self.results) if self.missing is None else self.missing) - 1
            return self.missing == 0

    def times(self) -> Times:
        waited, decode, engine, encode = (
            round(1e3 * seconds, 3) for seconds in (self.waited, self.decode, self.engine, self.encode)
        )
        return Times(waited, decode, engine, encode, self.batch)


@dataclass(frozen=True, eq=False)
class _Image:
    """One of a job's images as the engine takes it, and the seconds that this took."""

    job: _Job
    index: int
    prepared: Any
    spent: float


class _Queue(Generic[T]):
    """First come, first served, but for what is urgent. None is the end."""

    def __init__(self) -> None:
        self._queue: PriorityQueue[tuple[int, int, T | None]] = PriorityQueue()
        self._number = count()

    def put(self, item: T, urgent: bool = False) -> None:
        self._queue.put((not urgent, next(self._number), item))

    def get(self, timeout: float | None = None) -> T | None:
        """
        Raises:
            Empty: nothing came in that time.
        """
        return self._queue.get(timeout is None or timeout > 0, timeout)[2]

    def end(self, times: int) -> None:
        """Ahead of everything that waits."""
        for _ in range(times):
            self._queue.put((-1, next(self._number), None))
