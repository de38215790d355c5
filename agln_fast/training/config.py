"""What a training run is: one typed dataclass, filled from a YAML file or from flags."""

from __future__ import annotations

import os
import types
import typing
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from agln_fast.data.document import read_document
from agln_fast.data.registry import check_dataset, is_path
from agln_fast.errors import ConfigError, choose
from agln_fast.models.config import preset

__all__ = ["RECIPES", "Recipe", "TrainingConfig"]

TrainingPrecision = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True)
class Recipe:
    """What depends on the dataset (section IV-A): lengths in pixels."""

    base_lr: float
    epochs: float
    crop: int = 480
    base_size: int = 520
    cache: bool = False


RECIPES = {
    "pascal_voc": Recipe(base_lr=0.0005, epochs=120),
    "pascal_context_59": Recipe(base_lr=0.001, epochs=240),
    "pascal_context_60": Recipe(base_lr=0.001, epochs=240),
    "ade20k": Recipe(base_lr=0.001, epochs=240),
    # Not the paper's: without an ImageNet encoder everything has to be learned, so the steps are longer.
    "scenes": Recipe(base_lr=0.05, epochs=16, crop=128, base_size=128, cache=True),
}


_DEFAULT_MODEL = "agln_nano"
_OWN_RECIPE = Recipe(base_lr=0.001, epochs=120)  # the paper's, for encoders with ImageNet weights
_ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps", "tpu")  # those of Lightning Fabric
_HARMLESS = ("data_root", "accelerator", "workers", "cache", "save_every")

# Smallest and largest: what is beyond is a slip of the keyboard.
_LIMITS: dict[str, tuple[float, float]] = {
    "epochs": (1e-6, 1e6),
    "base_lr": (1e-12, 1e6),
    "batch_size": (1, 65536),
    "momentum": (0, 0.9999),
    "weight_decay": (0, 10),
    "poly_power": (0, 100),
    "crop": (32, 8192),
    "base_size": (32, 8192),
    "min_scale": (0.01, 99),
    "max_scale": (0.01, 99),
    "loaded_rate": (0, 100),
    "devices": (1, 1024),
    "workers": (0, 1024),
    "seed": (0, 2**32 - 1),
    "validate_every": (1e-6, 1e6),
    "save_every": (1, 1e9),
}


def _option(default: Any, text: str, *flags: str) -> Any:
    return field(default=default, metadata={"help": text, "flags": flags})


@dataclass(frozen=True)
class TrainingConfig:
    """A training run; equal configs give equal weights on one machine.

    What the recipe of the dataset gives (`Recipe`) may be left out.

    Raises:
        ConfigError: an unknown name or an impossible value.
    """

    model: str | None = _option(
        None, "Preset, such as agln_resnet101 (`agln-fast inspect` names them all); default agln_nano, or as --from."
    )
    data: str = _option("scenes", f"Dataset: {', '.join(RECIPES)}, or the folder or data.yaml of your own.")
    data_root: str | None = _option(None, "Folder of a published dataset.")
    train_split: str = _option("train", "Split to train on.")
    val_split: str = _option("val", "Split to validate on.")
    train_samples: int | None = _option(None, "Take only so many, the first ones; default all.")
    val_samples: int | None = _option(None, "Take only so many, the first ones; default all.")
    skip_bad: bool = _option(False, "Leave out samples that cannot be used, and count them.")
    encoder_weights: str | None = _option(None, "ImageNet weights for the encoder (torchvision's names).")
    initial_weights: str | None = _option(
        None,
        "Checkpoint to start from, which tells the model; its classifier only if it has as many classes.",
        "--from",
    )
    weights: str | None = _option(None, "Of a --from that holds several weights: the name of those to take, e.g. ema.")
    fresh_classifier: bool = _option(False, "Leave the classifier of --from out though it has as many classes.")
    loaded_rate: float = _option(0.1, "Learning rate of what --from gives, over that of fresh layers if there are any.")
    epochs: float = _option(None, "Passes over the data; default the dataset's recipe.")
    base_lr: float = _option(None, "Learning rate at the start; default the dataset's recipe.")
    batch_size: int = _option(16, "Images a step, over all devices together.")
    momentum: float = _option(0.9, "Of SGD.")
    weight_decay: float = _option(1e-4, "Of SGD, on all weights.")
    poly_power: float = _option(0.9, "The rate falls with (1 - iteration / total) to this power.")
    crop: int = _option(None, "Side of the training crop, pixels; default the dataset's recipe.")
    base_size: int = _option(None, "Longer side of the image at scale 1, pixels; default the dataset's recipe.")
    min_scale: float = _option(0.5, "Smallest random scale.")
    max_scale: float = _option(2.0, "Largest random scale.")
    precision: TrainingPrecision = _option("fp32", "fp32, or mixed precision in bf16 or fp16.")  # noqa: RUF009
    accelerator: str = _option("auto", "cpu, cuda, auto: what Lightning Fabric knows.")
    devices: int = _option(1, "How many devices; more than one train together (DDP).")
    workers: int = _option(0, "Processes that read images; 0 reads in the training process.")
    cache: bool = _option(None, "Keep images in memory; default the dataset's recipe.")
    seed: int = _option(0, "Of weights, order, augmentation and dropout.")
    validate_every: float = _option(1.0, "Epochs between validations.")
    save_every: int = _option(100, "Iterations between saved states.")

    def __post_init__(self) -> None:
        check_dataset(self.data)
        if is_path(self.data):  # which is found again from any folder
            object.__setattr__(self, "data", os.path.abspath(self.data))
        for name, value in asdict(RECIPES.get(self.data, _OWN_RECIPE)).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"{name} {value}: must be from {low:g} to {high:g}")
        if self.max_scale < self.min_scale:
            raise ConfigError(f"max_scale {self.max_scale}: is below min_scale {self.min_scale}")
        choose("precision", self.precision, get_args(TrainingPrecision))
        choose("accelerator", self.accelerator, _ACCELERATORS)
        if self.precision == "fp16" and self.accelerator == "cpu":
            raise ConfigError("precision fp16: CPUs train in fp32 or bf16")
        if self.batch_size % self.devices:
            raise ConfigError(f"batch size {self.batch_size} cannot be divided among {self.devices} devices")
        if self.batch_size // self.devices == 1 and self.crop <= 32:
            raise ConfigError(
                "one crop of 32 pixels a device: batch normalisation needs more, a batch or a larger crop"
            )
        self._check_start()

    def _check_start(self) -> None:
        if self.initial_weights is None:
            for name in ("weights", "fresh_classifier"):
                if getattr(self, name):
                    raise ConfigError(f"{name}: is about the checkpoint to start from; name it with --from")
            if self.model is None:
                object.__setattr__(self, "model", _DEFAULT_MODEL)
        elif self.encoder_weights is not None:
            raise ConfigError(
                "encoder_weights: a checkpoint to start from (--from) has an encoder; leave one of them out"
            )
        if self.model is not None:
            preset(self.model, num_classes=1)

    @property
    def title(self) -> str:
        """What the network is called on the screen: the preset's name, or the checkpoint's."""
        return self.model or Path(self.initial_weights or "").stem

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainingConfig:
        """Build from plain types, such as a YAML file holds.

        Raises:
            ConfigError: an unknown field, or a value of the wrong type.
        """
        hints = typing.get_type_hints(cls)
        converted = {}
        for name, value in values.items():
            choose("field", name, hints, where="training config")
            converted[name] = _convert(name, value, hints[name])
        return cls(**converted)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], **overrides: Any) -> TrainingConfig:
        """Read a YAML file; `overrides` win over it.

        Raises:
            ConfigError: no such file, not YAML, not a mapping, or as `from_dict`.
            MissingPackageError: PyYAML is not installed.
        """
        values = read_document(path, ConfigError)
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: needs `field: value` lines, got {type(values).__name__}")
        return cls.from_dict({**values, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain types; the inverse of `from_dict`."""
        return asdict(self)

    def differences(self, other: TrainingConfig) -> list[str]:
        """Fields, with both values, that would make another run of it; where data lie and what computes does not."""
        moved = is_path(self.data) and is_path(other.data)
        return [
            f"{item.name} {getattr(other, item.name)!r} instead of {getattr(self, item.name)!r}"
            for item in fields(self)
            if item.name not in (*_HARMLESS, *(["data"] if moved else []))
            and getattr(self, item.name) != getattr(other, item.name)
        ]


def _convert(name: str, value: Any, hint: Any) -> Any:
    allowed = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if typing.get_origin(hint) is Literal:
        allowed = (str,)
    if type(value) is int and float in allowed:
        return float(value)
    # YAML 1.1 reads 1e-4 as text; text that is no number is refused below.
    if isinstance(value, str) and float in allowed:
        with suppress(ValueError):
            return float(value)
    if type(value) not in allowed:
        names = " or ".join("nothing" if kind is types.NoneType else kind.__name__ for kind in allowed)
        raise ConfigError(f"training config: {name} must be {names}, got {value!r}")
    return value
