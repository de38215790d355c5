"""`agln-fast train` and `agln-fast scenes`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

from PIL import Image
from typer.main import get_command

import agln_fast
from agln_fast.cli.app import app
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
    options = {name for option in get_command(app).commands["train"].params for name in option.opts}
    assert {f"--{field.name.replace('_', '-')}" for field in fields(TrainingConfig)} < options
    code, text, _ = cli("train", "--help")
    assert code == 0
    assert "--from" in text


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


def test_from_starts_and_resume_goes_on_by_what_the_folder_says(cli, tmp_path):
    settings = ["--train-samples", 2, "--val-samples", 1, "--batch-size", 2, "--crop", 64, "--base-size", 64]
    run = tmp_path / "run"
    first = ["train", "--from", "fpn_nano", "--fresh-classifier", "--epochs", 1, *settings, "-o", run]
    code, text, error = cli(*first, "--json")
    assert code == 0
    said = f"starts from fpn_nano: {len(_entries()) - 2} tensors are loaded, 2 are fresh for other 12 classes"
    assert said in error
    assert json.loads(text)["start"].startswith(said)
    assert "model: null" in (run / "config.yaml").read_text()

    code, _, error = cli(*first, "--resume")
    assert code == 2
    assert "--from starts a training, --resume goes on with the one in" in error
    code, text, error = cli("train", "-o", run, "--resume")
    assert code == 0
    assert "starts from" not in error
    assert "fpn_nano on scenes, seed 0" in text
    code, _, error = cli("train", "-o", run, "--resume", "--epochs", 2)
    assert code == 2
    assert "holds another training, with epochs 1.0 instead of 2.0" in error


def _entries():
    return agln_fast.load_checkpoint("fpn_nano").state_dict()


def test_errors_of_train(cli, tmp_path):
    for arguments, code, message in (
        (["--model", "fpn_nan"], 2, "did you mean 'fpn_nano'"),
        (["--data", "ade20k"], 2, "--data-root"),
        (["--base-lr", "-1"], 2, "must be from"),
        (["--config", tmp_path / "nothing.yaml"], 2, "cannot be read"),
        (["--encoder-weights", tmp_path / "nothing.pth"], 3, "no such file"),
        (["--from", tmp_path / "nothing.pth"], 3, "no such file"),
        (["--from", "fpn_nan"], 3, "did you mean 'fpn_nano'"),
        (["--from", "fpn_nano", "--model", "agln_nano"], 2, "leave the model out, because the checkpoint tells"),
        (["--from", "fpn_nano", "--weights", "ema"], 3, "holds no weights under 'ema': it is one state dict"),
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
