"""Who may use an engine: one thread at a time, of the process that opened it, until it is closed."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

from agln_fast.errors import BackendError

__all__ = ["Gate", "keep_after_fork"]


class Gate:
    """Lets in one thread at a time, of the process that made it, and nobody once it is closed."""

    def __init__(self, name: str, again: str) -> None:
        """`name` says in messages what lies behind it, `again` how the user gets another one."""
        self._name, self._again = name, again
        self._process = os.getpid()
        self._lock = threading.RLock()  # a signal's handler may close what the thread that it interrupts is in
        self._open = True
        self._inside = False
        self._release: Callable[[], None] | None = None  # what whoever is inside calls on leaving

    def check(self) -> None:
        """
        Raises:
            BackendError: it is closed, or was made by the process that this one was forked from.
        """
        if self._process != os.getpid():
            raise BackendError(
                f"{self._name} was opened before this process was forked, and its threads are not here: load after "
                "the fork, or start processes with spawn or forkserver (docs/concurrency.md)"
            )
        if not self._open:
            raise BackendError(f"{self._name} is closed; {self._again}")

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait until nobody is inside, and be inside. Raises as `check` does."""
        self.check()  # before the lock, which a thread that is not in this process may hold for ever
        with self._lock:
            self._inside = True
            try:
                self.check()
                yield
            finally:
                self._inside = False
                release, self._release = self._release, None
                if release is not None:
                    release()

    def close(self, release: Callable[[], None]) -> None:
        """Wait until nobody is inside, let in nobody any more, and call `release`. Nothing, the second time.

        Nor in a forked process: what lies behind the gate is its parent's. From inside, in a signal's handler,
        nobody waits, and `release` is called on leaving.
        """
        if self._process == os.getpid():
            with self._lock:
                was_open, self._open = self._open, False
                if was_open and self._inside:
                    self._release = release
                elif was_open:
                    release()


_kept: WeakSet[object] = WeakSet()


def keep_after_fork(engine: object) -> None:
    """Have `engine` stay in the memory of every process that is forked from now on, until it ends.

    Freeing it there would be waiting for the threads of its library to end, and they are not there.
    """
    _kept.add(engine)


def _keep() -> None:
    for engine in _kept:
        # A reference of nobody: all that Python knows of, it lets go of at the latest at its end.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_keep)
