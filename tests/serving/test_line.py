"""Requests through the steps of a segmenter: batches, order, deadlines, what is held, and what fails alone."""

from __future__ import annotations

import threading
import time
from queue import Empty, SimpleQueue

import numpy as np
import pytest
from fake_engine import fake_segmenter

from agln_fast.errors import BackendError
from agln_fast.runtime.images import load_image
from agln_fast.runtime.stages import Steps
from agln_fast.serving.line import Answer, Failure, Line, Task

SHORT = 0.05


class Gate:
    """Steps whose runs wait to be let through; the batches are noted. A source is its own result."""

    def __init__(self, most: int = 4) -> None:
        self.batches: list[list[object]] = []
        self.prepared: list[object] = []
        self.fails: dict[int, Exception] = {}
        self._open = threading.Semaphore(0)
        self._segmenter = fake_segmenter()
        self.steps = Steps(self._prepare, self._run, self._segmenter, most=most)

    def let(self, runs: int = 1) -> None:
        self._open.release(runs)

    def shut(self) -> None:
        self._open = threading.Semaphore(0)

    def _prepare(self, source):
        image = load_image(source)
        self.prepared.append(int(image[0, 0, 0]))
        return image

    def _run(self, batch):
        self.batches.append([int(source[0, 0, 0]) for source in batch])
        self._open.acquire()
        if error := self.fails.pop(len(self.batches), None):
            raise error
        return batch


def pixels(value: int, count: int = 1) -> dict[str, np.ndarray]:
    return {"pixels": np.full((count, 8, 8, 3), value, np.uint8)}


class Desk:
    """A line, and its answers by number."""

    def __init__(self, gate: Gate, **settings: object) -> None:
        self._answers: SimpleQueue[Answer] = SimpleQueue()
        self.gate = gate
        self.line = Line(gate.steps, self._answers.put, **settings)

    def put(self, number: int, *, count: int = 1, **settings: object) -> None:
        self.line.put(Task(number, pixels(number % 256, count), ("shares",), time.monotonic(), **settings))

    def take(self, count: int = 1) -> dict[int, Answer]:
        answers = [self._answers.get(timeout=30) for _ in range(count)]
        return {answer.number: answer for answer in answers}

    def no_more(self) -> bool:
        try:
            self._answers.get(timeout=SHORT)
        except Empty:
            return True
        return False


def until(condition) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.005)


@pytest.fixture
def desk():
    gate = Gate()
    desk = Desk(gate)
    yield desk
    gate.let(1000)
    desk.line.close()


def test_what_comes_while_the_engine_runs_is_the_next_batch(desk):
    desk.put(0)
    until(lambda: desk.gate.batches)
    for number in range(1, 7):
        desk.put(number)
    until(lambda: len(desk.gate.prepared) == 7)
    desk.gate.let(3)
    answers = desk.take(7)
    assert desk.gate.batches == [[0], [1, 2, 3, 4], [5, 6]]
    assert [answers[number].times.batch_size for number in range(7)] == [1, 4, 4, 4, 4, 2, 2]
    assert all(isinstance(answer.outputs, dict) for answer in answers.values())


def test_one_that_waits_for_more_gets_a_larger_batch():
    gate = Gate()
    desk = Desk(gate, wait_s=30.0)
    for number in range(4):
        desk.put(number)
        time.sleep(0.01)
    gate.let()
    assert len(desk.take(4)) == 4
    assert [sorted(batch) for batch in gate.batches] == [[0, 1, 2, 3]]
    desk.line.close()


def test_images_of_one_request_share_batches_with_others(desk):
    desk.put(0)
    until(lambda: desk.gate.batches)
    desk.put(1, count=3)
    desk.put(2)
    until(lambda: len(desk.gate.prepared) == 5)
    desk.gate.let(2)
    answers = desk.take(3)
    assert sorted(desk.gate.batches[1]) == [1, 1, 1, 2]
    assert answers[1].outputs["shares"].shape == (3, 3)
    assert answers[2].outputs["shares"].shape == (1, 3)


def test_what_is_urgent_goes_ahead(desk):
    desk.put(0)
    until(lambda: desk.gate.batches)
    for number in range(1, 6):
        desk.put(number)
    until(lambda: len(desk.gate.prepared) == 6)
    desk.put(9, urgent=True)
    until(lambda: len(desk.gate.prepared) == 7)
    desk.gate.let(3)
    desk.take(7)
    assert desk.gate.batches[1][0] == 9


def test_what_is_urgent_needs_no_place():
    gate = Gate(most=1)
    desk = Desk(gate, readers=1)
    for number in range(8):
        desk.put(number)
    until(lambda: len(gate.prepared) == 3)  # no more fit
    time.sleep(SHORT)
    desk.put(99, urgent=True)
    assert gate.prepared == [0, 1, 2, 99]
    gate.let(2)
    until(lambda: len(gate.batches) == 3)
    assert gate.batches[1] == [99]
    gate.let(100)
    assert len(desk.take(9)) == 9
    gate.shut()
    for number in range(20, 28):
        desk.put(number)
    until(lambda: len(gate.prepared) == 9 + 3)
    time.sleep(SHORT)
    assert len(gate.prepared) == 9 + 3  # as many places as before
    gate.let(100)
    desk.take(8)
    desk.line.close()


def test_requests_of_many_images_take_turns_with_others():
    gate = Gate(most=1)
    desk = Desk(gate, readers=1)
    desk.put(1, count=20)
    until(lambda: len(gate.prepared) == 3)
    desk.put(2)
    gate.let(100)
    assert list(desk.take()) == [2]
    assert sorted(desk.take()) == [1]
    desk.line.close()


def test_a_run_counts_once_for_each_request(desk):
    desk.put(0)
    until(lambda: desk.gate.batches)
    desk.put(1, count=4)
    until(lambda: len(desk.gate.prepared) == 5)
    desk.gate.let()
    until(lambda: len(desk.gate.batches) == 2)
    time.sleep(SHORT)
    desk.gate.let()
    times = desk.take(2)[1].times
    assert 1e3 * SHORT <= times.engine_ms < 2e3 * SHORT
    assert times.batch_size == 4


def test_closing_with_a_request_half_read():
    gate = Gate(most=1)
    desk = Desk(gate, readers=2)
    desk.put(1, count=40)
    desk.put(2, count=40)
    until(lambda: len(gate.prepared) >= 4)
    closing = threading.Thread(target=desk.line.close)
    closing.start()
    gate.let(1000)
    closing.join(30)
    assert not closing.is_alive()


def test_what_is_late_is_not_run(desk):
    desk.put(0)
    until(lambda: desk.gate.batches)
    desk.put(1, deadline=time.monotonic() + SHORT)
    until(lambda: len(desk.gate.prepared) == 2)
    time.sleep(2 * SHORT)
    desk.gate.let(2)
    answers = desk.take(2)
    assert answers[1].outputs == Failure(504, "the deadline passed before it could be run")
    desk.put(2, deadline=time.monotonic() - 1)
    assert desk.take()[2].outputs.status == 504
    assert desk.gate.batches == [[0]]
    assert desk.gate.prepared == [0, 1]


def test_what_is_cancelled_is_neither_run_nor_answered(desk):
    desk.put(0)
    until(lambda: desk.gate.batches)
    desk.put(1)
    until(lambda: len(desk.gate.prepared) == 2)
    desk.line.cancel(1)
    desk.line.cancel(77)
    desk.gate.let(2)
    assert list(desk.take()) == [0]
    assert desk.no_more()
    assert desk.gate.batches == [[0]]


@pytest.mark.parametrize("error", [BackendError("no memory"), RuntimeError("driver")])
def test_an_engine_that_raises_fails_its_batch_alone(desk, error):
    desk.gate.fails[2] = error
    desk.put(0)
    until(lambda: desk.gate.batches)
    desk.put(1)
    desk.put(2)
    until(lambda: len(desk.gate.prepared) == 3)
    desk.gate.let(2)
    answers = desk.take(3)
    assert isinstance(answers[0].outputs, dict)
    assert {answers[number].outputs.status for number in (1, 2)} == {500}
    assert all(str(error) in answers[number].outputs.message for number in (1, 2))
    desk.put(3)
    desk.gate.let()
    assert isinstance(desk.take()[3].outputs, dict)


def test_a_request_that_cannot_be_read_fails_alone(desk):
    desk.line.put(Task(5, {"image": [b"garbage"]}, (), time.monotonic()))
    desk.line.put(Task(6, {"other": [b""]}, (), time.monotonic()))
    assert {answer.outputs.status for answer in desk.take(2).values()} == {400}
    desk.put(1)
    desk.gate.let()
    assert isinstance(desk.take()[1].outputs, dict)


def test_an_answer_that_cannot_be_written_fails_alone(desk, capfd):
    desk.line.put(Task(5, pixels(1), ("mask",), time.monotonic()))
    desk.gate.let()
    assert desk.take()[5].outputs.status == 400
    desk.put(1)
    desk.gate.let()
    assert isinstance(desk.take()[1].outputs, dict)


def test_only_so_many_images_are_decoded_ahead():
    gate = Gate(most=2)
    desk = Desk(gate, readers=2)
    for number in range(30):
        desk.put(number)
    until(lambda: len(gate.prepared) >= 6)
    time.sleep(SHORT)
    assert len(gate.prepared) == 2 * 2 + 2
    gate.let(1000)
    assert len(desk.take(30)) == 30
    desk.line.close()


@pytest.mark.parametrize("what", ["late", "cancelled", "failed", "unread"])
def test_nothing_that_was_left_out_keeps_its_place(what):
    """More than fit are left out in one way, again and again; after that there is place for others."""
    gate = Gate(most=2)
    desk = Desk(gate, readers=2)
    for start in (0, 100, 200):
        runs = len(gate.batches)
        desk.put(start)
        until(lambda runs=runs: len(gate.batches) > runs)
        for number in range(start + 1, start + 30):
            if what == "unread":
                desk.line.put(Task(number, {"image": [b"garbage"]}, (), time.monotonic()))
            else:
                desk.put(number, deadline=time.monotonic() + (SHORT if what == "late" else 60))
        time.sleep(2 * SHORT)
        if what == "cancelled":
            for number in range(start + 1, start + 30):
                desk.line.cancel(number)
        if what == "failed":
            gate.fails = {run: BackendError("no") for run in range(runs + 2, runs + 17)}
        gate.let(1 if what in ("late", "cancelled") else 30)
        desk.take(1 if what == "cancelled" else 30)
        gate.fails = {}
    gate.shut()
    before = len(gate.prepared)
    for number in range(1000, 1020):
        desk.put(number)
    until(lambda: len(gate.prepared) == before + 2 * 2 + 2)
    gate.let(1000)
    assert len(desk.take(20)) == 20
    assert desk.line._jobs == {}
    desk.line.close()


def test_a_request_is_answered_once(desk):
    desk.gate.fails[1] = BackendError("no")
    desk.put(0)
    until(lambda: desk.gate.batches)
    desk.put(1, count=4)
    until(lambda: len(desk.gate.prepared) == 5)
    desk.gate.fails[2] = BackendError("no")
    desk.gate.let(2)
    assert sorted(desk.take(2)) == [0, 1]
    assert desk.no_more()


def test_closing_waits_for_the_run_and_ends_the_threads():
    gate = Gate()
    desk = Desk(gate)
    for number in range(3):
        desk.put(number)
    until(lambda: gate.batches)
    closing = threading.Thread(target=desk.line.close)
    closing.start()
    time.sleep(SHORT)
    assert closing.is_alive()
    gate.let(1000)
    closing.join(30)
    assert not closing.is_alive()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("agln-fast ")]
