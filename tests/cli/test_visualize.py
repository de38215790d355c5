"""`agln-fast visualize` as a person types it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import agln_fast
from agln_fast.errors import ConfigError


@pytest.fixture
def visualize(cli, monkeypatch, small_checkpoint, tmp_path):
    """`visualize(…)` runs the verb on a checkpoint, `photo.png` and `out.png`; exit code, standard output and error."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    Image.fromarray(np.tile(np.arange(4, dtype=np.uint8), (48, 16))).save(tmp_path / "truth.png")
    monkeypatch.chdir(tmp_path)

    def call(*options, checkpoint=small_checkpoint, output="out.png"):
        return cli("visualize", checkpoint, "photo.png", "-o", output, *options)

    return call


def test_writes_a_figure(visualize, tmp_path):
    code, out, err = visualize("--labels", "truth.png", "--descriptors", 2, "--channels", 2, "--level", 0)
    assert (code, out, err) == (0, "wrote out.png\n", "")
    with Image.open(tmp_path / "out.png") as figure:
        assert figure.width > 2000
        assert np.asarray(figure.convert("L")).std() > 10


def test_size_and_classes_reach_the_figure(visualize, monkeypatch):
    seen = []

    def draw(features, classes, **options):
        seen.append((features, classes, options))
        raise ConfigError("enough")

    monkeypatch.setattr("agln_fast.figures.features.draw_features", draw)
    options = ("--labels", "truth.png", "--size", "32x96", "--classes", "ade20k", "--level", 1, "--block", 0)
    assert visualize(*options, "--descriptors", 3, "--channels", 4) == (2, "", "error: enough\n")
    features, classes, options = seen[0]
    assert features.image.shape == (32, 96, 3)
    assert (features.level, features.block) == (1, 0)
    assert options["truth"].shape == (32, 96)
    assert set(np.unique(options["truth"])) == {0, 1, 2, 3}
    assert (options["descriptors"], options["channels"]) == (3, 4)
    assert options["title"] == "small.safetensors on photo.png"
    assert classes.name == "ade20k"
    visualize()
    features, classes, options = seen[1]
    assert features.image.shape == (48, 64, 3)
    assert (features.level, features.block, options["truth"]) == (2, 2, None)
    assert classes.name == "generic_5"


def test_ignored_pixels_stay_ignored(visualize, tmp_path):
    Image.fromarray(np.full((48, 64), 255, np.uint8)).save(tmp_path / "truth.png")
    assert visualize("--labels", "truth.png", "--descriptors", 1, "--channels", 1)[0] == 0


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (Image.new("L", (64, 47)), "64x47 pixels in mode L; ground truth is 64x48"),
        (Image.new("RGB", (64, 48)), "64x48 pixels in mode RGB"),
        (Image.new("L", (64, 48), 5), "class id 5, but the network has 5 classes"),
        (None, "is no readable PNG"),
    ],
    ids=["size", "mode", "class id", "damaged"],
)
def test_refused_labels(visualize, tmp_path, truth, message):
    if truth is None:
        (tmp_path / "truth.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    else:
        truth.save(tmp_path / "truth.png")
    code, _, err = visualize("--labels", "truth.png")
    assert code == 4
    assert message in err
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--level", "3"], 2, "level 3"),
        (["--size", "big"], 2, "size 'big'"),
        (["--classes", "scenes"], 2, "class set 'scenes' has 12 classes, the network 5"),
        (["--descriptors", "0"], 2, "descriptors 0"),
        (["--labels", "missing.png"], 4, "missing.png: is no readable PNG (No such file"),
    ],
    ids=["level", "size", "classes", "descriptors", "missing labels"],
)
def test_refused_options(visualize, options, code, message):
    found, _, err = visualize(*options)
    assert found == code
    assert message in err


def test_refused_output(visualize):
    code, _, err = visualize(output="out.jpg")
    assert code == 4
    assert "suffix '.jpg'" in err


@pytest.mark.parametrize("name", ["fcn8s", "fcn_concat"])
def test_fcn_has_nothing_to_show(name, visualize, small_network, tmp_path):
    agln_fast.save_checkpoint(small_network(f"{name}_resnet18"), tmp_path / "fcn.safetensors")
    code, _, err = visualize(checkpoint=tmp_path / "fcn.safetensors")
    assert code == 2
    assert "has no pyramid of features" in err
