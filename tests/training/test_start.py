"""What a training starts from: what is loaded is the file's bit by bit, what depends on the classes starts afresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import agln_fast
from agln_fast.data.classes import ClassSet
from agln_fast.data.dataset import Sample
from agln_fast.data.scenes import Scenes
from agln_fast.errors import CheckpointError, ConfigError
from agln_fast.models.shipped import find_checkpoint
from agln_fast.training import start, trainer
from agln_fast.training.config import TrainingConfig
from agln_fast.training.folder import STATE_FILE
from agln_fast.training.start import begin, tensors_of_classes
from agln_fast.training.trainer import TrainingRun, train

CLASSIFIER = {"classifier.4.weight", "classifier.4.bias"}
SMALL: dict[str, Any] = {
    "initial_weights": "fpn_nano",
    "accelerator": "cpu",
    "batch_size": 2,
    "crop": 64,
    "base_size": 64,
    "epochs": 1.0,
    "save_every": 1,
}


class Coarse(Scenes):
    """Scenes with four classes in the place of twelve."""

    def __init__(self, split: str, length: int) -> None:
        super().__init__(split, length=length)
        self.class_set = ClassSet("coarse", "coarse", tuple("abcd"), ((0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 3, 3)))

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        known = sample.labels != 255
        return sample._replace(labels=np.where(known, sample.labels // 3, sample.labels).astype(np.uint8))


def _train(folder: Path, samples: int = 2, **changes: Any) -> TrainingRun:
    config = TrainingConfig(**{**SMALL, **changes})
    return train(config, folder, train_set=Coarse("train", samples), val_set=Coarse("val", 1))


def _stored(name: str = "fpn_nano") -> dict[str, torch.Tensor]:
    """The file's own tensors, by safetensors: float16 has all its numbers in float32."""
    return {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in load_file(find_checkpoint(name)).items()
    }


@pytest.mark.parametrize("model", ["fpn_nano", "agln_nano"])
def test_before_the_first_step_all_but_the_classifier_is_the_files(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def look(self: Any, *_: object) -> None:
        seen.update(self.network.state_dict())
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer._Trainer, "_step", look)
    with caplog.at_level("INFO", "agln_fast.training"), pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "run", initial_weights=model)
    stored = _stored(model)
    assert seen.keys() == stored.keys()
    assert {name for name in stored if not torch.equal(seen[name], stored[name])} == CLASSIFIER
    assert seen["classifier.4.weight"].shape == (4, 64, 1, 1)
    assert seen["classifier.4.weight"].std() > 0
    assert [record.getMessage() for record in caplog.records] == [
        f"starts from {model}: {len(stored) - 2} tensors are loaded, 2 are fresh for 4 classes in the place of 12 "
        "(classifier.4.bias, classifier.4.weight); loaded layers learn at 0.1 of the rate"
    ]


def test_for_as_many_classes_everything_is_loaded() -> None:
    begun = begin(TrainingConfig(**SMALL), 12)
    stored = _stored()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in begun.network.state_dict().items())
    assert begun.remark == f"starts from fpn_nano: all {len(stored)} tensors are loaded, 12 classes"
    assert begun.network.training


def test_the_classifier_is_fresh_if_that_is_asked_for() -> None:
    first, again, other = (
        begin(TrainingConfig(**SMALL, fresh_classifier=True, seed=seed), 12).network.state_dict() for seed in (0, 0, 1)
    )
    stored = _stored()
    assert {name for name in stored if not torch.equal(first[name], stored[name])} == CLASSIFIER
    assert all(torch.equal(first[name], again[name]) for name in stored)
    assert {name for name in stored if not torch.equal(first[name], other[name])} == CLASSIFIER
    remark = begin(TrainingConfig(**SMALL, fresh_classifier=True), 12).remark
    assert "2 are fresh for other 12 classes (" in remark


def test_the_checkpoint_tells_the_model_whatever_it_is(tmp_path: Path) -> None:
    """No preset has this width, nor that many channels."""
    network = agln_fast.create_model("agln_lite_resnet18", 3, width=0.125, channels=8, num_descriptors=5)
    agln_fast.save_checkpoint(network, tmp_path / "x.safetensors")
    begun = begin(TrainingConfig(initial_weights=str(tmp_path / "x.safetensors")), 7)
    assert (
        begun.network.config
        == agln_fast.create_model("agln_lite_resnet18", 7, width=0.125, channels=8, num_descriptors=5).config
    )
    assert begun.loaded == network.state_dict().keys() - CLASSIFIER


@pytest.mark.parametrize("name", ["fcn8s_nano", "fpn_nano", "agln_nano", "agln_minus_gap_nano", "agln_paper_nano"])
@pytest.mark.parametrize(("classes", "other"), [(1, None), (2, None), (12, None), (12, 5), (32767, None)])
def test_which_tensors_depend_on_the_classes(name: str, classes: int, other: int | None) -> None:
    assert tensors_of_classes(agln_fast.models.config.preset(name, classes), other) == CLASSIFIER


def test_layers_that_depend_on_the_classes_are_found_wherever_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer starts afresh as a whole: what scales the classes' scores is no good without them."""

    class Scaled(nn.Module):
        def __init__(self, classes: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(classes))
            self.scale = nn.Parameter(torch.zeros(1))
            self.inner = nn.Linear(2, 2)

    class Deep(start.SegmentationNetwork):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.auxiliary = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, config.num_classes, 1))
            self.wide = nn.BatchNorm2d(max(config.num_classes, 10))
            self.scaled = Scaled(config.num_classes)

    monkeypatch.setattr(start, "SegmentationNetwork", Deep)
    auxiliary = {"auxiliary.2.weight", "auxiliary.2.bias", "scaled.weight", "scaled.scale"}
    wide = {f"wide.{name}" for name in nn.BatchNorm2d(1).state_dict()}
    config = agln_fast.models.config.preset("fpn_nano", 5)
    assert tensors_of_classes(config) == CLASSIFIER | auxiliary
    assert tensors_of_classes(config, 12) == CLASSIFIER | auxiliary | wide


def _moved(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """How far one step moves each parameter."""
    before = dict(begin(TrainingConfig(**{**SMALL, **changes}), 4).network.named_parameters())
    after = dict(_train(folder, **changes).network.named_parameters())
    return {name: (parameter - before[name]).detach() for name, parameter in after.items()}


def test_loaded_layers_learn_at_a_share_of_the_rate(tmp_path: Path) -> None:
    """The first step of SGD is the rate times the same gradient; the difference of weights rounds at their size."""
    full, half, none = (_moved(tmp_path / str(rate), loaded_rate=rate) for rate in (1.0, 0.5, 0.0))
    for name, step in full.items():
        assert step.any(), name
        share = 1.0 if name in CLASSIFIER else 0.5
        torch.testing.assert_close(half[name], share * step, rtol=1e-4, atol=1e-6)
        assert none[name].any() == (name in CLASSIFIER), name


def test_without_fresh_layers_all_learn_at_the_whole_rate(tmp_path: Path) -> None:
    settings = {**SMALL, "train_samples": 2, "val_samples": 1, "loaded_rate": 0.0}
    run = train(TrainingConfig(**settings), tmp_path / "run")
    stored = _stored()
    assert all(not torch.equal(parameter, stored[name]) for name, parameter in run.network.named_parameters())


def test_a_fine_tuning_resumes_bit_for_bit_without_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.safetensors"
    agln_fast.save_checkpoint(agln_fast.load_checkpoint("fpn_nano"), file)
    whole = _train(tmp_path / "whole", 6, initial_weights=str(file))
    step = trainer._Trainer._step

    def interrupted(self: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
        if self.iteration == 2:
            raise KeyboardInterrupt
        step(self, images, labels)

    monkeypatch.setattr(trainer._Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _train(tmp_path / "parts", 6, initial_weights=str(file))
    monkeypatch.undo()
    file.unlink()
    config = TrainingConfig(**{**SMALL, "initial_weights": str(file)})
    run = train(config, tmp_path / "parts", resume=True, train_set=Coarse("train", 6), val_set=Coarse("val", 1))
    for name, tensor in whole.network.state_dict().items():
        assert torch.equal(run.network.state_dict()[name], tensor), name
    assert run.start == whole.start != ""
    groups = [torch.load(tmp_path / f / STATE_FILE)["optimizer"]["param_groups"] for f in ("whole", "parts")]
    assert groups[0] == groups[1]
    assert [group["lr"] / groups[0][0]["lr"] for group in groups[0]] == pytest.approx([1, 0.1])


def test_other_weights_of_the_file_can_be_asked_for(tmp_path: Path) -> None:
    network = agln_fast.load_checkpoint("fpn_nano")
    zeros = {name: torch.zeros_like(tensor) for name, tensor in network.state_dict().items()}
    torch.save({"model": zeros, "model_ema": network.state_dict()}, tmp_path / "x.pth")
    begun = begin(TrainingConfig(initial_weights=str(tmp_path / "x.pth"), weights="ema"), 12)
    assert torch.equal(begun.network.classifier[4].weight, network.classifier[4].weight)
    with pytest.raises(CheckpointError, match="no weights under 'teacher'"):
        begin(TrainingConfig(initial_weights=str(tmp_path / "x.pth"), weights="teacher"), 12)


def test_a_model_that_contradicts_the_checkpoint_is_told() -> None:
    with pytest.raises(
        ConfigError, match=r"fpn_nano: holds another network than fpn_resnet18, which has width 1\.0 inst"
    ):
        begin(TrainingConfig(**SMALL, model="fpn_resnet18"), 12)
    assert begin(TrainingConfig(**SMALL, model="fpn_nano"), 5).network.config.num_classes == 5


def test_the_model_tells_what_names_cannot(tmp_path: Path) -> None:
    network = agln_fast.create_model("agln_minus_cr_nano", 3)
    torch.save(network.state_dict(), tmp_path / "x.pth")
    agln_fast.save_checkpoint(network, tmp_path / "x.safetensors")
    plain = begin(TrainingConfig(initial_weights=str(tmp_path / "x.pth"), model="agln_minus_cr_nano"), 3)
    assert plain.network.config == network.config
    with pytest.raises(ConfigError, match=r"agln_minus_sg_nano, which has channel_resampling False instead of True"):
        begin(TrainingConfig(initial_weights=str(tmp_path / "x.safetensors"), model="agln_minus_sg_nano"), 3)


@pytest.mark.parametrize(
    ("held", "asked"), [("agln_minus_cr_nano", "agln_minus_nano"), ("agln_minus_nano", "agln_minus_cr_nano")]
)
def test_a_model_of_other_weights_is_told(held: str, asked: str, tmp_path: Path) -> None:
    """One of them has γ, the other has not."""
    torch.save(agln_fast.create_model(held, 3).state_dict(), tmp_path / "x.pth")
    with pytest.raises(ConfigError, match=f"holds another network than {asked}, which has channel_resampling"):
        begin(TrainingConfig(initial_weights=str(tmp_path / "x.pth"), model=asked), 3)


WRONG = {
    "no file": (lambda p: None, "no such file"),
    "a text": (lambda p: p.write_text("weights"), "not a checkpoint"),
    "an encoder": (lambda p: torch.save(agln_fast.load_checkpoint("fpn_nano").encoder.state_dict(), p), "AGLN family"),
    "a whole model": (lambda p: torch.save(agln_fast.load_checkpoint("fpn_nano"), p), "holds a whole model"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_no_start_are_told_and_leave_nothing(case: str, tmp_path: Path) -> None:
    make, message = WRONG[case]
    make(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        _train(tmp_path / "run", initial_weights=str(tmp_path / "x.pth"))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_epochs_from_a_checkpoint_beat_two_from_nothing(tmp_path: Path) -> None:
    """Other classes, the same 32 steps. Where this was written they end at a mIoU of 0.59 and 0.38."""
    settings = {**SMALL, "batch_size": 4, "epochs": 2.0, "crop": 128, "base_size": 128, "save_every": 100}
    sets = {"train_set": Coarse("train", 64), "val_set": Coarse("val", 16)}
    tuned = train(TrainingConfig(**settings), tmp_path / "tuned", **sets)
    fresh = {**settings, "initial_weights": None, "model": "fpn_nano"}
    scratch = train(TrainingConfig(**fresh), tmp_path / "scratch", **sets)
    assert tuned.log[-1].iteration == scratch.log[-1].iteration == 32
    assert tuned.log[-1].val_miou > scratch.log[-1].val_miou + 0.1
