"""The process that the engine of a served bundle runs in: what it does, and who asks it, watches it, starts it again.

A crash of an engine's library ends that process and not the server; a stall of it is noticed. Arrays cross over a pipe.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import numpy as np

from agln_fast.contract import IOContract
from agln_fast.errors import AglnError, BackendError, BundleError
from agln_fast.runtime.segmenter import Segmenter, load
from agln_fast.serving.line import Answer, Failure, Line, Task
from agln_fast.serving.protocol import Array

__all__ = ["Description", "Engine", "Worker", "canary"]

_LONGEST_PAUSE_S = 30.0  # between two starts of a process that dies at once

log = logging.getLogger("agln_fast.serving")


@dataclass(frozen=True)
class Engine:
    """Which engine of a bundle a worker runs, and how: the arguments of `load`; wait_ms: `Line`'s, in milliseconds."""

    bundle: str
    backend: str = "auto"
    precision: str | None = None
    device: str | None = None
    threads: int | None = None
    wait_ms: float = 0.0

    def open(self) -> Segmenter:
        """Load it, and run it with each number of images that doubles, from the smallest to the largest."""
        segmenter = load(self.bundle, self.backend, precision=self.precision, device=self.device, threads=self.threads)
        images = segmenter.contract.min_batch
        while True:
            segmenter([canary(segmenter.contract)] * images)
            if images == segmenter.contract.max_batch:
                return segmenter
            images = min(2 * images, segmenter.contract.max_batch)


@dataclass(frozen=True)
class Description:
    """What an opened engine says of itself."""

    engine: str
    backend: str
    precision: str
    device: str
    contract: IOContract
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, segmenter: Segmenter) -> Description:
        record, names = segmenter.engine, segmenter.class_set
        return cls(
            record.name,
            record.backend,
            segmenter.precision,
            segmenter.device,
            segmenter.contract,
            tuple(names.classes),
            tuple(names.palette),
        )

    @property
    def promises(self) -> tuple[Any, ...]:
        """What clients rely on as long as a model is loaded."""
        return self.contract, self.classes, self.palette

    def parameters(self) -> dict[str, Any]:
        """For the metadata of a model: what the classes are called, their colours, and which engine runs."""
        about, contract = asdict(self), self.contract
        del about["contract"]
        size = [contract.height, contract.width]
        return {**about, "size": size, "resize": contract.resize, "max_batch": contract.max_batch}


@dataclass(frozen=True)
class _Cancel:
    number: int


def canary(contract: IOContract) -> Array:
    """A picture that is no constant."""
    shape = contract.height, contract.width, 3
    return np.arange(math.prod(shape), dtype=np.uint32).astype(np.uint8).reshape(shape)


def _work(connection: Connection, engine: Engine) -> None:
    """What the process does: it ends when the pipe does, so with the server, however that ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they go to the whole group; the server decides
        signal.signal(number, signal.SIG_IGN)
    try:
        segmenter = engine.open()
    except Exception as error:
        known = error if isinstance(error, AglnError) else f"{engine.bundle}: {type(error).__name__}: {error}"
        with contextlib.suppress(OSError):  # the server is gone
            # Some errors do not survive a pipe: their arguments are no message.
            connection.send((BundleError if isinstance(error, BundleError) else BackendError)(str(known)))
        return
    lock = threading.Lock()

    def answer(answer: Answer) -> None:
        with lock, contextlib.suppress(OSError):  # the server is gone
            connection.send(answer)

    with segmenter:
        connection.send(Description.of(segmenter))
        line = Line(segmenter.steps(), answer, wait_s=1e-3 * engine.wait_ms)
        try:
            while message := connection.recv():
                if isinstance(message, _Cancel):
                    line.cancel(message.number)
                else:
                    line.put(message)
        except (EOFError, OSError):
            os._exit(1)  # the server is gone: nobody waits for what the engine is at
        line.close()


class Worker:
    """One process, from the server's side; all methods belong to one event loop.

    It is healthy while it answers: a canary, a picture through the engine, is sent ahead of what waits when nothing was
    answered for `interval_s`, and has `limit_s` to come back. A process that dies is started again; one that has not
    answered for ten times that long is killed first.
    """

    def __init__(self, engine: Engine, *, interval_s: float = 5.0, limit_s: float = 5.0) -> None:
        self.engine = engine
        self.healthy = False
        self.description: Description | None = None
        self._interval_s, self._limit_s = interval_s, limit_s
        self._pending: dict[int, asyncio.Future[Answer]] = {}
        self._numbers = count()
        self._probes = 0
        self._answered = 0.0
        self._life: _Life | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int | None:
        """The process, if there is one."""
        return self._life.pid if self._life else None

    @property
    def in_flight(self) -> int:
        """Requests without an answer yet; canaries are none."""
        return len(self._pending) - self._probes

    async def start(self) -> Description:
        """Start the process and wait until it is warm.

        Raises:
            AglnError: what `load` raises there, or `BackendError` where the process dies.
        """
        self.description = await self._begin()
        self._tasks = [asyncio.create_task(self._keep_alive()), asyncio.create_task(self._watch())]
        for task in self._tasks:
            task.add_done_callback(_tell)
        return self.description

    async def ask(
        self,
        inputs: Mapping[str, Array | Sequence[bytes]],
        outputs: tuple[str, ...],
        *,
        deadline: float = math.inf,
        urgent: bool = False,
    ) -> Answer:
        """The answer to a request of the protocol. `deadline`: seconds of `time.monotonic`; 504 then, and not later.

        503 without a process, or when it dies meanwhile.
        """
        life = self._life
        if life is None:
            return Answer(-1, Failure(503, "the engine's process is being started"))
        now = time.monotonic()
        task = Task(next(self._numbers), inputs, outputs, now, deadline, urgent)
        future = self._pending[task.number] = asyncio.get_running_loop().create_future()
        life.outbox.put(task)
        try:
            async with asyncio.timeout(None if math.isinf(deadline) else max(0.0, deadline - now)):
                answer: Answer = await future
                return answer
        except TimeoutError:
            return Answer(task.number, Failure(504, "the deadline passed"))
        finally:
            if not future.done() or future.cancelled():
                life.outbox.put(_Cancel(task.number))
            del self._pending[task.number]

    async def drain(self, seconds: float) -> None:
        """Wait until nothing is in flight, or so long."""
        until = time.monotonic() + seconds
        while self._pending and time.monotonic() < until:
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """End the process; what is in flight gets 503."""
        self.healthy = False
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if life := self._life:
            self._life = None
            await asyncio.to_thread(life.end)
            self._lose()

    async def _begin(self) -> Description:
        life = _Life(self.engine, self._resolve)
        try:
            ready = await life.ready
            if (before := self.description) is not None and before.promises != ready.promises:
                raise BackendError(f"{self.engine.bundle}: another bundle lies there now: load it, or serve it anew")
        except BaseException:
            life.kill()
            await asyncio.to_thread(life.end)
            raise
        self._life, self.healthy, self._answered = life, True, time.monotonic()
        return ready

    async def _keep_alive(self) -> None:
        """Another process for one that ended."""
        while life := self._life:
            await life.over.wait()
            self._life, self.healthy = None, False
            self._lose()
            await asyncio.to_thread(life.end)
            log.error("the engine's process of %s ended (exit code %s)", self.engine.bundle, life.code)
            pause = 1.0
            while self._life is None:
                try:
                    self.description = await self._begin()
                except (AglnError, OSError) as error:  # the system has no process or file to give
                    log.error("%s; trying again in %.0f s", error, pause)
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            life = self._life
            if life is None or (self.healthy and time.monotonic() - self._answered < self._interval_s):
                continue
            assert self.description is not None
            sample = {"pixels": canary(self.description.contract)}
            deadline = time.monotonic() + self._limit_s
            self._probes += 1
            try:
                answer = await self.ask(sample, ("shares",), deadline=deadline, urgent=True)
            finally:
                self._probes -= 1
            self.healthy = self._life is life and not isinstance(answer.outputs, Failure)
            if not self.healthy and time.monotonic() - self._answered > 10 * self._limit_s and self._life is life:
                log.error("engine's process of %s does not answer: killed", self.engine.bundle)
                life.kill()

    def _resolve(self, answer: Answer) -> None:
        if not isinstance(answer.outputs, Failure):  # the engine has run
            self._answered = time.monotonic()
        future = self._pending.get(answer.number)
        if future is not None and not future.done():
            future.set_result(answer)

    def _lose(self) -> None:
        for number, future in self._pending.items():
            if not future.done():
                future.set_result(Answer(number, Failure(503, "the engine's process ended; send the request again")))


def _tell(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("a task that looks after an engine's process has ended", exc_info=error)


class _Life:
    """One process, and the two threads that write to it and read from it: a stalled one blocks nobody else."""

    def __init__(self, engine: Engine, resolve: Callable[[Answer], None]) -> None:
        self._loop, self._resolve, self._bundle = asyncio.get_running_loop(), resolve, engine.bundle
        context = multiprocessing.get_context("spawn")  # a fork would copy gRPC's threads half
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, engine), name="agln-fast engine", daemon=True)
        self._process.start()
        # Plain MLServer ends without unloading a model, and then Python would wait for what no signal ends.
        atexit.register(self._process.kill)
        theirs.close()
        self.outbox: SimpleQueue[Task | _Cancel | None] = SimpleQueue()
        self.ready: asyncio.Future[Description] = self._loop.create_future()
        self.over = asyncio.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._read, self._write)]
        for thread in self._threads:
            thread.start()

    @property
    def code(self) -> int | None:
        """The exit code; negative for a signal."""
        return self._process.exitcode

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """Waits for what the engine is at, 10 s at most."""
        self.outbox.put(None)
        self._process.join(10.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        atexit.unregister(self._process.kill)
        for thread in self._threads:
            thread.join()
        self._connection.close()

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._call(self._take, self._connection.recv())
        self._process.join(1.0)  # for its exit code
        self._call(self._ended)

    def _write(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                message = self.outbox.get()
                self._connection.send(message)
                if message is None:
                    break

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def _take(self, message: Description | AglnError | Answer) -> None:
        if isinstance(message, Answer):
            self._resolve(message)
        elif self.ready.done():  # nobody waits any more
            pass
        elif isinstance(message, Description):
            self.ready.set_result(message)
        else:
            self.ready.set_exception(message)

    def _ended(self) -> None:
        self.over.set()
        if not self.ready.done():
            self.ready.set_exception(
                BackendError(
                    f"{self._bundle}: the engine's process ended while it was starting (exit code {self.code})"
                )
            )
