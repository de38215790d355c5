"""The training loop: SGD, the poly rate, cross-entropy; it can be killed at any moment and resumed bit for bit.

Nothing random has a state: which images an iteration sees, how each is augmented and what dropout drops follow from the
seed and the iteration's number. What has to be kept is the weights, the momentum, that number, and fp16's loss scale.
"""

from __future__ import annotations

import csv
import logging
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from agln_fast import interruption
from agln_fast.data.augment import Augmentation
from agln_fast.data.dataset import IGNORE_INDEX, CachedDataset, SegmentationDataset
from agln_fast.errors import AglnError, CheckpointError, ConfigError, TrainingError, printable
from agln_fast.files import replacing
from agln_fast.metrics import SegmentationMetrics
from agln_fast.models.checkpoint import save_checkpoint
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.training.batches import Batches, Crops, Images, collate
from agln_fast.training.config import TrainingConfig
from agln_fast.training.folder import CONFIG_FILE, LOG_FILE, STATE_FILE, WEIGHTS_FILE, check_start, open_split
from agln_fast.training.start import Start, begin
from agln_fast.training.start import resume as continue_from

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from rich.progress import Progress

__all__ = ["LogRow", "TrainingRun", "train"]

_log = logging.getLogger("agln_fast.training")
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
    """A finished run: the network in eval mode, its weights file, the log, and which of the processes this one is.

    start: one line about the checkpoint that it started from; empty if from none.
    """

    network: SegmentationNetwork
    weights: Path
    log: tuple[LogRow, ...]
    rank: int = 0
    start: str = ""


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
        CheckpointError: weights to start from, or a state, that cannot be used.
        DatasetError: the data are not there.
        TrainingError: the loss is NaN or infinite, or the folder cannot be written.
        MissingPackageError: a package of the extra "train" is not installed.
    """
    folder = Path(output)
    check_start(config, folder, resume=resume)
    fabric = _fabric(config)
    state = _on_rank_zero(fabric, lambda: _read_run(folder, config))
    train_set = train_set or open_split(config, "train")
    val_set = val_set or open_split(config, "val")
    if config.cache:
        train_set, val_set = CachedDataset(train_set), CachedDataset(val_set)
        if config.workers:  # they are forked, and share what is there already
            train_set.fill()
            val_set.fill()
    num_classes = len(train_set.class_set.classes)
    if state is None:
        trainer = _Trainer(fabric, config, begin(config, num_classes), train_set, val_set)
        if trainer.start.remark and fabric.global_rank == 0:
            _say(trainer.start.remark, progress)
    else:
        try:
            trainer = _Trainer(fabric, config, continue_from(state["start"], num_classes), train_set, val_set)
            trainer.load(state)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            what = _first_line(error)
            raise CheckpointError(f"{folder / STATE_FILE}: damaged, or of another version ({what})") from None
    _on_rank_zero(fabric, lambda: _prepare_folder(folder, config))
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    if fabric.device.type == "cuda":  # where the gradient of the bilinear resize would otherwise differ from run to run
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        trainer.run(folder, progress if fabric.global_rank == 0 else None)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    return TrainingRun(
        trainer.network.eval(), folder / WEIGHTS_FILE, tuple(trainer.log), fabric.global_rank, trainer.start.remark
    )


class _Trainer:
    """The network, its optimizer, and what has been measured since the last line of the log.

    With several processes, `matrix` counts the pixels of this one; losses and all that is stored are of all together.
    """

    def __init__(
        self,
        fabric: Fabric,
        config: TrainingConfig,
        start: Start,
        train_set: SegmentationDataset,
        val_set: SegmentationDataset,
    ) -> None:
        self.fabric, self.config, self.train_set, self.val_set = fabric, config, train_set, val_set
        self.start, network = start, start.network
        self.total = max(1, round(config.epochs * len(train_set) / config.batch_size))
        if fabric.device.type == "cuda" and fabric.world_size > 1:
            network = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
        network.class_set = train_set.class_set  # which its checkpoint then remembers
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.SGD(
            start.parameter_groups(config.loaded_rate),
            config.base_lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        self.module, self.optimizer = fabric.setup(self.network, optimizer)
        self.num_classes = network.config.num_classes
        self.iteration, self.seconds = 0, 0.0
        self.losses: list[float] = []
        self.matrix = self._no_pixels()
        self.log: list[LogRow] = []

    def _no_pixels(self) -> Tensor:
        return torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64, device=self.fabric.device)

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, as plain types and tensors; every process must call it."""
        return {
            "config": self.config.to_dict(),
            "start": self.start.state(),
            "iteration": self.iteration,
            "seconds": self.seconds,
            "losses": self.losses,
            "matrix": self._of_all(self.matrix),
            "log": [asdict(row) for row in self.log],
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fabric.strategy.precision.load_state_dict(state.get("precision", {}))
        self.iteration, self.seconds, self.losses = state["iteration"], state["seconds"], state["losses"]
        if self.fabric.global_rank == 0:
            self.matrix += state["matrix"].to(self.fabric.device)
        self.log = [LogRow(**row) for row in state["log"]]

    def _of_all(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        return cast(Tensor, self.fabric.all_reduce(value.clone(), reduce_op="sum"))

    def run(self, folder: Path, progress: Progress | None) -> None:
        """Go on to the last iteration."""
        config = self.config
        augmentation = Augmentation(config.crop, config.base_size, (config.min_scale, config.max_scale))
        loader = self.fabric.setup_dataloaders(
            DataLoader(
                Crops(self.train_set, augmentation, config.seed),
                batch_sampler=Batches(
                    len(self.train_set),
                    config,
                    range(self.iteration, self.total),
                    self.fabric.global_rank,
                    self.fabric.world_size,
                ),
                num_workers=config.workers,
                collate_fn=collate,
            ),
            use_distributed_sampler=False,
        )
        task = progress.add_task(config.title, total=self.total, completed=self.iteration) if progress else None
        every = max(1, round(config.validate_every * len(self.train_set) / config.batch_size))
        began = time.monotonic() - self.seconds
        if self.iteration == self.total:
            self._save(folder)  # whatever became of the files since
        for batch in loader:
            interruption.check()
            if isinstance(batch, AglnError):
                raise batch
            self._step(*batch)
            self.iteration += 1
            self.seconds = time.monotonic() - began
            validate = self.iteration % every == 0 or self.iteration == self.total
            if validate:
                self._add_log_row()
            if validate or self.iteration % config.save_every == 0:
                self._save(folder)
            if progress is not None and task is not None:
                if validate:
                    progress.console.print(self._line(), highlight=False)
                progress.update(task, completed=self.iteration)
                if self.iteration % 10 == 0 or validate:
                    progress.update(task, description=self._description())

    def _step(self, images: Tensor, labels: Tensor) -> None:
        config = self.config
        rate = config.base_lr * (1 - self.iteration / self.total) ** config.poly_power
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        _seed_dropout(config.seed, self.iteration, self.fabric.global_rank)
        self.module.train()
        logits = self.module(images.contiguous(memory_format=torch.channels_last)).float()
        # The mean over the whole batch: DDP averages the processes, which may have labelled pixels in unequal numbers.
        counted = self._of_all((labels != IGNORE_INDEX).sum()).clamp(min=1)  # crops may be all padding
        total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        loss = total / (counted / self.fabric.world_size)
        value = float(self._of_all(loss.detach()) / self.fabric.world_size)
        if not np.isfinite(value):
            self._diverged(f"the loss is {value}", rate)
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self.optimizer.step()
        self.losses.append(value)
        self._count(self.matrix, logits.detach().argmax(1), labels)

    def _count(self, matrix: Tensor, labels: Tensor, truth: Tensor) -> None:
        """Add to the confusion matrix where the pixels are; `SegmentationMetrics` makes numbers of it."""
        known = truth != IGNORE_INDEX
        pairs = truth[known] * self.num_classes + labels[known]
        matrix += torch.bincount(pairs, minlength=self.num_classes**2).view_as(matrix)

    def _metrics(self, matrix: Tensor) -> SegmentationMetrics:
        return SegmentationMetrics(self.num_classes, matrix=matrix.cpu())

    def _diverged(self, what: str, rate: float) -> NoReturn:
        before = f"{self.losses[-1]:.3g}" if self.losses else "not known"
        raise TrainingError(
            f"{what} in iteration {self.iteration + 1} of {self.total} (learning rate {rate:.2g}; the loss before was "
            f"{before}): the training has diverged; lower base_lr, or check the encoder weights"
        )

    def _description(self) -> str:
        last = self.log[-1] if self.log else None
        loss = np.mean(self.losses[-50:]) if self.losses or last is None else last.loss
        miou = self._metrics(self.matrix).mean_iou if self.losses or last is None else last.train_miou
        validated = f", val {last.val_miou:.1%}" if last else ""
        return f"{self.config.title}  loss {loss:.3f}  mIoU {miou:.1%}{validated}"

    def _line(self) -> str:
        row = self.log[-1]
        return (
            f"{self.config.title} epoch {row.epoch:.4g} of {self.config.epochs:g}: loss {row.loss:.3f}, mIoU "
            f"{row.train_miou:.2%}, validation {row.val_miou:.2%}, pixels {row.val_pixel_accuracy:.2%}; "
            f"{row.seconds / 60:.1f} minutes"
        )

    def _add_log_row(self) -> None:
        validation = self._metrics(self._validate())
        row = LogRow(
            iteration=self.iteration,
            epoch=self.iteration * self.config.batch_size / len(self.train_set),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            loss=float(np.mean(self.losses)),
            train_miou=self._metrics(self._of_all(self.matrix)).mean_iou,
            val_miou=validation.mean_iou,
            val_pixel_accuracy=validation.pixel_accuracy,
            seconds=self.seconds,
        )
        self.log.append(row)
        self.losses, self.matrix = [], self._no_pixels()

    def _validate(self) -> Tensor:
        """Confusion matrix of whole images at their own size; the processes share the work."""
        matrix, device = self._no_pixels(), self.fabric.device
        images = DataLoader(
            Images(self.val_set),
            sampler=range(self.fabric.global_rank, len(self.val_set), self.fabric.world_size),
            num_workers=self.config.workers,
            collate_fn=collate,
        )
        self.network.eval()
        with torch.inference_mode(), self.fabric.autocast():
            for batch in images:
                interruption.check()
                if isinstance(batch, AglnError):
                    raise batch
                image, truth = batch
                self._count(matrix, self.network(image.to(device)).argmax(1), truth.to(device))
        return self._of_all(matrix)

    def _save(self, folder: Path) -> None:
        """The state comes last: what it says was done is on the disk."""
        state = self.state()
        if self.fabric.global_rank == 0:
            if not all(parameter.isfinite().all() for parameter in self.network.parameters()):
                self._diverged("weights are NaN or infinite", self.optimizer.param_groups[0]["lr"])
            try:
                save_checkpoint(self.network, folder / WEIGHTS_FILE)
                with replacing(folder / LOG_FILE, TrainingError) as part:
                    self._write_log(part)
                with replacing(folder / STATE_FILE, TrainingError) as part:
                    torch.save(state, part)
            # PyTorch raises RuntimeError on a full disk.
            except (RuntimeError, CheckpointError, TrainingError) as error:
                message = f"{folder}: the state cannot be saved ({_first_line(error)}); resume once there is room"
                raise TrainingError(message) from None
        self.fabric.barrier()

    def _write_log(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(LogRow)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.log)


def _say(line: str, progress: Progress | None) -> None:
    if progress is None:
        _log.info("%s", line)
    else:
        progress.console.print(printable(line, len(line)), highlight=False, markup=False)


def _seed_dropout(*numbers: int) -> None:
    """Dropout draws from PyTorch's own generator; seeded before each step, it has no state to keep."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def _fabric(config: TrainingConfig) -> Fabric:
    from lightning_fabric import Fabric
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    try:
        fabric = Fabric(accelerator=config.accelerator, devices=config.devices, precision=_PRECISIONS[config.precision])
        fabric.launch()
    except (MisconfigurationException, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"accelerator {config.accelerator!r} with {config.devices} devices in {config.precision}: {error}"
        ) from None
    if config.precision == "fp16" and fabric.device.type == "cpu":
        raise ConfigError("precision fp16: CPUs train in fp32 or bf16")
    return fabric


def _on_rank_zero(fabric: Fabric, action: Callable[[], Any]) -> Any:
    """Do something in the first process only; all get its result, or its error."""
    outcome: Any = None
    if fabric.global_rank == 0:
        try:
            outcome = action()
        except AglnError as error:
            outcome = error
    outcome = fabric.broadcast(outcome)
    if isinstance(outcome, AglnError):
        raise outcome
    return outcome


def _read_run(folder: Path, config: TrainingConfig) -> dict[str, Any] | None:
    """The state of the run that `folder` holds, or None."""
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        stored = TrainingConfig.from_dict(state["config"])
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a state of a training, or damaged ({_first_line(error)}); start in another folder"
        ) from None
    except ConfigError as error:
        raise CheckpointError(f"{path}: of another version ({error})") from None
    differences = config.differences(stored)
    if differences:
        raise ConfigError(f"{folder}: holds another training, with {', '.join(differences)}; choose another folder")
    return cast(dict[str, Any], state)


def _prepare_folder(folder: Path, config: TrainingConfig) -> None:
    """Make it, write the config, and clear away what a kill has left half written."""
    import yaml

    text = yaml.safe_dump(config.to_dict(), sort_keys=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob(".*.part"):
            part.unlink()
        with replacing(folder / CONFIG_FILE, TrainingError) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
