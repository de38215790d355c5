"""`--weights NAME`: which of a checkpoint's weights each verb takes, and what `inspect` says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import agln_fast


@pytest.fixture(scope="module")
def several(small_network, tmp_path_factory) -> Path:
    """A network of 5 classes, and a moving average that has 3, so that one sees which was taken."""
    path = tmp_path_factory.mktemp("several") / "best.ckpt"
    states = [small_network("fpn_resnet18", num_classes=classes).state_dict() for classes in (5, 3)]
    half = {f"module.{name}": t.half() if t.is_floating_point() else t for name, t in states[0].items()}
    torch.save({"model": half, "model_ema": states[1], "epoch": 2}, path)
    return path


@pytest.mark.parametrize(("wanted", "classes"), [((), 5), (("--weights", "model"), 5), (("--weights", "ema"), 3)])
def test_inspect_shows_what_was_taken_and_says_how(wanted, classes, several, cli):
    code, text, _ = cli("inspect", several, *wanted, "--json")
    shown = json.loads(text)
    assert (code, shown["model"]["num_classes"]) == (0, classes)
    first = "'model' and 'model_ema'" if classes == 5 else "'model_ema' and 'model'"
    assert shown["weights"].startswith(f"holds weights under {first}; those of ")
    assert ("tensors of float16 converted to float32" in shown["weights"]) == (classes == 5)
    assert shown["weights"].endswith("; not used: epoch")
    assert shown["weights"] in cli("inspect", several, *wanted)[1].splitlines()


def test_inspect_has_nothing_to_say_of_a_plain_file_or_a_preset(small_network, cli, tmp_path):
    torch.save(small_network("fpn_resnet18").state_dict(), tmp_path / "x.pth")
    for model in (tmp_path / "x.pth", "fpn_resnet18"):
        assert json.loads(cli("inspect", model, "--json")[1])["weights"] is None
        assert len([line for line in cli("inspect", model)[1].splitlines() if ": architecture fpn" in line]) == 1


def test_inspect_takes_the_folder_of_a_training(small_network, cli, tmp_path):
    agln_fast.save_checkpoint(small_network("fpn_resnet18"), tmp_path / "weights.safetensors")
    (tmp_path / "config.yaml").write_text("model: null\n")
    code, text, _ = cli("inspect", tmp_path, "--json")
    assert (code, json.loads(text)["model"]["num_classes"]) == (0, 5)


def test_build_takes_them(several, cli, tmp_path):
    arguments = ["-o", tmp_path / "x.agln", "--size", "64x64", "--precision", "fp32", "--plan", "none"]
    assert cli("build", several, *arguments, "--weights", "ema")[0] == 0
    assert agln_fast.open_bundle(tmp_path / "x.agln").manifest.model.num_classes == 3


def test_eval_takes_them_on_both_sides(several, cli, monkeypatch):
    taken = []
    load = agln_fast.models.checkpoint.load_checkpoint

    def look(path, config=None, *, weights=None):
        taken.append(weights)
        return load(path, config, weights=weights)

    monkeypatch.setattr(agln_fast.models.checkpoint, "load_checkpoint", look)
    arguments = ["--size", "64x64", "-n", 1, "--weights", "model", "--compare", several, "--compare-weights", "ema"]
    cli("eval", several, *arguments)
    assert taken == ["model", "ema"]


@pytest.mark.parametrize(
    "verb",
    [
        ["inspect", "{several}"],
        ["build", "{several}", "-o", "{new}.agln"],
        ["eval", "{several}"],
        ["visualize", "{several}", "{image}", "-o", "{new}.png"],
        ["train", "--from", "{several}", "-o", "{new}", "--accelerator", "cpu"],
    ],
    ids=lambda verb: verb[0],
)
def test_every_verb_tells_what_is_not_there(verb, several, cli, tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "image.png")
    places = {"several": several, "new": tmp_path / "new", "image": tmp_path / "image.png"}
    code, _, error = cli(*(word.format(**places) for word in verb), "--weights", "teacher")
    assert (code, "holds no weights under 'teacher': it has them under 'model' and 'model_ema'" in error) == (3, True)
    assert [path.name for path in tmp_path.iterdir()] == ["image.png"]
