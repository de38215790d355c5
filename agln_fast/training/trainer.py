"""The training loop: SGD, the poly rate, cross-entropy; it can be killed at any moment and resumed bit for bit.

Nothing random has a state: which images an iteration sees, how each is augmented and what dropout drops follow from the
seed and the iteration's number. What has to be kept is the weights, the momentum and that number.
"""

from __future__ import annotations

import csv
import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from agln_fast.contract import IMAGENET_MEAN, IMAGENET_STD
from agln_fast.data.augment import Augmentation
from agln_fast.data.dataset import IGNORE_INDEX, CachedDataset, SegmentationDataset
from agln_fast.data.registry import open_dataset
from agln_fast.errors import CheckpointError, ConfigError, MissingPackageError, TrainingError
from agln_fast.metrics import SegmentationMetrics
from agln_fast.models.checkpoint import load_backbone, load_checkpoint, save_checkpoint
from agln_fast.models.networks import SegmentationNetwork, create_model
from agln_fast.training.config import TrainingConfig

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from rich.progress import Progress

__all__ = ["CONFIG_FILE", "LOG_FILE", "STATE_FILE", "WEIGHTS_FILE", "LogRow", "TrainingRun", "train"]

CONFIG_FILE, LOG_FILE, STATE_FILE, WEIGHTS_FILE = "config.yaml", "log.csv", "state.pt", "weights.safetensors"
_PRECISIONS: dict[str, Any] = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class LogRow:
    """One line of log.csv, written at each validation; loss and train_miou (0..1) are since the line before."""

    iteration: int
    epoch: float
    learning_rate: float
    loss: float
    train_miou: float
    val_miou: float
    val_pixel_accuracy: float
    seconds: float


@dataclass(frozen=True)
class TrainingRun:
    """A finished run: the network in eval mode, its weights file, and the log."""

    network: SegmentationNetwork
    weights: Path
    log: tuple[LogRow, ...]


def train(
    config: TrainingConfig,
    output: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: Progress | None = None,
    train_set: SegmentationDataset | None = None,
    val_set: SegmentationDataset | None = None,
) -> TrainingRun:
    """Train a network; the folder `output` gets config.yaml, log.csv, state.pt and weights.safetensors.

    Args:
        config: what to do.
        output: folder, made if it is not there; it must not hold another run.
        resume: go on from the state in `output`, if there is one; a finished run is returned as it is.
        progress: a rich progress display that the caller has started.
        train_set, val_set: datasets in the place of those that `config` names, e.g. cached ones.

    Raises:
        ConfigError: impossible settings; `output` holds a run and `resume` is false, or a run of another config.
        CheckpointError: encoder weights or a state that cannot be used.
        DatasetError: the data are not there.
        TrainingError: the loss is NaN or infinite, or the folder cannot be written.
        MissingPackageError: a package of the extra "train" is not installed.
    """
    fabric = _fabric(config)
    folder = Path(output)
    state = _open_folder(folder, config, resume)
    train_set = train_set or open_dataset(
        config.data, config.train_split, config.data_root, length=config.train_samples
    )
    val_set = val_set or open_dataset(config.data, config.val_split, config.data_root, length=config.val_samples)
    torch.manual_seed(config.seed)
    network = create_model(config.model, len(train_set.class_set.classes))
    if state is None:
        _initialise(network, config)
    if config.cache:
        train_set, val_set = CachedDataset(train_set), CachedDataset(val_set)
    trainer = _Trainer(fabric, config, network, train_set, val_set)
    if state is not None:
        trainer.load(state)
    trainer.run(folder, progress)
    return TrainingRun(trainer.network.eval(), folder / WEIGHTS_FILE, tuple(trainer.log))


class _Trainer:
    """The network, its optimizer, and what has been measured since the last line of the log."""

    def __init__(
        self,
        fabric: Fabric,
        config: TrainingConfig,
        network: SegmentationNetwork,
        train_set: SegmentationDataset,
        val_set: SegmentationDataset,
    ) -> None:
        self.fabric, self.config, self.train_set, self.val_set = fabric, config, train_set, val_set
        self.total = max(1, round(config.epochs * len(train_set) / config.batch_size))
        on_gpu = fabric.device.type == "cuda"
        if on_gpu and fabric.world_size > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        # On a GPU the gradient of the bilinear resize would otherwise differ from run to run.
        torch.use_deterministic_algorithms(on_gpu, warn_only=True)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(
            network.parameters(), config.base_lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.module, self.optimizer = fabric.setup(self.network, optimizer)
        self.iteration, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.metrics = SegmentationMetrics(network.config.num_classes)
        self.log: list[LogRow] = []

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, as plain types and tensors."""
        return {
            "config": self.config.to_dict(),
            "iteration": self.iteration,
            "seconds": self.seconds,
            "losses": self.losses,
            "matrix": torch.from_numpy(self.metrics.matrix),
            "log": [asdict(row) for row in self.log],
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.seconds, self.losses = state["iteration"], state["seconds"], state["losses"]
        self.metrics = SegmentationMetrics(self.network.config.num_classes, matrix=state["matrix"])
        self.log = [LogRow(**row) for row in state["log"]]

    def run(self, folder: Path, progress: Progress | None) -> None:
        """Go on to the last iteration."""
        config = self.config
        augmentation = Augmentation(config.crop, config.base_size, (config.min_scale, config.max_scale))
        loader = self.fabric.setup_dataloaders(
            DataLoader(
                _Crops(self.train_set, augmentation, config.seed),
                batch_sampler=_Batches(
                    len(self.train_set),
                    config,
                    range(self.iteration, self.total),
                    self.fabric.global_rank,
                    self.fabric.world_size,
                ),
                num_workers=config.workers,
            ),
            use_distributed_sampler=False,
        )
        task = progress.add_task(config.model, total=self.total, completed=self.iteration) if progress else None
        every = max(1, round(config.validate_every * len(self.train_set) / config.batch_size))
        began = time.monotonic() - self.seconds
        for images, labels in loader:
            self._step(images, labels)
            self.iteration += 1
            self.seconds = time.monotonic() - began
            validate = self.iteration % every == 0 or self.iteration == self.total
            if validate:
                self._add_log_row()
            if validate or self.iteration % config.save_every == 0:
                self._save(folder)
            if progress is not None and task is not None:
                progress.update(task, completed=self.iteration, description=self._description())

    def _step(self, images: Tensor, labels: Tensor) -> None:
        config = self.config
        rate = config.base_lr * (1 - self.iteration / self.total) ** config.poly_power
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        _seed_dropout(config.seed, self.iteration, self.fabric.global_rank)
        self.module.train()
        logits = self.module(images.contiguous(memory_format=torch.channels_last)).float()
        counted = (labels != IGNORE_INDEX).sum().clamp(min=1)  # a crop may be all padding
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum") / counted
        value = float(loss.detach())
        if not np.isfinite(value):
            before = f"{self.losses[-1]:.3g}" if self.losses else "not known"
            raise TrainingError(
                f"the loss is {value} in iteration {self.iteration + 1} of {self.total} (learning rate {rate:.2g}; the "
                f"loss before was {before}): the training has diverged; lower base_lr, or check the encoder weights"
            )
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self.optimizer.step()
        self.losses.append(value)
        self.metrics.update(logits.detach().argmax(1), labels)

    def _description(self) -> str:
        last = self.log[-1] if self.log else None
        loss = np.mean(self.losses[-50:]) if self.losses or last is None else last.loss
        return f"{self.config.model}  loss {loss:.3f}" + (f"  mIoU {last.val_miou:.1%}" if last else "")

    def _add_log_row(self) -> None:
        validation = self._validate()
        row = LogRow(
            iteration=self.iteration,
            epoch=self.iteration * self.config.batch_size / len(self.train_set),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            loss=float(np.mean(self.losses)),
            train_miou=self.metrics.mean_iou,
            val_miou=validation.mean_iou,
            val_pixel_accuracy=validation.pixel_accuracy,
            seconds=self.seconds,
        )
        self.log.append(row)
        self.losses, self.metrics = [], SegmentationMetrics(self.network.config.num_classes)

    def _validate(self) -> SegmentationMetrics:
        """Whole images at their own size, with the weights as they are."""
        metrics = SegmentationMetrics(self.network.config.num_classes)
        self.module.eval()
        with torch.inference_mode():
            for index in range(len(self.val_set)):
                sample = self.val_set[index]
                image = torch.from_numpy(_normalise(sample.image))[None].to(self.fabric.device)
                metrics.update(self.module(image).argmax(1), torch.from_numpy(sample.labels)[None])
        return metrics

    def _save(self, folder: Path) -> None:
        if self.fabric.global_rank == 0:
            try:
                _replace(folder / STATE_FILE, lambda part: torch.save(self.state(), part))
                _replace(folder / LOG_FILE, self._write_log)
                save_checkpoint(self.network, folder / WEIGHTS_FILE)
            except (OSError, RuntimeError, CheckpointError) as error:  # PyTorch raises RuntimeError on a full disk
                raise TrainingError(
                    f"{folder}: the state cannot be saved ({error}); resume once there is room"
                ) from None
        self.fabric.barrier()

    def _write_log(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(LogRow)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.log)


class _Crops(Dataset[tuple[Tensor, Tensor]]):
    """(epoch, index) -> normalised image (3, crop, crop) float32 and labels (crop, crop) int64."""

    def __init__(self, dataset: SegmentationDataset, augmentation: Augmentation, seed: int) -> None:
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        sample = self.augmentation(self.dataset[index], np.random.default_rng([self.seed, epoch, index]))
        return torch.from_numpy(_normalise(sample.image)), torch.from_numpy(sample.labels.astype(np.int64))


class _Batches(Sampler[list[tuple[int, int]]]):
    """Keys of `_Crops` for each of `iterations`: one shuffled epoch behind the other; process `rank` gets its part."""

    def __init__(self, length: int, config: TrainingConfig, iterations: range, rank: int, world: int) -> None:
        self.length, self.config, self.iterations, self.rank, self.world = length, config, iterations, rank, world

    def __len__(self) -> int:
        return len(self.iterations)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch, current, order = self.config.batch_size, -1, np.arange(0)
        for iteration in self.iterations:
            keys = []
            for position in range(iteration * batch, (iteration + 1) * batch):
                epoch, place = divmod(position, self.length)
                if epoch != current:
                    current, order = epoch, np.random.default_rng([self.config.seed, epoch]).permutation(self.length)
                keys.append((epoch, int(order[place])))
            yield keys[self.rank :: self.world]


def _normalise(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """(H, W, 3) uint8 -> (3, H, W) float32, as every engine does it."""
    mean, std = np.array(IMAGENET_MEAN, np.float32), np.array(IMAGENET_STD, np.float32)
    return np.ascontiguousarray(((image.astype(np.float32) / 255 - mean) / std).transpose(2, 0, 1))


def _initialise(network: SegmentationNetwork, config: TrainingConfig) -> None:
    """Put given weights in the place of random ones."""
    if config.encoder_weights is not None:
        load_backbone(network, config.encoder_weights)
    if config.initial_weights is not None:
        given = load_checkpoint(config.initial_weights)
        if given.config != network.config:
            raise ConfigError(f"{config.initial_weights}: holds {given.config}, {config.model} is {network.config}")
        network.load_state_dict(given.state_dict())


def _seed_dropout(*numbers: int) -> None:
    """Dropout draws from PyTorch's own generator; seeded before each step, it has no state to keep."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def _fabric(config: TrainingConfig) -> Fabric:
    try:
        from lightning_fabric import Fabric
        from lightning_fabric.utilities.exceptions import MisconfigurationException
    except ImportError:
        raise MissingPackageError("lightning_fabric", "train") from None
    try:
        fabric = Fabric(accelerator=config.accelerator, devices=config.devices, precision=_PRECISIONS[config.precision])
        fabric.launch()
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"accelerator {config.accelerator!r} with {config.devices} devices in {config.precision}: {error}"
        ) from None
    return fabric


def _open_folder(folder: Path, config: TrainingConfig, resume: bool) -> dict[str, Any] | None:
    """Make `folder`, or read the state that it holds."""
    path = folder / STATE_FILE
    if path.exists():
        if not resume:
            raise ConfigError(f"{folder}: holds a training already; resume it, or choose another folder")
        state = _read_state(path)
        differences = config.differences(TrainingConfig.from_dict(state["config"]))
        if differences:
            raise ConfigError(f"{folder}: holds another training, with {', '.join(differences)}; choose another folder")
        return state
    try:
        import yaml
    except ImportError:
        raise MissingPackageError("yaml", "train") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.to_dict(), sort_keys=False)
        _replace(folder / CONFIG_FILE, lambda part: part.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None
    return None


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        first = (str(error).splitlines() or [""])[0][:120]
        raise CheckpointError(
            f"{path}: not a state of a training, or damaged ({first}); start in another folder"
        ) from None
    if not isinstance(state, dict) or "iteration" not in state or "config" not in state:
        raise CheckpointError(f"{path}: not a state of a training")
    return state


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` fill a sibling, and put it in the place of `path` once it is on the disk."""
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
