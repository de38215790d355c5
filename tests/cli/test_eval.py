"""`agln-fast eval` as a person types it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import agln_fast
from agln_fast.data import registry
from agln_fast.data.classes import class_set
from agln_fast.data.dataset import Sample, SegmentationDataset

SMALL = ("--size", "64x96", "-n", "2")


@pytest.fixture(scope="module")
def checkpoint(small_network, tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "scenes.safetensors"
    agln_fast.save_checkpoint(small_network(num_classes=12), path)
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory):
    """Of the same network: every fp32 engine for the CPU, at the size of the scenes."""
    path = tmp_path_factory.mktemp("eval") / "scenes.agln"
    return agln_fast.build(checkpoint, path, size=(64, 96), output="logits", precision="fp32", classes="scenes").path


def test_a_table_of_classes_and_the_means(cli, checkpoint):
    code, out, _ = cli("eval", checkpoint, *SMALL)
    assert code == 0
    assert "torch-fp32 on cpu: scenes val, 2 images" in out
    for name in class_set("scenes").classes:
        assert name in out
    for word in ("IoU", "accuracy", "share of pixels", "mIoU", "pixel accuracy", "mean accuracy", "ms an image"):
        assert word in out


def test_json(cli, checkpoint):
    code, out, _ = cli("eval", checkpoint, *SMALL, "--split", "train", "--json")
    values = json.loads(out)
    assert code == 0
    assert (values["samples"], values["split"], values["dataset"], values["tta"]) == (2, "train", "scenes", None)
    assert np.sum(values["confusion"]) == 2 * 64 * 96
    assert len(values["classes"]) == 12


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", pytest.param("openvino", marks=pytest.mark.openvino)])
def test_every_engine_has_the_miou_of_the_checkpoint(backend, cli, checkpoint, bundle):
    """fp32 engines agree on 99.9 % of the pixels; 0.2 points of mIoU is what evaluation promises."""
    reference = json.loads(cli("eval", checkpoint, *SMALL, "--json")[1])
    values = json.loads(cli("eval", bundle, "--backend", backend, *SMALL, "--json")[1])
    assert values["engine"] == f"{backend}-fp32"
    assert values["mean_iou"] == pytest.approx(reference["mean_iou"], abs=0.002)


def test_bf16_is_within_half_a_point(cli, checkpoint):
    exact = json.loads(cli("eval", checkpoint, *SMALL, "--json")[1])
    rounded = json.loads(cli("eval", checkpoint, *SMALL, "--precision", "bf16", "--json")[1])
    assert rounded["precision"] == "bf16"
    assert rounded["confusion"] != exact["confusion"]
    assert rounded["mean_iou"] == pytest.approx(exact["mean_iou"], abs=0.005)


def test_augmentation_and_its_settings(cli, bundle):
    options = ("--backend", "torch", *SMALL, "--tta", "--scales", "0.5,1", "--no-flip", "--base-size", "100")
    values = json.loads(cli("eval", bundle, *options, "--json")[1])
    assert values["tta"] == {"scales": [0.5, 1.0], "flip": False, "base_size": 100}
    assert "2 images, 2 scales" in cli("eval", bundle, *options)[1]


def test_comparing_two_engines(cli, checkpoint, tmp_path):
    pictures = tmp_path / "confusion.png", tmp_path / "flips.svg"
    options = (*SMALL, "--compare", checkpoint, "--compare-precision", "bf16")
    code, out, _ = cli("eval", checkpoint, *options, "--confusion", pictures[0], "--flips", pictures[1])
    assert code == 0
    for word in ("IoU torch-fp32", "IoU torch-bf16", "difference", "labels differ on", "worst images: val_00000"):
        assert word in out
    assert np.asarray(Image.open(pictures[0]).convert("L")).std() > 10
    assert pictures[1].read_text().startswith("<?xml")
    values = json.loads(cli("eval", checkpoint, *options, "--json")[1])
    assert 0 < values["weighted_disagreement"] < values["disagreement"] < 0.1


def test_an_engine_compared_with_itself(cli, checkpoint, tmp_path):
    code, out, err = cli("eval", checkpoint, *SMALL, "--compare", checkpoint, "--flips", tmp_path / "x.png")
    assert code == 0
    assert "A: torch-fp32" in out
    assert "the engines agree on every pixel" in err
    assert not (tmp_path / "x.png").exists()


class _Photographs(SegmentationDataset):
    class_set, split = class_set("scenes"), "val"

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Sample:
        if index:
            raise IndexError(index)
        return Sample(np.zeros((70, 50, 3), np.uint8), np.zeros((70, 50), np.uint8), "x")


def test_checkpoints_slide_over_photographs(cli, checkpoint, bundle, monkeypatch):
    seen = []

    def opened(name, split, root, *, size, length, skip_bad):
        seen.append((name, split, root, size, length))
        return _Photographs()

    monkeypatch.setattr(registry, "open_dataset", opened)
    photographs = ("--data", "ade20k", "--data-root", "somewhere")
    assert json.loads(cli("eval", checkpoint, *photographs, "--size", "64x64", "--json")[1])["samples"] == 1
    assert seen[0][0] == "ade20k"
    assert str(seen[0][2]) == "somewhere"
    assert seen[0][3:] == (None, None)
    assert cli("eval", checkpoint, *photographs)[0] == 0
    code, _, err = cli("eval", bundle, *photographs, "--size", "64x64")
    assert code == 2
    assert "the engines of a bundle have theirs" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--flips", "x.png"), 2, "name the second one with --compare"),
        (("--scales", "1"), 2, "settings of --tta: add it"),
        (("--no-flip",), 2, "settings of --tta: add it"),
        (("--tta", "--scales", "1;2"), 2, "scales '1;2': give numbers, such as 0.5,1,1.5"),
        (("--tta", "--scales", "0"), 2, "needs numbers above 0"),
        (("--confusion", "x.gif"), 4, "suffix '.gif' is none for figures: use .png, .svg, .pdf"),
        (("--confusion", "nowhere/x.png"), 4, "there is no folder nowhere; create it"),
        (
            ("--backend", "openvino"),
            2,
            "PyTorch runs checkpoints (fused, torch); for backend 'openvino' build a bundle",
        ),
        (("--data", "scene"), 2, "did you mean 'scenes'"),
        (("--size", "64"), 2, "give height x width"),
        (("--precision", "int8"), 2, "unknown precision 'int8'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_named_before_any_work(arguments, code, message, cli, checkpoint):
    got, _, err = cli("eval", checkpoint, "-n", "2", *arguments)
    assert got == code
    assert message in err.replace("\n", " ")


def test_other_mistakes(cli, checkpoint, small_checkpoint, tmp_path, monkeypatch):
    code, _, err = cli("eval", small_checkpoint, *SMALL)
    assert code == 2
    assert "has 5 classes, dataset scenes has 12" in err
    assert cli("eval", tmp_path / "none.agln", *SMALL)[0] == 3
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = cli("eval", checkpoint, *SMALL, "--confusion", tmp_path / "x.png")
    assert code == 6
    assert "agln-fast[eval]" in err
