"""A folder of one's own in every verb, as a person types it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import agln_fast
from agln_fast.models.checkpoint import load_checkpoint

NAMES = ("sky", "road", "tree", "car", "hut")
COLOURS = ((1, 2, 3), (200, 0, 0), (0, 200, 0), (0, 0, 200), (9, 9, 9))


@pytest.fixture
def home(tmp_path):
    """Six images of 64x96, masks in colours that are half one class and half the next; four train, two val."""
    home = tmp_path / "my street"
    for folder in ("images", "masks"):
        (home / folder).mkdir(parents=True)
    random = np.random.default_rng(0)
    for index in range(6):
        Image.fromarray(random.integers(0, 256, (64, 96, 3), np.uint8)).save(home / f"images/photo {index}.png")
        mask = np.empty((64, 96, 3), np.uint8)
        mask[:32], mask[32:] = COLOURS[index % 5], COLOURS[(index + 1) % 5]
        Image.fromarray(mask).save(home / f"masks/photo {index}.png")
    classes = [{"name": name, "color": list(colour)} for name, colour in zip(NAMES, COLOURS, strict=True)]
    (home / "classes.json").write_text(json.dumps(classes))
    (home / "train.txt").write_text("".join(f"photo {index}\n" for index in range(4)))
    (home / "val.txt").write_text("photo 4\nphoto 5\n")
    return home


@pytest.fixture
def damaged(home):
    (home / "images/photo 5.png").write_bytes(b"none")
    return home


def test_data_shows_counts_shares_warnings_and_a_picture(cli, home, tmp_path):
    code, out, _ = cli("data", home, "-o", tmp_path / "picture.png")
    assert code == 0
    for text in ("images and masks, 5 classes", "train", "val", "64x96", "warning: val: 2 samples are few", "hut"):
        assert text in out
    assert np.asarray(Image.open(tmp_path / "picture.png").convert("L")).std() > 10
    values = json.loads(cli("data", home, "--json")[1])
    assert values["splits"]["train"]["samples"] == 4
    assert values["splits"]["train"]["classes"]["sky"] == {"pixels": 0.125, "images": 0.25}
    assert values["splits"]["val"]["sizes"] == {"min": [64, 96], "median": [64, 96], "max": [64, 96]}
    assert any("never" in line or "not in val" in line for line in values["warnings"])
    assert list(json.loads(cli("data", home, "--split", "val", "-n", 1, "--json")[1])["splits"]) == ["val"]


def test_data_of_the_published_kinds(cli):
    values = json.loads(cli("data", "scenes", "-n", 2, "--json")[1])
    assert (values["kind"], {name: split["samples"] for name, split in values["splits"].items()}) == (
        "scenes",
        {"train": 2, "val": 2},
    )


def test_data_names_what_is_broken(cli, damaged):
    (damaged / "masks/photo 0.png").unlink()
    code, out, err = cli("data", damaged)
    assert (code, "64x96" in out) == (9, True)
    assert "photo 0.png: has no mask" in err
    assert "photo 5.png: cannot be read" in err
    assert "2 of 6 samples cannot be used" in err
    code, _, err = cli("data", damaged, "--skip-bad")
    assert code == 0
    assert "left out 2 of 6 samples" in err


def test_eval(cli, home, damaged, small_checkpoint):
    code, _, err = cli("eval", small_checkpoint, "--data", home, "--size", "64x96")
    assert (code, "photo 5.png" in err) == (9, True)
    code, out, err = cli("eval", small_checkpoint, "--data", home, "--size", "64x96", "--skip-bad", "--json")
    assert (code, json.loads(out)["samples"], json.loads(out)["dataset"]) == (0, 1, "my street")
    assert "val: left out 1 samples" in err
    assert [row["name"] for row in json.loads(out)["classes"]] == list(NAMES)


def test_another_number_of_classes_is_told_before_anything_runs(cli, home, bundle, small_checkpoint, tmp_path):
    (home / "classes.json").write_text('{"a": [1, 2, 3], "b": [200, 0, 0]}')
    told = "has 5 classes, dataset my street has 2: take the dataset that the network was trained on"
    for verb in (
        ("eval", small_checkpoint, "--data", home),
        ("verify", bundle.path, "--data", home),
        ("build", small_checkpoint, "-o", tmp_path / "x.agln", "--data", home, "--precision", "fp32"),
    ):
        code, _, err = cli(*verb)
        assert (code, told in err) == (2, True), err
    assert not (tmp_path / "x.agln").exists()


def test_verify_tells_agreement_and_miou(cli, home, bundle):
    code, out, _ = cli("verify", bundle.path, "--data", home, "--split", "train", "-n", "3")
    assert code == 0
    assert "torch-fp32" in out
    assert "mIoU on my street train, 3 images" in out
    values = json.loads(cli("verify", bundle.path, "--data", home, "--json")[1])
    assert {check["images"] for check in values["engines"].values()} == {2}
    judged = json.loads(cli("eval", bundle.path, "--backend", "torch", "--data", home, "--json")[1])
    assert values["miou"]["torch-fp32"] == pytest.approx(judged["mean_iou"], abs=1e-6)
    code, _, err = cli("verify", bundle.path, "--data", home, "--samples", home / "images")
    assert (code, "give one of them" in err) == (2, True)


def test_build_takes_names_and_pictures_of_the_data(cli, home, small_checkpoint, tmp_path):
    code, _, err = cli(
        "build", small_checkpoint, "-o", tmp_path / "x.agln", "--size", "64x96", "--precision", "fp32", "--data", home
    )
    assert code == 0, err
    manifest = agln_fast.open_bundle(tmp_path / "x.agln").manifest
    assert (manifest.classes, manifest.palette) == (NAMES, COLOURS)
    assert {engine.verification.images for engine in manifest.engines} == {2}


def test_build_takes_a_class_file(cli, small_checkpoint, tmp_path):
    for text, code, told in (('{"a": [1, 2, 3]}', 2, "1 names for a network of 5 classes"), ("{", 9, "not JSON")):
        (tmp_path / "c.json").write_text(text)
        found, _, err = cli("build", small_checkpoint, "-o", tmp_path / "x.agln", "--classes", tmp_path / "c.json")
        assert (found, told in err) == (code, True), err


def test_training_remembers_the_classes(cli, home, tmp_path, monkeypatch):
    monkeypatch.chdir(home.parent)
    options = ("--model", "fpn_nano", "--epochs", "1", "--batch-size", "2", "--crop", "64", "--base-size", "64")
    code, out, err = cli("train", "--data", "my street", "--accelerator", "cpu", *options, "-o", tmp_path / "run")
    assert code == 0, err
    assert "fpn_nano on" in out
    network = load_checkpoint(tmp_path / "run")
    assert network.config.num_classes == 5
    assert network.class_set is not None
    assert (network.class_set.name, network.class_set.classes) == ("my street", NAMES)
    assert network.class_set.palette == COLOURS
    # The folder is moved, the run goes on.
    home.rename(tmp_path / "moved")
    again = (
        "train",
        "--data",
        tmp_path / "moved",
        "--accelerator",
        "cpu",
        *options,
        "-o",
        tmp_path / "run",
        "--resume",
    )
    assert cli(*again)[0] == 0
    code, _, err = cli("eval", tmp_path / "run", "--data", tmp_path / "moved", "--size", "64x96")
    assert (code, "warning" in err) == (0, False)
    (tmp_path / "moved/classes.json").write_text(json.dumps(dict(zip(NAMES[::-1], COLOURS, strict=True))))
    _, _, err = cli("eval", tmp_path / "run", "--data", tmp_path / "moved", "--size", "64x96")
    assert "have other names: 0 is 'sky' and 'hut', 1 is" in err


def test_training_refuses_a_folder_without_splits_and_leaves_out_what_is_broken(cli, damaged, tmp_path):
    options = ("--model", "fpn_nano", "--epochs", "1", "--batch-size", "2", "--crop", "64", "--base-size", "64")
    verb = ("train", "--data", damaged, "--accelerator", "cpu", *options, "-o", tmp_path / "run")
    code, _, err = cli(*verb)
    assert (code, "photo 5.png" in err) == (9, True)
    code, _, err = cli(*verb[:-1], tmp_path / "again", "--skip-bad")
    assert (code, "val: left out 1 samples" in err) == (0, True)
    for file in ("train.txt", "val.txt"):
        (damaged / file).unlink()
    code, _, err = cli(*verb[:-1], tmp_path / "third")
    assert (code, "not divided into splits" in err) == (2, True)
