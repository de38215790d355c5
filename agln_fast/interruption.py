"""Signals that ask the program to end, noted where they cannot get lost.

An exception that a signal's handler raises can vanish: in a `__del__`, in a callback that a C library makes, behind an
`except BaseException`. The work would go on as if nobody had asked. So the signal is also noted, and every long step
calls `check` between its parts, which raises for as long as the program runs.

Handlers are installed by `listening`, which only the command line does. In other people's programs signals stay theirs,
and `check` does nothing.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Interrupted", "check", "deferred", "held", "listening", "noted"]

# Ctrl-C, a polite kill, and the end of the terminal.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# `timeout` and other wrappers signal their child and then its whole group: that is one request, which arrives twice.
_ONE_REQUEST_S = 0.5

_SHOW_CURSOR = b"\x1b[?25h"  # progress bars hide it


class Interrupted(KeyboardInterrupt):
    """A signal asked the program to end; `except Exception` does not stop it.

    number: the signal. exit_code: 128 plus it, as shells count.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number
        self.exit_code = 128 + number


_noted: Interrupted | None = None
_cancels: list[Callable[[], None]] = []
_handlers_before: dict[signal.Signals, Any] = {}


def noted() -> Interrupted | None:
    """The signal that has come since `listening` began, if one has."""
    return _noted


def check() -> None:
    """Raise if the program has been asked to end; from any thread. What cleans up must not call it.

    Raises:
        Interrupted: it has, and whatever was raised then may have been lost.
    """
    if _noted is not None:
        raise Interrupted(_noted.number)


@contextmanager
def listening() -> Iterator[None]:
    """Handle SIGINT, SIGTERM and SIGHUP inside the block, but for those that are ignored (`nohup`); main thread only.

    The first is noted, and raises `Interrupted` where the main thread is. A second, half a second later or more, ends
    the process at once, wherever it is: nothing is cleaned up.
    """
    global _noted
    _noted = None
    for number in _SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: one that is not Python's, and stays
            _handlers_before[number] = signal.signal(number, _handle)
    hook, sys.unraisablehook = sys.unraisablehook, _quiet_hook(sys.unraisablehook)
    # Python runs handlers between two of its instructions only. The bytes come at once, even inside a library's call.
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    bell = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(reader,), name="agln-fast signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(bell)
        _restore_handlers()
        sys.unraisablehook = hook
        writer.close()
        watcher.join()
        reader.close()
        _noted = None


@contextmanager
def deferred(cancel: Callable[[], None]) -> Iterator[None]:
    """Let a signal call `cancel` in the place of raising, and raise at the end of the block.

    For calls of a library that calls back: raised there, an exception would be printed and lost. Outside `listening`
    this holds for Ctrl-C in the main thread.

    Raises:
        KeyboardInterrupt: Ctrl-C, or another signal (`Interrupted`), came inside the block.
    """
    check()
    pressed: list[int] = []

    def handle(number: int, frame: object) -> None:
        pressed.append(number)
        cancel()

    in_main = threading.current_thread() is threading.main_thread()
    alone = in_main and signal.getsignal(signal.SIGINT) not in (_handle, signal.SIG_IGN, None)
    before = signal.signal(signal.SIGINT, handle) if alone else None
    _cancels.append(cancel)
    try:
        yield
    finally:
        _cancels.remove(cancel)
        if alone:
            signal.signal(signal.SIGINT, before)
        if pressed:
            raise KeyboardInterrupt
        check()


@contextmanager
def held() -> Iterator[None]:
    """Let signals wait until the end of the block, where their handlers are called: it is not cut short. Keep it brief.

    It holds what Python handles, in whosever program: in the main thread, where alone handlers are called.
    """
    before: dict[signal.Signals, Any] = {}
    came: list[tuple[int, object]] = []
    try:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    before[number] = handler
                    signal.signal(number, lambda *arrived: came.append(arrived))
        yield
    finally:
        try:
            _install(before)
        finally:  # one that came in between has raised, and does so once
            _install(before)
        for arrived, frame in came:
            before[signal.Signals(arrived)](arrived, frame)


def _install(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _handle(number: int, frame: object) -> None:
    global _noted
    if _noted is not None:  # a second one is the watcher's business
        return
    _noted = Interrupted(number)
    for cancel in _cancels:
        cancel()
    if not _cancels:
        raise Interrupted(number)


def _watch(reader: socket.socket) -> None:
    """End the process at the second request; the end of the stream is that of `listening`."""
    first: float | None = None
    while numbers := reader.recv(64):
        for number in numbers:
            if number not in _SIGNALS:
                continue
            if first is None:
                first = time.monotonic()
            elif time.monotonic() - first >= _ONE_REQUEST_S:
                if os.isatty(2):
                    os.write(2, _SHOW_CURSOR)
                os.write(2, b"interrupted again: ended at once, nothing was cleaned up\n")
                os._exit(128 + number)


def _quiet_hook(hook: Callable[[Any], object]) -> Callable[[Any], object]:
    def quiet(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            hook(unraisable)

    return quiet


def _restore_handlers() -> None:
    while _handlers_before:
        signal.signal(*_handlers_before.popitem())


def _after_fork() -> None:
    """A child's signals are its own: Ctrl-C, which reaches both, would ring twice in the parent's watcher."""
    if _handlers_before:
        signal.set_wakeup_fd(-1)
        _restore_handlers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
