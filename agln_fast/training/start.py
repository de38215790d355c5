"""What a training starts from: random weights, those of an encoder, or a checkpoint of as many classes or of others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from agln_fast.errors import ConfigError
from agln_fast.models.checkpoint import Checkpoint, load_backbone, read_checkpoint
from agln_fast.models.config import ModelConfig, preset
from agln_fast.models.networks import SegmentationNetwork, create_model
from agln_fast.training.config import TrainingConfig

__all__ = ["Start", "begin", "resume", "tensors_of_classes"]

# Without weights: only a file that states its config tells whether they are there.
_UNSEEN = {"channel_resampling", "spatial_gating"}


@dataclass(frozen=True)
class Start:
    """A network with its first weights.

    loaded: names of the tensors that came from a checkpoint of the whole network; all others are random, or those of
        an ImageNet encoder, which by the paper's recipe learns as fast as the rest.
    remark: one line that says what was loaded; empty without a checkpoint.
    """

    network: SegmentationNetwork
    loaded: frozenset[str] = frozenset()
    remark: str = ""

    def parameter_groups(self, loaded_rate: float) -> list[dict[str, Any]]:
        """For an optimizer; `factor` is what the learning rate of a group is multiplied by.

        It is `loaded_rate` for loaded layers where there are fresh ones, too, which are the first group; else 1.
        """
        named = dict(self.network.named_parameters())
        fresh = [parameter for name, parameter in named.items() if name not in self.loaded]
        loaded = [parameter for name, parameter in named.items() if name in self.loaded]
        if not fresh or not loaded:
            return [{"params": list(named.values()), "factor": 1.0}]
        return [{"params": fresh, "factor": 1.0}, {"params": loaded, "factor": loaded_rate}]

    def state(self) -> dict[str, Any]:
        """Plain types that `resume` takes."""
        return {"model": asdict(self.network.config), "loaded": sorted(self.loaded), "remark": self.remark}


def begin(config: TrainingConfig, num_classes: int) -> Start:
    """The network that `config` describes, for `num_classes` classes, with the weights that it names.

    Random ones follow from the seed.

    Raises:
        CheckpointError: weights that cannot be used.
        ConfigError: the checkpoint is of another model than the config names.
    """
    checkpoint = None
    if config.initial_weights is not None:
        checkpoint = read_checkpoint(config.initial_weights, weights=config.weights)
        checkpoint.log(config.initial_weights)
    torch.manual_seed(config.seed)
    if checkpoint is not None:
        return _continued(config, checkpoint, num_classes)
    assert config.model is not None
    network = create_model(config.model, num_classes)
    if config.encoder_weights is not None:
        load_backbone(network, config.encoder_weights)
    return Start(network)


def resume(state: Mapping[str, Any], num_classes: int) -> Start:
    """The start of the training whose `Start.state` this is, with random weights in the place of those that follow.

    Raises:
        KeyError, TypeError, ValueError: it is no such state.
    """
    model = replace(ModelConfig.from_dict(state["model"]), num_classes=num_classes)
    return Start(SegmentationNetwork(model), frozenset(state["loaded"]), state["remark"])


def tensors_of_classes(config: ModelConfig, num_classes: int | None = None) -> set[str]:
    """Names of the parameters and buffers of the layers that depend on the number of classes.

    They are found by comparing the network with one of `num_classes` classes (None: of any other number), on the meta
    device: a layer is meant if the shape of one of its tensors differs.
    """
    if num_classes is None:
        num_classes = config.num_classes - 1 or 2
    ours, theirs = _shapes(config), _shapes(replace(config, num_classes=num_classes))
    layers = {name.rpartition(".")[0] for name, shape in ours.items() if theirs.get(name) != shape}
    return {name for name in ours if name.rpartition(".")[0] in layers}


def _shapes(config: ModelConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in SegmentationNetwork(config).state_dict().items()}


def _continued(config: TrainingConfig, checkpoint: Checkpoint, num_classes: int) -> Start:
    given = _agreed(config, checkpoint)
    network = SegmentationNetwork(replace(given, num_classes=num_classes))
    fresh: set[str] = set()
    why = ""
    if given.num_classes != num_classes:
        fresh = tensors_of_classes(network.config, given.num_classes)
        why = f"for {num_classes} classes in the place of {given.num_classes}"
    elif config.fresh_classifier:
        fresh, why = tensors_of_classes(network.config), f"for other {num_classes} classes"
    state = {name: tensor for name, tensor in checkpoint.network.state_dict().items() if name not in fresh}
    network.load_state_dict({**network.state_dict(), **state})
    if not fresh:
        remark = f"starts from {config.initial_weights}: all {len(state)} tensors are loaded, {num_classes} classes"
    else:
        remark = (
            f"starts from {config.initial_weights}: {len(state)} tensors are loaded, {len(fresh)} are fresh {why} "
            f"({', '.join(sorted(fresh))}); loaded layers learn at {config.loaded_rate:g} of the rate"
        )
    return Start(network, frozenset(state), remark)


def _agreed(config: TrainingConfig, checkpoint: Checkpoint) -> ModelConfig:
    """What the checkpoint's network is, if it is what `config` says.

    Raises:
        ConfigError: it is something else.
    """
    given = checkpoint.network.config
    if config.model is None:
        return given
    asked = preset(config.model, given.num_classes)
    differences = {name: value for name, value in asdict(asked).items() if value != getattr(given, name)}
    alike = _shapes(asked).keys() == checkpoint.network.state_dict().keys()
    if differences.keys() <= _UNSEEN and alike and not checkpoint.stated:
        return asked
    if differences:
        listed = ", ".join(
            f"{name} {value!r} instead of {getattr(given, name)!r}" for name, value in differences.items()
        )
        raise ConfigError(
            f"{config.initial_weights}: holds another network than {config.model}, which has {listed}; leave the model "
            "out, because the checkpoint tells"
        )
    return given
