"""The checkpoints that ship: what they are, that every engine keeps their accuracy, and that the model card is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import agln_fast
from agln_fast.data.dataset import CachedDataset
from agln_fast.data.scenes import SCENE_SIZE, Scenes
from agln_fast.evaluation.evaluate import Evaluation, evaluate
from agln_fast.models.config import preset
from agln_fast.models.shipped import find_checkpoint, list_checkpoints
from agln_fast.runtime.networks import load_network

NAMES = ("agln_lite_nano", "agln_nano", "fpn_nano")


@pytest.fixture(scope="module")
def scenes() -> CachedDataset:
    return CachedDataset(Scenes("test"))


@pytest.fixture(scope="module")
def evaluations(scenes: CachedDataset) -> dict[str, Evaluation]:
    """Every shipped network in fp32 on the whole test split."""
    found = {}
    for name in NAMES:
        with load_network(name, size=SCENE_SIZE, resize="stretch") as segment:
            found[name] = evaluate(segment, scenes)
    return found


def test_these_ship() -> None:
    assert list_checkpoints() == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_they_are_small_and_what_their_name_says(name: str) -> None:
    network = agln_fast.load_checkpoint(name)
    assert network.config == preset(name, 12)
    assert sum(parameter.numel() for parameter in network.parameters()) <= 2e6
    assert find_checkpoint(name).stat().st_size < 10e6
    assert all(parameter.dtype == torch.float32 for parameter in network.parameters())


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "agln_nano").write_bytes(b"mine")
    assert find_checkpoint("agln_nano") == Path("agln_nano")
    assert find_checkpoint("fpn_nano").is_absolute()


@pytest.mark.slow
def test_attention_beats_the_baseline(evaluations: dict[str, Evaluation]) -> None:
    miou = {name: evaluation.metrics.mean_iou for name, evaluation in evaluations.items()}
    assert miou["agln_nano"] > miou["fpn_nano"]
    assert min(miou.values()) > 0.4  # twelve classes by chance: 0.04


@pytest.mark.slow
def test_the_model_card_is_true(evaluations: dict[str, Evaluation]) -> None:
    card = (find_checkpoint("agln_nano").parent / "README.md").read_text(encoding="utf-8")
    for name, evaluation in evaluations.items():
        row = re.search(rf"^\| `{name}` \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|", card, re.MULTILINE)
        assert row is not None
        # Convolutions on another processor round otherwise, and flip a few pixels.
        assert float(row[1]) == pytest.approx(100 * evaluation.metrics.mean_iou, abs=0.05)
        assert float(row[2]) == pytest.approx(100 * evaluation.metrics.pixel_accuracy, abs=0.05)


@pytest.mark.slow
@pytest.mark.openvino
def test_every_engine_keeps_the_accuracy(
    evaluations: dict[str, Evaluation], scenes: CachedDataset, tmp_path: Path
) -> None:
    """mIoU within 0.2 points through each fp32 engine, and within 0.5 points in half precision."""
    expected = evaluations["agln_nano"].metrics.mean_iou
    bundle = agln_fast.build("agln_nano", tmp_path / "agln", size=SCENE_SIZE, precision="fp32")
    assert bundle.manifest.classes == scenes.class_set.classes
    names = {engine.name for engine in bundle.manifest.engines}
    assert names == {"torch-fp32", "fused-fp32", "onnxruntime-fp32", "openvino-fp32"}
    for backend in ("torch", "fused", "onnxruntime", "openvino"):
        with agln_fast.load(bundle, backend) as segment:
            assert evaluate(segment, scenes).metrics.mean_iou == pytest.approx(expected, abs=0.002)
    for backend, precision in (("torch", "bf16"), ("fused", "bf16"), ("fused", "fp16")):
        segment = load_network(
            "agln_nano", size=SCENE_SIZE, resize="stretch", backend=backend, precision=precision, device="cpu"
        )
        assert evaluate(segment, scenes).metrics.mean_iou == pytest.approx(expected, abs=0.005)
