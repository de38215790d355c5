"""The training loop against hand-made arithmetic, and against being killed."""

from __future__ import annotations

import csv
import errno
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import agln_fast
from agln_fast.data.augment import Augmentation
from agln_fast.data.dataset import Sample
from agln_fast.data.scenes import Scenes
from agln_fast.errors import CheckpointError, ConfigError, DatasetError, TrainingError
from agln_fast.evaluation.evaluate import evaluate
from agln_fast.metrics import SegmentationMetrics
from agln_fast.runtime.networks import load_network
from agln_fast.training import trainer
from agln_fast.training.batches import Batches, Crops
from agln_fast.training.config import TrainingConfig
from agln_fast.training.folder import LOG_FILE, STATE_FILE, WEIGHTS_FILE
from agln_fast.training.trainer import train

SMALL: dict[str, Any] = {
    "model": "agln_nano",
    "accelerator": "cpu",
    "batch_size": 2,
    "crop": 64,
    "base_size": 64,
    "train_samples": 6,
    "val_samples": 2,
    "epochs": 2.0,
    "save_every": 1,
}
ITERATIONS = 6


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training") / "run"
    train(TrainingConfig(**SMALL), folder)
    return folder


def same_weights(a: Path, b: Path) -> bool:
    first, second = torch.load(a, weights_only=True)["network"], torch.load(b, weights_only=True)["network"]
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_steps_are_sgd_with_poly_rate_on_cross_entropy(tmp_path: Path) -> None:
    """The whole loop, written out again with plain PyTorch."""
    config = TrainingConfig(**{**SMALL, "model": "fpn_nano", "base_lr": 0.01})
    run = train(config, tmp_path / "run")

    scenes = Scenes("train", length=6)
    augmentation = Augmentation(64, 64, (0.5, 2.0))
    torch.manual_seed(0)
    network = agln_fast.create_model("fpn_nano", 12).to(memory_format=torch.channels_last).train()
    start = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    velocity = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    order = [(epoch, int(i)) for epoch in range(2) for i in np.random.default_rng([0, epoch]).permutation(6)]
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    losses, counts = [], [SegmentationMetrics(12), SegmentationMetrics(12)]
    for iteration in range(ITERATIONS):
        samples = [
            augmentation(scenes[index], np.random.default_rng([0, epoch, index]))
            for epoch, index in order[2 * iteration : 2 * iteration + 2]
        ]
        images = torch.stack([torch.from_numpy((s.image.astype(np.float32) / 255 - mean) / std) for s in samples])
        labels = torch.from_numpy(np.stack([s.labels for s in samples]).astype(np.int64))
        trainer._seed_dropout(0, iteration, 0)
        logits = network(images.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits, labels, ignore_index=255)
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        rate = 0.01 * (1 - iteration / ITERATIONS) ** 0.9
        with torch.no_grad():
            for (name, parameter), gradient in zip(network.named_parameters(), gradients, strict=True):
                velocity[name] = 0.9 * velocity[name] + gradient + 1e-4 * parameter
                parameter -= rate * velocity[name]
        losses.append(float(loss.detach()))
        counts[iteration // 3].update(logits.argmax(1), labels)
    assert [row.loss for row in run.log] == pytest.approx([np.mean(losses[:3]), np.mean(losses[3:])], rel=1e-3)
    assert [row.train_miou for row in run.log] == pytest.approx([count.mean_iou for count in counts], abs=2e-3)
    # Rounding grows from step to step; a power of 1 in the place of 0.9 would move the weights by 4 % less.
    moved, apart = 0.0, 0.0
    for name, parameter in network.named_parameters():
        moved += float((parameter.detach() - start[name]).square().sum())
        apart += float((parameter.detach() - run.network.get_parameter(name).detach()).square().sum())
    assert apart < 0.01**2 * moved


def test_equal_configs_give_equal_weights_and_seeds_differ(finished: Path, tmp_path: Path) -> None:
    train(TrainingConfig(**SMALL), tmp_path / "again")
    assert same_weights(finished / STATE_FILE, tmp_path / "again" / STATE_FILE)
    train(TrainingConfig(**SMALL, seed=1), tmp_path / "other")
    assert not same_weights(finished / STATE_FILE, tmp_path / "other" / STATE_FILE)


def test_the_weights_load_and_the_log_is_complete(finished: Path) -> None:
    network = agln_fast.load_checkpoint(finished / WEIGHTS_FILE)
    assert network.config == agln_fast.create_model("agln_nano", 12).config
    rows = list(csv.DictReader((finished / LOG_FILE).open()))
    assert [row["iteration"] for row in rows] == ["3", "6"]
    assert all(0 <= float(row["val_miou"]) <= float(row["val_pixel_accuracy"]) <= 1 for row in rows)
    with load_network(network, size=(128, 128), resize="stretch") as segment:
        judged = evaluate(segment, Scenes("val", length=2)).metrics
    assert float(rows[1]["val_miou"]) == pytest.approx(judged.mean_iou, abs=2e-3)
    assert float(rows[1]["val_pixel_accuracy"]) == pytest.approx(judged.pixel_accuracy, abs=2e-3)
    assert float(rows[1]["learning_rate"]) == pytest.approx(0.05 * (1 / 6) ** 0.9)


_KILLED = """
import os, signal, sys

folder, left = sys.argv[1], int(sys.argv.pop(2))


def step(event, arguments):
    global left
    if event == "os.rename" and str(arguments[1]).startswith(folder):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(step)
from agln_fast.cli import main

sys.argv[1:2] = ["train", "-o", folder, "--resume"]
main()
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_bit_for_bit(finished: Path, tmp_path: Path) -> None:
    """SIGKILL before a file gets its name: nothing else changes what a resumed training finds.

    These are the config first, then weights, log and state after each iteration: the processes die before the first
    log, between two weights and their state, and between two iterations; the last one lives.
    """
    folder = tmp_path / "run"
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    for renamed, iteration in ((2, 0), (5, 1), (4, 2), (100, ITERATIONS)):
        command = [sys.executable, "-c", _KILLED, str(folder), str(renamed), *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == (0 if iteration == ITERATIONS else -signal.SIGKILL), done.stderr
        assert _iteration(folder) == iteration
    assert same_weights(folder / STATE_FILE, finished / STATE_FILE)
    without_time = [[row.rsplit(",", 1)[0] for row in (f / LOG_FILE).open()] for f in (folder, finished)]
    assert without_time[0] == without_time[1]
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("accelerator", "precision"),
    [("cpu", "bf16"), *(pytest.param("cuda", kind, marks=pytest.mark.gpu) for kind in ("fp32", "bf16", "fp16"))],
)
def test_interrupted_in_mixed_precision_it_resumes_bit_for_bit(
    accelerator: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SMALL, "accelerator": accelerator, "precision": precision, "epochs": 1.0}
    config = TrainingConfig(**settings)
    train(config, tmp_path / "whole")
    step = trainer._Trainer._step

    def interrupted(self: Any, images: torch.Tensor, labels: torch.Tensor) -> None:
        if self.iteration == 2:
            raise KeyboardInterrupt
        step(self, images, labels)

    monkeypatch.setattr(trainer._Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts")
    monkeypatch.undo()
    run = train(config, tmp_path / "parts", resume=True)
    assert same_weights(tmp_path / "whole" / STATE_FILE, tmp_path / "parts" / STATE_FILE)
    assert np.isfinite(run.log[-1].loss)
    assert next(run.network.parameters()).dtype == torch.float32


def _iteration(folder: Path) -> int:
    if not (folder / STATE_FILE).exists():
        return 0
    return int(torch.load(folder / STATE_FILE, weights_only=True)["iteration"])


def test_a_folder_with_a_run_is_not_overwritten(finished: Path) -> None:
    with pytest.raises(ConfigError, match="holds a training already"):
        train(TrainingConfig(**SMALL), finished)
    with pytest.raises(ConfigError, match="another training, with momentum"):
        train(TrainingConfig(**SMALL, momentum=0.5), finished, resume=True)


def test_a_finished_run_is_returned(finished: Path) -> None:
    before = (finished / WEIGHTS_FILE).read_bytes()
    run = train(TrainingConfig(**SMALL), finished, resume=True)
    assert len(run.log) == 2
    assert not run.network.training
    assert (finished / WEIGHTS_FILE).read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 truncated", b"no state"])
def test_a_damaged_state_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="state"):
        train(TrainingConfig(**SMALL), tmp_path, resume=True)


@pytest.mark.parametrize(
    "change", ["network", "optimizer", "start", "model", "log", "matrix", "config", "field", "row"]
)
def test_a_state_of_another_version_is_refused(change: str, finished: Path, tmp_path: Path) -> None:
    state = torch.load(finished / STATE_FILE, weights_only=True)
    if change == "field":
        state["config"]["new"] = 1
    elif change == "row":
        state["log"][0]["new"] = 1
    elif change == "config":
        state["config"] = []
    elif change == "model":
        state["start"]["model"]["new"] = 1
    else:
        del state[change]
    torch.save(state, tmp_path / STATE_FILE)
    with pytest.raises(CheckpointError, match="state"):
        train(TrainingConfig(**SMALL), tmp_path, resume=True)


def test_files_that_got_lost_come_back(finished: Path, tmp_path: Path) -> None:
    """A run that was killed between its last state and its weights, or that somebody tidied up."""
    (tmp_path / STATE_FILE).write_bytes((finished / STATE_FILE).read_bytes())
    (tmp_path / ".weights.safetensors.0123.part").write_bytes(b"half")
    train(TrainingConfig(**SMALL), tmp_path, resume=True)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == (finished / WEIGHTS_FILE).read_bytes()
    assert (tmp_path / LOG_FILE).read_text() == (finished / LOG_FILE).read_text()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_of_error(workers: int, tmp_path: Path) -> None:
    class Damaged(Scenes):
        def __getitem__(self, index: int) -> Sample:
            raise DatasetError("a.png: cannot be decoded")

    config = TrainingConfig(**{**SMALL, "workers": workers, "cache": False})
    with pytest.raises(DatasetError) as caught:
        train(config, tmp_path / "run", train_set=Damaged("train", length=4))
    assert str(caught.value) == "a.png: cannot be decoded"


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path: Path) -> None:
    """DDP on the CPU: the loss is that of the whole batch; one log, one JSON document, and a run that resumes."""
    settings = {**SMALL, "devices": 2, "batch_size": 4, "validate_every": 0.1, "max_scale": 0.9}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "agln_fast.cli", "train", "-o", str(tmp_path / "run"), "--json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    log = json.loads(done.stdout)["log"]
    assert [row["iteration"] for row in log] == [1, 2, 3]
    assert len((tmp_path / "run" / LOG_FILE).read_text().splitlines()) == 4
    again = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["log"] == log

    # The first loss by hand: each process normalises its own part by its own statistics (no SyncBN on CPUs), and the
    # mean runs over the labelled pixels of all four crops, of which the two have unequal numbers.
    torch.manual_seed(0)
    network = agln_fast.create_model("agln_nano", 12).to(memory_format=torch.channels_last).train()
    crops = Crops(Scenes("train", length=6), Augmentation(64, 64, (0.5, 0.9)), seed=0)
    total, pixels = 0.0, []
    for rank in (0, 1):
        (keys,) = Batches(6, TrainingConfig(**settings), range(1), rank, 2)
        images, labels = map(torch.stack, zip(*(crops[key] for key in keys), strict=True))
        trainer._seed_dropout(0, 0, rank)
        logits = network(images.contiguous(memory_format=torch.channels_last))
        total += float(F.cross_entropy(logits, labels, ignore_index=255, reduction="sum").detach())
        pixels.append(int((labels != 255).sum()))
    assert pixels[0] != pixels[1]
    assert log[0]["loss"] == pytest.approx(total / sum(pixels), rel=1e-4)


def test_a_diverging_run_stops_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="diverged; lower base_lr"):
        train(TrainingConfig(**{**SMALL, "base_lr": 1e6}), tmp_path / "run")
    # What was saved before is finite.
    agln_fast.load_checkpoint(tmp_path / "run" / WEIGHTS_FILE)


def test_a_full_disk_leaves_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, calls = torch.save, []

    def fill_up(state: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", fill_up)
    with pytest.raises(TrainingError, match="No space left on device"):
        train(TrainingConfig(**SMALL), tmp_path / "run")
    monkeypatch.undo()
    assert _iteration(tmp_path / "run") == 2
    assert not list((tmp_path / "run").glob(".*"))


def test_it_learns(tmp_path: Path) -> None:
    """Forty steps on two scenes: the loss falls below half of log 12, where it starts."""
    settings = {**SMALL, "model": "fpn_nano", "train_samples": 2, "epochs": 40.0, "min_scale": 1.0, "max_scale": 1.0}
    rare = {**settings, "validate_every": 20.0, "save_every": 40}
    run = train(TrainingConfig(**rare), tmp_path / "run")
    assert run.log[-1].loss < np.log(12) / 2


def test_weights_can_be_given(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    donor = agln_fast.load_checkpoint(finished / WEIGHTS_FILE)
    torch.save(donor.encoder.state_dict(), tmp_path / "encoder.pth")
    seen: list[torch.Tensor] = []

    def keep(self: Any, *_: object) -> None:
        seen.extend([self.network.encoder.conv1.weight.clone(), self.network.classifier[4].weight.clone()])

    monkeypatch.setattr(trainer._Trainer, "run", keep)
    own, theirs = donor.encoder.conv1.weight, donor.classifier[4].weight
    train(TrainingConfig(**SMALL, encoder_weights=str(tmp_path / "encoder.pth")), tmp_path / "encoder")
    assert (torch.equal(seen[0], own), torch.equal(seen[1], theirs)) == (True, False)
    train(TrainingConfig(**SMALL, initial_weights=str(finished / WEIGHTS_FILE)), tmp_path / "all")
    assert (torch.equal(seen[2], own), torch.equal(seen[3], theirs)) == (True, True)


def test_processes_share_a_batch_without_overlap() -> None:
    config = TrainingConfig(**{**SMALL, "batch_size": 4, "devices": 2})
    whole = list(Batches(6, config, range(3), 0, 1))
    parts = [list(Batches(6, config, range(3), rank, 2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in whole]
    assert sorted(index for batch in whole for _, index in batch) == sorted([*range(6), *range(6)])


def test_another_folder_is_asked_for_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        train(TrainingConfig(**SMALL), tmp_path / "file" / "run")
