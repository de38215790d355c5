"""What must be in order before a training starts: its folder and its data. It loads without PyTorch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from agln_fast.data.dataset import SegmentationDataset
from agln_fast.data.registry import open_dataset
from agln_fast.errors import ConfigError, MissingPackageError
from agln_fast.models.shipped import CONFIG_FILE, WEIGHTS_FILE, find_checkpoint
from agln_fast.training.config import TrainingConfig

__all__ = ["CONFIG_FILE", "LOG_FILE", "STATE_FILE", "WEIGHTS_FILE", "check_start", "open_split"]

LOG_FILE, STATE_FILE = "log.csv", "state.pt"


def check_start(config: TrainingConfig, folder: Path, *, resume: bool) -> None:
    """Refuse a training that could not start, as far as names and files tell.

    Raises:
        MissingPackageError: a package of the extra "train" is not installed.
        ConfigError: `folder` holds a run, and `resume` is false.
        CheckpointError: weights to start from are not there.
    """
    for package in ("lightning_fabric", "torchmetrics", "yaml"):
        if find_spec(package) is None:
            raise MissingPackageError(package, "train")
    if not resume and (folder / STATE_FILE).exists():
        raise ConfigError(f"{folder}: holds a training already; resume it, or choose another folder")
    if (folder / STATE_FILE).exists():
        return  # what it started from is not needed any more
    for weights in (config.encoder_weights, config.initial_weights):
        if weights is not None:
            find_checkpoint(weights)


def open_split(config: TrainingConfig, use: Literal["train", "val"]) -> SegmentationDataset:
    """What `config` trains or validates on.

    Raises:
        ConfigError, DatasetError: as `open_dataset`.
    """
    split, length = {
        "train": (config.train_split, config.train_samples),
        "val": (config.val_split, config.val_samples),
    }[use]
    return open_dataset(config.data, split, config.data_root, length=length, skip_bad=config.skip_bad)
