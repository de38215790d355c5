"""The times around an engine: what the table and the file hold, and that no pools fight."""

from __future__ import annotations

import json

import numpy as np

from agln_fast.bench import pipeline
from agln_fast.export.build import build


def test_rows_of_every_engine_and_size(small_network, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "SIZES", ((64, 96), (256, 384)))
    built = build(small_network(), tmp_path / "logits", size=(64, 96), precision="fp32", plan="none", output="logits")
    pipeline.main([str(built.path), "--rounds", "3", "-o", str(tmp_path / "times.json")])
    assert "onnxruntime-fp32" in capsys.readouterr().out
    found = json.loads((tmp_path / "times.json").read_text())
    rows = found["rows"]
    names = {engine.name for engine in built.manifest.engines if engine.target == "cpu"}
    assert {(row["engine_name"], row["height"], row["width"]) for row in rows} == {
        (name, *size) for name in names for size in ((64, 96), (256, 384))
    }
    for row in rows:
        columns = [row[f"{part}_ms"] for part in ("pre", "engine", "post", "pre_and_post")]
        assert np.isfinite(columns).all()
        assert min(columns) > 0
        # Less than 1 ms; a pool that waits for another one takes 4 to 30, every time.
        assert row["least_pre_and_post_ms"] < 50
    assert found["machine"]["cpu"]
    assert found["rounds"] == 3
