"""What a machine achieves is measured quickly, believed only if it can be, and remembered."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from agln_fast.plan import rates as module
from agln_fast.plan.rates import Rates, cpu_rates

MEASURE = module._measure.__wrapped__  # the other tests know what the machine can


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AGLN_FAST_CACHE", str(tmp_path))
    cpu_rates.cache_clear()
    yield tmp_path / "rates"
    cpu_rates.cache_clear()


def test_rates_are_those_of_the_work_done(monkeypatch):
    """With a clock that says one second for each run, a rate is the work itself, counted by hand."""
    runs = []

    def one_second(run):
        runs.append(run())
        return 1.0

    monkeypatch.setattr(module, "_fastest", one_second)
    rates = MEASURE(torch.float32)
    convolved, product, copied = runs
    assert rates.convolution == 2 * convolved.numel() * 9 * 256
    assert rates.product == 2 * product.numel() * len(product)
    assert rates.bytes == 2 * copied.numel()
    assert convolved[0, 0, 5, 5] == 9 * 256  # all taps of all channels were added up
    assert (product == len(product)).all()


def test_the_fastest_run_counts(monkeypatch):
    clock = iter([0.0, 0.0, 0.05, 0.06, 0.06, 0.08, 0.3])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    assert module._fastest(lambda: None) == pytest.approx(0.02)


def test_what_was_measured_is_remembered(cache, monkeypatch):
    monkeypatch.setattr(module, "_measure", MEASURE)
    first = cpu_rates(False)
    assert all(math.isfinite(rate) and rate > 0 for rate in vars(first).values())
    cpu_rates.cache_clear()
    monkeypatch.setattr(module, "_measure", None)
    assert cpu_rates(False) == first


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"convolution": 1.0}', '{"convolution": 1.0, "product": NaN, "bytes": 1.0}',
     '{"convolution": 1.0, "product": "2", "bytes": 1.0}', '{"convolution": -1.0, "product": 2.0, "bytes": 1.0}'],
    ids=["empty", "a list", "incomplete", "NaN", "text", "negative"],
)  # fmt: skip
def test_a_damaged_memory_is_measured_again(text, cache, monkeypatch):
    expected = Rates(1.0, 2.0, 3.0)
    monkeypatch.setattr(module, "_measure", lambda dtype: expected)
    cpu_rates(True)
    (file,) = cache.iterdir()
    file.write_text(text)
    cpu_rates.cache_clear()
    assert cpu_rates(True) == expected
    assert json.loads(file.read_text()) == vars(expected)
