"""The training config: the recipe fills it, YAML and flags change it, nonsense is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from agln_fast.data.registry import DATASETS
from agln_fast.errors import ConfigError
from agln_fast.training.config import RECIPES, TrainingConfig


@pytest.mark.parametrize(
    ("data", "base_lr", "epochs"),
    [("pascal_context_59", 0.001, 240), ("ade20k", 0.001, 240), ("pascal_voc", 0.0005, 120)],
)
def test_recipes_are_the_papers(data: str, base_lr: float, epochs: int) -> None:
    """Section IV-A.5 of the paper."""
    config = TrainingConfig(data=data)
    assert (config.base_lr, config.epochs, config.batch_size) == (base_lr, epochs, 16)
    assert (config.momentum, config.weight_decay, config.poly_power) == (0.9, 1e-4, 0.9)
    assert (config.min_scale, config.max_scale, config.crop, config.base_size) == (0.5, 2.0, 480, 520)


def test_every_dataset_has_a_recipe() -> None:
    assert set(RECIPES) == set(DATASETS)


def test_what_is_given_wins_over_the_recipe() -> None:
    config = TrainingConfig(data="ade20k", epochs=1.5, cache=True)
    assert (config.epochs, config.cache, config.base_lr) == (1.5, True, 0.001)


def test_yaml_round_trip_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    # YAML 1.1 reads 5e-4 as text; a whole number is fine for a float.
    path.write_text("model: fpn_nano\ndata: pascal_voc\nbase_lr: 5e-4\nepochs: 3\n")
    config = TrainingConfig.from_yaml(path, seed=7)
    assert config == TrainingConfig(model="fpn_nano", data="pascal_voc", base_lr=5e-4, epochs=3.0, seed=7)
    assert TrainingConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": "pascal_vok"}, "did you mean 'pascal_voc'"),
        ({"epochz": 3}, "did you mean 'epochs'"),
        ({"epochs": 0}, "epochs 0.0: must be from 1e-06"),
        ({"epochs": float("inf")}, "epochs inf: must be from"),
        ({"base_lr": float("nan")}, "base_lr nan: must be from"),
        ({"momentum": 1.5}, "momentum 1.5: must be from 0 to 0.9999"),
        ({"seed": 2**70}, "must be from 0 to"),
        ({"min_scale": 2.0, "max_scale": 1.0}, "max_scale 1.0: is below min_scale 2.0"),
        ({"batch_size": 1, "crop": 32}, "batch normalisation needs more"),
        ({"model": "agln_nan"}, "did you mean 'agln_nano'"),
        ({1: 2}, "unknown field 1"),
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"batch_size": "many"}, "batch_size must be int, got 'many'"),
        ({"seed": True}, "seed must be int, got True"),
        ({"batch_size": 16, "devices": 3}, "batch size 16 cannot be divided among 3"),
        ({"weights": "ema"}, "weights: is about the checkpoint to start from; name it with --from"),
        ({"fresh_classifier": True}, "fresh_classifier: is about the checkpoint to start from"),
        ({"initial_weights": "a", "encoder_weights": "b"}, "encoder_weights: a checkpoint to start from"),
        ({"initial_weights": "a", "loaded_rate": -1.0}, "loaded_rate -1.0: must be from 0 to 100"),
        ({"initial_weights": "a", "model": "agln_nan"}, "did you mean 'agln_nano'"),
        ({"train_samples": 0.5}, "train_samples must be int or nothing"),
    ],
)
def test_nonsense_is_refused(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        TrainingConfig.from_dict(values)


@pytest.mark.parametrize("text", ["- a list", "{", "a: [1", ""])
def test_a_file_that_is_no_mapping_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"needs `field: value`|not YAML"):
        TrainingConfig.from_yaml(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        TrainingConfig.from_yaml(tmp_path / "other.yaml")


def test_differences_name_what_would_be_another_run() -> None:
    config = TrainingConfig()
    harmless = TrainingConfig(workers=4, save_every=7, cache=False, accelerator="cpu", data_root="elsewhere")
    assert config.differences(harmless) == []
    assert config.differences(TrainingConfig(seed=3)) == ["seed 3 instead of 0"]


def test_a_checkpoint_stands_for_the_model() -> None:
    assert TrainingConfig().model == TrainingConfig().title == "agln_nano"
    config = TrainingConfig(initial_weights="runs/street.safetensors")
    assert (config.model, config.title, config.loaded_rate) == (None, "street", 0.1)
    assert TrainingConfig.from_dict(config.to_dict()) == config
