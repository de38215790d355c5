"""Builds by the user's own data: what is kept, what stays in floating point, and that the numbers are true."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import agln_fast
from agln_fast.builder import pictures as pictures_module
from agln_fast.builder import workshop as workshop_module
from agln_fast.data.classes import ClassSet
from agln_fast.data.dataset import Sample, SegmentationDataset
from agln_fast.data.scenes import Scenes
from agln_fast.errors import ConfigError
from agln_fast.evaluation.evaluate import evaluate
from agln_fast.manifest import Manifest
from agln_fast.metrics import SegmentationMetrics
from agln_fast.runtime.networks import load_network

pytest.importorskip("openvino", reason="needs the package openvino")
pytest.importorskip("nncf", reason="needs the package nncf")

FOLDED = agln_fast.Plan(fold_batchnorm=True)
MODULE, BLOCK = "encoder.layer2.1", "encoder.stage2.1"
CLASSES = ClassSet("five", "five", tuple("abcde"), tuple((i, i, i) for i in range(5)))


class Mine(SegmentationDataset):
    """Twelve pictures, and as masks what a network makes of them, so that the network's own mIoU is 1."""

    class_set, split = CLASSES, "mine"

    def __init__(self, network):
        self._images = [sample.image for sample in Scenes("val", size=(64, 64), length=12)]
        deployed = load_network(network, size=(64, 64), resize="stretch")
        self._masks = [deployed(image).labels.astype(np.uint8) for image in self._images]

    def __len__(self):
        return len(self._images)

    def __getitem__(self, index):
        return Sample(self._images[index], self._masks[index], f"mine-{index}")


@pytest.fixture(scope="module")
def network(small_network):
    return small_network("fpn_resnet18")


@pytest.fixture(scope="module")
def mine(network):
    return Mine(network)


@pytest.fixture(scope="module")
def broken(small_network):
    """The same function, but one channel inside one block is 10,000 times as large: in int8 the others vanish."""
    network = small_network("fpn_resnet18")
    block = network.get_submodule(MODULE)
    with torch.no_grad():
        block.bn1.weight[0] = 1.0
        block.bn1.bias[0] = 1.0
        block.conv2.weight[:, 0] *= 1e-4
        block.bn1.weight[0] *= 1e4
        block.bn1.bias[0] *= 1e4
    return network


def _build(network, path, **options):
    options = {"size": (64, 64), "plan": FOLDED, "precision": ("fp32", "int8"), **options}
    return agln_fast.build(network, path, **options)


@pytest.fixture(scope="module")
def built(network, mine, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:  # nothing is drawn to calibrate, to time, or to judge
        patch.setattr(pictures_module, "Scenes", type("Drawn", (), {"__init__": lambda *_: pytest.fail("drawn")}))
        patch.setattr(workshop_module, "sample_images", lambda *_: pytest.fail("drawn"))
        return _build(network, tmp_path_factory.mktemp("built") / "x", data=mine, max_miou_loss=100.0)


def test_the_manifest_says_what_is_lost(built, mine):
    """mIoU over the pictures that nothing was calibrated on, counted here by `evaluate`."""
    accuracy = built.engine("openvino-int8").accuracy
    judged = [mine[index] for index in range(1, 12, 2)]

    class Judged(Mine):
        def __init__(self):
            pass

        def __len__(self):
            return len(judged)

        def __getitem__(self, index):
            return judged[index]

    scores = []
    for backend, precision in (("torch", "fp32"), ("openvino", "int8")):
        with agln_fast.load(built, backend, precision=precision) as segment:
            scores.append(evaluate(segment, Judged()).metrics.mean_iou)
    assert scores[0] > scores[1]
    assert (accuracy.measure, accuracy.dataset, accuracy.split, accuracy.images) == ("mIoU", "five", "mine", 6)
    assert [accuracy.reference, accuracy.score] == pytest.approx(scores)
    assert accuracy.loss == pytest.approx(100 * (scores[0] - scores[1]))
    assert accuracy.low <= accuracy.loss <= accuracy.high
    assert accuracy.low < accuracy.high
    assert accuracy.backend == "openvino"
    assert built.engine("openvino-fp32").accuracy is None
    assert built.engine("openvino-int8").floating == ()


def test_the_interval_is_that_of_its_images(built, mine):
    """Resampled here, image by image, by the confusion matrices of both engines."""
    accuracy, matrices = built.engine("openvino-int8").accuracy, []
    for backend, precision in (("torch", "fp32"), ("openvino", "int8")):
        with agln_fast.load(built, backend, precision=precision) as segment:
            rows = []
            for index in range(1, 12, 2):
                metrics = SegmentationMetrics(5)
                metrics.update(segment(mine[index].image).labels, mine[index].labels)
                rows.append(metrics.matrix)
            matrices.append(np.stack(rows))
    random, losses = np.random.default_rng(1), []
    for _ in range(1500):
        some = random.integers(0, 6, 6)
        first, second = (SegmentationMetrics(5, matrix=each[some].sum(0)).mean_iou for each in matrices)
        losses.append(100 * (first - second))
    low, high = np.percentile(losses, [2.5, 97.5])
    assert (accuracy.low, accuracy.high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_the_report_says_it(built, cli):
    accuracy = built.engine("openvino-int8").accuracy
    line = (
        f"openvino-int8: {100 * accuracy.score:.2f} % mIoU, fp32 {100 * accuracy.reference:.2f} %: loses "
        f"{accuracy.loss:.2f} points ({accuracy.low:.2f} to {accuracy.high:.2f}) on 6 images of five, mine"
    )
    assert f"- {line}\n" in (built.path / "report.md").read_text()
    manifest = json.loads((built.path / "manifest.json").read_text())
    record = next(each for each in manifest["engines"] if each["name"] == "openvino-int8")
    assert record["accuracy"]["loss"] == accuracy.loss


def test_verification_is_by_the_users_pictures(built):
    assert built.engine("openvino-int8").verification.images == 4
    assert built.engine("torch-fp32").verification.status == "passed"


def test_exactly_the_block_that_int8_breaks_stays_in_floating_point(broken, tmp_path):
    built = _build(broken, tmp_path / "x", data=Mine(broken), max_miou_loss=20.0)
    engine = built.engine("openvino-int8")
    assert engine.floating == (BLOCK,)
    assert engine.accuracy.loss <= 20
    assert (
        f"openvino-int8: in floating point, because they cost most: {BLOCK}" in (built.path / "report.md").read_text()
    )
    with agln_fast.load(built, "openvino", precision="int8") as segment:
        assert segment.engine.floating == (BLOCK,)


@pytest.mark.tensorrt_rtx
def test_so_it_does_for_tensorrt_without_a_gpu(broken, tmp_path):
    """Its graph runs on the CPU, which is said."""
    options = {"targets": "tensorrt-rtx", "precision": "int8", "compute_capabilities": ["sm89"]}
    built = _build(broken, tmp_path / "x", data=Mine(broken), max_miou_loss=20.0, **options)
    engine = built.engine("tensorrt-rtx-int8")
    assert (engine.precision, engine.floating, engine.file) == ("int8", (BLOCK,), "model.int8.rtx.engine")
    assert engine.accuracy.backend == "openvino"
    assert engine.accuracy.loss <= 20
    assert "its int8 graph run by openvino" in (built.path / "report.md").read_text()
    assert engine.verification.status in ("not verified on this machine", "passed")
    assert not list(built.path.glob("*.onnx"))


@pytest.mark.slow
def test_a_threshold_of_zero_keeps_nothing_that_loses(network, mine, tmp_path):
    built = _build(network, tmp_path / "x", data=mine, max_miou_loss=0.0)
    assert list(built.manifest.left_out) == ["openvino-int8"]
    why = built.manifest.left_out["openvino-int8"]
    assert re.match(r"openvino-int8: loses \d+\.\d\d points of mIoU, and with \d+ of \d+ blocks in floating point", why)
    assert "more than 0; try bf16 or fp16, or allow more with --max-miou-loss" in why
    assert not any("int8" in name for name in built.manifest.files)


@pytest.mark.slow
def test_half_precision_is_judged_too(network, mine, tmp_path, monkeypatch):
    """bf16 where the CPU has it, by labels that are moved on: all are wrong, and that is told in points."""
    from agln_fast.engines.openvino import OpenVino, OpenVinoEngine

    if OpenVino().obstacle("bf16"):
        pytest.skip("this CPU has no bf16")
    built = _build(network, tmp_path / "x", data=mine, precision=("fp32", "bf16"), max_miou_loss=100.0)
    accuracy = built.engine("openvino-bf16").accuracy
    assert accuracy.images == 12  # nothing is calibrated
    assert 0 <= accuracy.loss < 50
    real = OpenVinoEngine.run

    def run(self, image):
        labels = real(self, image)
        return (labels + 1) % 5 if self.precision == "bf16" else labels

    monkeypatch.setattr(OpenVinoEngine, "run", run)
    built = _build(network, tmp_path / "y", data=mine, precision=("fp32", "bf16"))
    assert re.match(
        r"openvino-bf16: \d+\.\d\d % mIoU on five, the reference 100\.00 %", *built.manifest.left_out.values()
    )


def test_without_masks_it_is_agreement(network, mine, tmp_path, monkeypatch):
    """Calibrated on as many as are asked for, and judged by the others."""
    calibrated, real = [], workshop_module.Workshop.calibration
    monkeypatch.setattr(
        workshop_module.Workshop, "calibration", lambda self: calibrated.append(real(self)) or calibrated[-1]
    )
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, sample in enumerate(mine):
        Image.fromarray(sample.image).save(folder / f"{index:02}.png")
    built = _build(network, tmp_path / "x", data=folder, calibration=3, max_miou_loss=100.0)
    accuracy = built.engine("openvino-int8").accuracy
    assert (accuracy.measure, accuracy.reference, accuracy.images) == ("agreement", 1.0, 9)
    assert accuracy.dataset == "images without masks"
    assert 0 < accuracy.loss < 50
    assert [len(batches) for batches in calibrated] == [3]
    for batch, index in zip(calibrated[0], (0, 4, 8), strict=True):
        assert np.array_equal(batch[0], mine[index].image)


def test_data_of_other_classes_are_refused(network, tmp_path):
    with pytest.raises(ConfigError, match="the network has 5 classes, dataset scenes has 12"):
        _build(network, tmp_path / "x", data=Scenes("val", size=(64, 64), length=4))
    assert not list(tmp_path.iterdir())


def test_an_older_manifest_opens(built, tmp_path):
    """Written before there was an accuracy."""
    values = built.manifest.to_dict()
    for engine in values["engines"]:
        del engine["accuracy"], engine["floating"]
    read = Manifest.from_dict(values)
    assert all(engine.accuracy is None and engine.floating == () for engine in read.engines)
    assert Manifest.from_dict(built.manifest.to_dict()) == built.manifest


def test_no_picture_of_the_user_goes_into_the_bundle(built, mine):
    frames = np.load(built.path / "reference.npz")["frames"]
    assert not any(np.array_equal(frame, sample.image) for frame in frames for sample in mine)
    assert not any(name.endswith((".png", ".jpg")) for name in built.manifest.files)
