"""The comparison of whole networks, on small ones: what is measured, in which order, and what a failure costs."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch

from agln_fast.bench.pages.tables import model_table
from agln_fast.bench.race import models
from agln_fast.bench.race.models import CONTESTANTS, Case, compare, jobs, main
from agln_fast.bench.race.report import DEVICE_LOST, Report

CASE = Case("agln_nano", (64, 96), 2, "bf16", 5)
CPU = torch.device("cpu")


def test_contestants_are_compared_with_eager_float32(capsys):
    report = Report(None)
    compare(CASE, ["eager", "autocast", "fused"], CPU, report, rounds=2)
    rows = {row["contestant"]: row for row in report.rows}
    assert list(rows) == ["eager", "autocast", "fused"]
    assert rows["eager"]["agreement"] == 1
    for row in rows.values():
        assert row["case"] == "agln_nano 64x96 batch 2 bf16"
        assert row["agreement"] > 0.8
        assert 0 < row["median_ms"] <= row["p95_ms"]
        assert row["images_per_second"] == pytest.approx(2e3 / row["median_ms"])
        assert row["rounds"] == 2
        assert row["speedup"] is None
    assert rows["fused"]["agreement"] < 1, "bfloat16 changes some label of a random network"


def test_speedup_is_against_compile(monkeypatch):
    """Its part is taken by a slower network: compiling takes minutes."""

    def slow(subject):
        run = CONTESTANTS["eager"](subject)
        return lambda: [run() for _ in range(5)].pop()

    monkeypatch.setitem(CONTESTANTS, "compile", slow)
    report = Report(None)
    compare(CASE, ["eager", "compile"], CPU, report, rounds=5)
    assert [row["speedup"] for row in report.rows] == [pytest.approx(5, rel=0.6), 1]


def test_failure_costs_no_other_contestant(monkeypatch):
    def fails(subject):
        raise RuntimeError("no such kernel")

    monkeypatch.setitem(CONTESTANTS, "fused", fails)
    report = Report(None)
    compare(CASE, ["fused", "eager"], CPU, report, rounds=1)
    failed, measured = report.rows
    assert failed["error"].startswith("RuntimeError: no such kernel\n")
    assert measured["median_ms"] > 0
    assert model_table(report.rows).splitlines()[-1].endswith("bf16 fused: RuntimeError: no such kernel")
    # What failed is not tried again; with nothing else to measure, nothing is done.
    monkeypatch.setattr(models, "_open", None)
    compare(CASE, ["fused", "eager"], CPU, report, rounds=1)
    assert report.rows == [failed, measured]


def test_lost_device_leaves_the_others_to_the_next_process(monkeypatch):
    def fails(subject):
        monkeypatch.setattr(models, "device_is_lost", lambda: True)
        raise RuntimeError("an illegal memory access was encountered")

    report = Report(None)
    with monkeypatch.context() as patch:
        patch.setitem(CONTESTANTS, "fused", fails)
        compare(CASE, ["eager", "fused", "autocast"], CPU, report, rounds=1)
    assert [row["contestant"] for row in report.rows] == ["fused"]
    monkeypatch.undo()
    compare(CASE, ["eager", "fused", "autocast"], CPU, report, rounds=1)
    assert ["error" in row for row in report.rows] == [True, False, False]


def test_order_of_the_jobs():
    cases = [Case(name, (64, 64), 1, "fp16") for name in "abcde"]
    found = [(case.network, names == ["eager", "compile"]) for case, names in jobs(cases, ["eager", "compile"])]
    assert found == [
        *((name, whole) for name in "abc" for whole in (False, True)),
        ("d", False), ("e", False), ("d", True), ("e", True),
    ]  # fmt: skip
    assert [names for _, names in jobs(cases[:1], ["eager", "fused"])] == [["eager", "fused"]]


@pytest.fixture
def arguments(tmp_path):
    common = ["--sizes", "64x64", "--batches", "1", "--device", "cpu", "--rounds", "1", "--num-classes", "5"]
    return [*common, "--out", str(tmp_path / "models.json")], tmp_path / "models.json"


def test_command_writes_everything_and_says_what_failed(arguments, monkeypatch):
    options, path = arguments
    monkeypatch.setattr(models, "list_checkpoints", lambda: ["agln_nano"])
    options += ["--networks", "no_such_network", "fpn_nano", "--contestants", "eager", "--precision", "bf16"]
    assert main(options) == 1
    report = json.loads(path.read_text())
    assert report["machine"]["torch"] == version("torch")
    checkpoint, failed, measured = report["rows"]
    assert checkpoint["case"] == "agln_nano checkpoint 128x128 bf16"
    assert 0.98 < checkpoint["agreement"] < 1
    assert "unknown model 'no_such_network'" in failed["error"]
    assert measured["case"].startswith("fpn_nano")
    assert measured["median_ms"] > 0


def test_command_without_time_leaves_everything_out(arguments, monkeypatch):
    options, path = arguments
    monkeypatch.setattr(models, "list_checkpoints", list)
    assert main([*options, "--networks", "fpn_nano", "--contestants", "eager", "--budget", "0"]) == 0
    (row,) = json.loads(path.read_text())["rows"]
    assert row["left_out"] == "the time was over"


def test_interrupted_command_says_what_it_left_out(arguments, monkeypatch):
    def fails(subject):
        raise RuntimeError("no such kernel")

    def interrupted(subject):
        raise KeyboardInterrupt

    options, path = arguments
    monkeypatch.setattr(models, "list_checkpoints", list)
    monkeypatch.setitem(CONTESTANTS, "eager", fails)
    monkeypatch.setitem(CONTESTANTS, "fused", interrupted)
    monkeypatch.setattr(models, "_eager", CONTESTANTS["autocast"])
    assert main([*options, "--networks", "fpn_nano", "agln_nano", "--contestants", "eager", "fused"]) == 1
    rows = json.loads(path.read_text())["rows"]
    found = [(row["case"][:4], row["contestant"], "error" in row, "left_out" in row) for row in rows]
    assert sorted(found) == [
        ("agln", "eager", False, True),
        ("agln", "fused", False, True),
        ("fpn_", "eager", True, False),
        ("fpn_", "fused", False, True),
    ]


def test_command_stops_when_the_device_is_lost(arguments, monkeypatch):
    options, path = arguments
    monkeypatch.setattr(models, "list_checkpoints", lambda: ["fpn_nano"])
    monkeypatch.setattr(models, "device_is_lost", lambda: True)
    assert main([*options, "--networks", "fpn_nano"]) == DEVICE_LOST
    assert len(json.loads(path.read_text())["rows"]) == 1
