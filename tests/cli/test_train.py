"""`agln-fast train` and `agln-fast scenes`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from PIL import Image

from agln_fast.training.config import TrainingConfig

YAML = """
model: fpn_nano
accelerator: cpu
batch_size: 2
crop: 64
base_size: 64
train_samples: 2
val_samples: 1
epochs: 3
"""


def test_every_field_of_the_config_is_a_flag(cli):
    code, text, _ = cli("train", "--help")
    assert code == 0
    for field in fields(TrainingConfig):
        assert f"--{field.name.replace('_', '-')}" in text


def test_yaml_flags_table_and_json(cli, tmp_path):
    (tmp_path / "config.yaml").write_text(YAML)
    run = tmp_path / "run"
    code, text, _ = cli("train", "--config", tmp_path / "config.yaml", "--epochs", 1, "--seed", 3, "-o", run)
    assert code == 0
    assert "fpn_nano on scenes, seed 3" in text
    assert str(run / "weights.safetensors") in text
    assert "epochs: 1.0" in (run / "config.yaml").read_text()

    again = ["train", "--config", run / "config.yaml", "-o", run]
    code, _, error = cli(*again)
    assert code == 2
    assert "holds a training already" in error
    code, text, _ = cli(*again, "--resume", "--json")
    assert code == 0
    (row,) = json.loads(text)["log"]
    assert (row["iteration"], row["epoch"]) == (1, 1.0)


def test_errors_of_train(cli, tmp_path):
    for arguments, code, message in (
        (["--model", "fpn_nan"], 2, "did you mean 'fpn_nano'"),
        (["--data", "ade20k"], 2, "--data-root"),
        (["--base-lr", "-1"], 2, "must be from"),
        (["--config", tmp_path / "nothing.yaml"], 2, "cannot be read"),
        (["--encoder-weights", tmp_path / "nothing.pth"], 3, "no such file"),
    ):
        found, _, error = cli("train", "-o", tmp_path / "run", "--accelerator", "cpu", *arguments)
        assert (found, message in error) == (code, True), error


def test_scenes_are_written(cli, tmp_path):
    folder = tmp_path / "scenes"
    code, text, _ = cli("scenes", "--write", folder, "-n", 2, "--size", "32x48", "--split", "val")
    assert code == 0
    assert "2 images" in text
    for kind in ("images", "labels"):
        assert [Image.open(path).size for path in sorted((folder / kind).iterdir())] == [(48, 32)] * 2
    code, text, _ = cli("scenes", "--write", folder, "-n", 1, "--size", "32x48", "--json")
    assert json.loads(text)["number"] == 1
    assert Path(json.loads(text)["images"]) == folder / "images"
    assert cli("scenes", "--write", folder, "--size", "8x8")[0] == 2
