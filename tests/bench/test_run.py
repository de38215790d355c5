"""A whole run keeps what it has, goes on behind it, and ends where the device is lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from synthetic_rows import MACHINE, row

from agln_fast.bench.race import cases as cases_module
from agln_fast.bench.race import measure as measure_module
from agln_fast.bench.race import run as module
from agln_fast.bench.race.cases import full_cases, is_of
from agln_fast.bench.race.measure import Case, DeviceLostError, Entry, Measured, Options, measure
from agln_fast.bench.race.results import Results, load_results
from agln_fast.bench.race.run import run
from agln_fast.errors import BackendError
from agln_fast.plan.plan import Plan

EMPTY = Results(MACHINE, "agln-fast bench", "2026-01-02", (), left_out=("waiting: --full",))
CASES = Case("fpn_nano", (64, 64)), Case("agln_nano", (64, 64)), Case("agln_nano", (64, 64), num_classes=150)
ENTRY = Entry("onnxruntime", "fp32")


@pytest.fixture
def measured(monkeypatch):
    """The cases that are measured, each with the seconds that it may take; the clock stands still."""
    seen = []

    def stand_in(cases, entries, options, progress):
        (case,) = cases
        seen.append((case, options.budget_s))
        size = f"{case.size[0]}x{case.size[1]}"
        found = row(network=case.network, size=size, num_classes=case.num_classes)
        return Measured((found,), (f"{case.name}: late",))

    monkeypatch.setattr(module, "measure", stand_in)
    monkeypatch.setattr(module.time, "monotonic", lambda: 0.0)
    return seen


def test_the_file_is_complete_after_each_case_and_is_gone_on_with(measured, tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    whole = run(CASES, [ENTRY], Options(budget_s=6.0), EMPTY, save=file)
    assert [case for case, _ in measured] == list(CASES)
    assert [budget for _, budget in measured] == [2.0, 3.0, 6.0]
    assert load_results(file) == whole
    assert whole.left_out[0] == "waiting: --full"
    assert len(whole.left_out) == 4

    measured.clear()
    begun = replace(whole, rows=whole.rows[1:2])
    assert {found.num_classes for found in run(CASES, [ENTRY], Options(), begun).rows} == {59, 150}
    assert [case for case, _ in measured] == [CASES[0], CASES[2]]
    assert [budget for _, budget in measured] == [None, None]


def test_ladder_and_scaling_are_measured_once(measured, monkeypatch):
    calls = []

    def more(name):
        def measure_more(rows, cases, options, progress):
            calls.append((name, len(rows), cases))
            return Measured((row(),), ())

        return measure_more

    monkeypatch.setattr(module, "measure_ladder", more("ladder"))
    monkeypatch.setattr(module, "measure_scaling", more("scaling"))
    results = run(CASES[:1], [ENTRY], Options(), EMPTY, ladder=True, scaling=True)
    assert calls == [("ladder", 1, CASES[:1]), ("scaling", 1, CASES[:1])]
    assert run(CASES[:1], [ENTRY], Options(), results, ladder=True, scaling=True) == results
    assert len(calls) == 2


def test_each_precision_has_a_ladder_from_its_best_peer(monkeypatch):
    found = [
        row(contestant="torch", median_ms=9.0),
        row(contestant="openvino", median_ms=7.0),
        row(contestant="planned openvino", ours=True, median_ms=1.0),
        row(contestant="openvino", precision="int8", median_ms=3.0),
        row(contestant="torch", num_classes=150, median_ms=1.0),
    ]
    case = Case(found[0].network, (64, 64), num_classes=found[0].num_classes)
    found = [replace(each, size="64x64") for each in found]
    climbed = []

    def climb(case, rungs, options, progress):
        climbed.append([(rung.contestant, rung.precision) for rung in rungs])
        return Measured((row(precision=rungs[0].precision),), ("something",))

    monkeypatch.setattr(cases_module, "ladder", climb)
    monkeypatch.setattr(cases_module, "best_plan", lambda case, precision, options: Plan(low_resolution_labels=True))
    measured = cases_module.measure_ladder(found, [case], Options())
    ours = ("planned openvino", "fp32"), ("planned openvino", "int8")
    assert climbed == [[("openvino", "fp32"), ours[0]], [("openvino", "int8"), ours[1]]]
    assert [each.precision for each in measured.rows] == ["fp32", "int8"]
    assert len(measured.left_out) == 2


def test_a_full_run_has_many_classes_and_the_trained_networks():
    cases = full_cases((512, 512))
    assert [case.num_classes for case in cases] == 3 * [59] + 3 * [150] + 3 * [12]
    assert not any(case.trained or case.size != (512, 512) for case in cases[:6])
    assert all(case.trained and case.size == (128, 128) for case in cases[6:])


def test_a_row_is_of_its_case():
    assert is_of(row(network="agln_nano", size="64x64"), CASES[1])
    assert not is_of(row(network="agln_nano", size="64x64"), CASES[2])


def test_a_lost_device_ends_the_run(monkeypatch):
    """With the status that tells a caller to start a new process."""
    monkeypatch.setattr(measure_module, "device_is_lost", lambda: True)
    monkeypatch.setattr(measure_module._Bench, "_open", lambda *_: (_ for _ in ()).throw(RuntimeError("CUDA error: x")))
    with pytest.raises(DeviceLostError, match=r"onnxruntime fp32 broke the device .*CUDA error: x.*--resume") as caught:
        measure([CASES[0]], [ENTRY], Options(frames=0, threads=1))
    assert caught.value.exit_code == 75
    monkeypatch.setattr(measure_module, "device_is_lost", lambda: False)
    with pytest.raises(BackendError, match="nothing could be measured"):
        measure([CASES[0]], [ENTRY], Options(frames=0, threads=1))
