"""The times around an engine: what the table and the file hold, and that the goals are met."""

from __future__ import annotations

import numpy as np
import pytest

import agln_fast
from agln_fast.bench.jobs import pipeline
from agln_fast.bench.race.results import load_results


def test_rows_of_every_engine_and_size(small_network, tmp_path, monkeypatch, capsys):
    sizes = ((64, 96), (256, 384))
    monkeypatch.setattr(pipeline, "GOALS_MS", dict.fromkeys(sizes, 1.0))
    built = agln_fast.build(
        small_network(), tmp_path / "logits", size=(64, 96), precision="fp32", plan="none", output="logits"
    )
    pipeline.main([str(built.path), "--rounds", "3", "-o", str(tmp_path / "times.json")])
    assert "onnxruntime-fp32" in capsys.readouterr().out
    found = load_results(tmp_path / "times.json", "pipeline")
    names = {engine.name for engine in built.manifest.engines if engine.target == "cpu"}
    assert {(row.engine_name, row.height, row.width) for row in found.rows} == {
        (name, *size) for name in names for size in sizes
    }
    for row in found.rows:
        columns = [row.pre_ms, row.engine_ms, row.post_ms, row.pre_and_post_ms]
        assert np.isfinite(columns).all()
        assert min(columns) > 0
    assert found.machine["cpu"]
    assert "--rounds 3" in found.command


@pytest.mark.slow
def test_what_is_done_around_an_engine_meets_the_goals(tmp_path):
    """By the least of the rounds: other work on the machine makes some of them slow, pools that fight make all so."""
    built = agln_fast.build(
        "agln_nano", tmp_path / "nano", size=(128, 128), precision="fp32", plan="none", output="logits"
    )
    rows = pipeline.measure(built.path, rounds=15)
    least = {(row.engine_name, row.height, row.width): row.least_pre_and_post_ms for row in rows}
    for engine in ("onnxruntime-fp32", "openvino-fp32"):
        for size, goal in pipeline.GOALS_MS.items():
            assert least[engine, *size] <= goal
