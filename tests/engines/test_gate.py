"""The gate before every engine."""

from __future__ import annotations

import os
import threading

import pytest

from agln_fast.engines.gate import Gate
from agln_fast.errors import BackendError


def test_closed_between_the_first_look_and_the_turn(monkeypatch):
    gate = Gate("it", "open it again")
    check, looks = gate.check, []

    def look_and_close() -> None:
        check()
        if not looks:
            looks.append(1)
            gate.close(lambda: None)

    monkeypatch.setattr(gate, "check", look_and_close)
    with pytest.raises(BackendError, match="it is closed; open it again"), gate.turn():
        raise AssertionError("nobody comes in")


def test_released_once():
    released = []
    gate = Gate("it", "open it again")
    for _ in range(2):
        gate.close(lambda: released.append(1))
    assert released == [1]


def test_in_another_process_it_neither_lets_in_nor_releases(monkeypatch):
    gate = Gate("it", "open it again")
    gate._lock.acquire()  # by a thread that is not there
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(BackendError, match="it was opened before this process was forked"), gate.turn():
        raise AssertionError("nobody comes in")
    gate.close(lambda: pytest.fail("released"))


def test_closed_from_inside_it_is_released_on_leaving():
    """A signal's handler runs in the thread that it interrupts, which may be inside."""
    released = []
    gate = Gate("it", "open it again")

    def close():
        with gate.turn():
            for number in range(2):
                gate.close(lambda number=number: released.append(number))
            released.append("inside")

    thread = threading.Thread(target=close, daemon=True)  # which a gate that waits for itself would keep
    thread.start()
    thread.join(10)
    assert released == ["inside", 0]
    gate.close(lambda: released.append("again"))
    assert released == ["inside", 0]
    with pytest.raises(BackendError, match="closed"), gate.turn():
        raise AssertionError("nobody comes in")
