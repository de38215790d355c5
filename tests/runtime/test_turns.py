"""Contestants of a race take turns."""

from itertools import islice

import pytest

from agln_fast.runtime import turns


def test_each_runs_once_a_round_and_rests_before(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    clock = {"now": 0.0}

    def run(name: str, seconds: float) -> None:
        log.append(name)
        clock["now"] += seconds

    monkeypatch.setattr(turns.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(turns.time, "sleep", lambda seconds: run("rest", 100))
    found = list(islice(turns.rounds([lambda: run("a", 1), lambda: run("b", 2)]), 2))
    assert found == [[1, 2], [1, 2]]
    assert log == ["rest", "a", "rest", "b"] * 2
