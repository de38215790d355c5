"""Read and write weights: the released checkpoints, our own safetensors files, ImageNet encoders.

Files are read by `weights_file`; here their tensors become networks.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn

from agln_fast.data.classes import ClassSet
from agln_fast.errors import CheckpointError, ConfigError, printable
from agln_fast.files import replacing
from agln_fast.forking import use_threads
from agln_fast.models.config import Architecture, ModelConfig
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.models.resnet import ResNet
from agln_fast.models.shipped import find_checkpoint
from agln_fast.models.weights_account import Account
from agln_fast.models.weights_fcn import fcn_names
from agln_fast.models.weights_file import CLASSES_KEY, StateDict, Weights, read_safetensors, read_weights

__all__ = [
    "Checkpoint",
    "infer_config",
    "load_backbone",
    "load_checkpoint",
    "load_weights",
    "read_checkpoint",
    "save_checkpoint",
]

_log = logging.getLogger("agln_fast.checkpoint")
_METADATA_KEY = "agln_fast.config"
_LEVELS = "432"  # the release numbers descriptors and levels by stage: d4 is ours 0, d3 is 1, d2 is 2

# Names in released checkpoints -> ours. Their lists run fine to coarse, ours coarse to fine.
_RELEASED_NAMES: list[tuple[str, Any]] = [
    (r"^pretrained\.", "encoder."),
    (r"^head\.fpn_lateral\.(\d)", lambda m: f"decoder.lateral.{2 - int(m[1])}"),
    (r"^head\.fpn_out\.(\d)", lambda m: f"decoder.smooth.{2 - int(m[1])}"),
    (r"^head\.[ce]4conv\.", "decoder.reduce."),
    (r"^head\.conv5\.", "classifier."),
    (r"^head\.sab_d([432])", lambda m: f"decoder.sab.{_LEVELS.index(m[1])}"),
    (r"^head\.cfb_d([432])\.(\d)", lambda m: f"decoder.cfb.{2 - int(m[2])}.{_LEVELS.index(m[1])}"),
    (r"\.conv_feat\.", ".phi."),
    (r"\.conv_atten\.", ".theta."),
    (r"\.conv_de\.", ".phi."),
    (r"\.out_conv\.", ".project."),
    (r"\.conv_fusion\.", ".fuse."),
]
_DEPTHS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
}


class Checkpoint(NamedTuple):
    """A network in eval mode and float32, how its weights were found, and whether the file states its config."""

    network: SegmentationNetwork
    account: Account
    stated: bool

    def log(self, path: str | os.PathLike[str]) -> None:
        """Say how the weights were found, but of a file of ours, which is in half precision on purpose."""
        if not self.stated:
            self.account.log(str(path))


def load_checkpoint(
    path: str | os.PathLike[str], config: ModelConfig | None = None, *, weights: str | None = None
) -> SegmentationNetwork:
    """Load a network, in eval mode and float32, on the CPU.

    Args:
        path: a released `.pth` / `.pth.tar` of AGLN, FPN or FCN, or FCN of torchvision or MMSegmentation (a state dict,
            or a dict that holds one under "state_dict", "model" and others; with or without prefixes such as
            "module."), a `.safetensors` file of `save_checkpoint` or of others, the `.index.json` of one that is cut in
            shards, or the name of a checkpoint that ships with the package (`list_checkpoints`). What a file is, its
            content tells, not its suffix.
        config: what the network is; None to take it from the file's metadata or infer it from names and shapes.
        weights: where the file holds several, which are taken: the name that they stand under, or "ema" for the moving
            average; None for the trained ones. What was taken, stripped, converted and ignored is logged in a line.

    Raises:
        CheckpointError: the file is missing, truncated, no checkpoint, wants to run code, does not fit the config
            (missing, unexpected, misshapen entries are counted and the first ones named), or holds NaN, Inf or a
            negative variance; or it holds no `weights`, or several of which none is preferred.
    """
    checkpoint = read_checkpoint(path, config, weights=weights)
    checkpoint.log(path)
    return checkpoint.network


def read_checkpoint(
    path: str | os.PathLike[str], config: ModelConfig | None = None, *, weights: str | None = None
) -> Checkpoint:
    """As `load_checkpoint`, but how the weights were found is returned, not logged."""
    use_threads()
    path = find_checkpoint(path)
    try:
        return _checkpoint(read_weights(path, weights), str(path), config)
    except CheckpointError as error:
        shard = re.fullmatch(r"(.+)-\d{5}-of-\d{5}(\.\w+)", path.name)
        hint = f"; if it is one shard of several, give their index, {shard[1]}{shard[2]}.index.json" if shard else ""
        raise CheckpointError(f"{error}{hint}") from None


def load_weights(data: bytes, name: str) -> SegmentationNetwork:
    """Load a network as `load_checkpoint` does, from the bytes of a `.safetensors` file.

    Args:
        data: the whole file; nothing of the network refers to it afterwards.
        name: what errors call it, e.g. its path.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    use_threads()
    return _checkpoint(read_safetensors(data, name), name, None).network


def _checkpoint(weights: Weights, name: str, config: ModelConfig | None) -> Checkpoint:
    """The network that `weights` belong to, with them; `name` is what errors call the file."""
    state, metadata, account = weights
    released = any(key.startswith("head.") for key in state)
    try:
        fcn = fcn_names(state, account)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    state = fcn or {_our_name(key): tensor for key, tensor in state.items()}
    stated = _METADATA_KEY in metadata
    if config is None and stated:
        try:
            config = ModelConfig.from_json(metadata[_METADATA_KEY])
        except (ConfigError, RecursionError) as error:
            raise CheckpointError(f"{name}: its metadata holds no usable config: {printable(error)}") from None
    if config is None:
        try:
            config, remarks = infer_config(state, "fcn8s" if fcn is None else "fcn")
        except ConfigError as error:
            raise CheckpointError(f"{name}: {error}") from None
        # The network of the release has both halves of the LRM: under its names nothing is in doubt.
        for remark in remarks if not released else ():
            _log.warning("%s: %s", name, remark)
    # On the meta device nothing is allocated before the shapes are known to be those of the file.
    with torch.device("meta"):
        network = SegmentationNetwork(config)
    _fill(network, state, name, f"{config.architecture} with {config.encoder}")
    if CLASSES_KEY in metadata:
        try:
            network.class_set = _read_classes(metadata[CLASSES_KEY], config.num_classes, name)
        except CheckpointError as error:
            if stated:
                raise
            _log.warning("%s", error)  # others may count a background that the network does not have
    return Checkpoint(network.eval(), account, stated)


def _read_classes(text: str, count: int, name: str) -> ClassSet:
    """The inverse of `ClassSet.to_json`, of as many classes as the network of the file `name` has."""
    try:
        classes = ClassSet.from_json(text)
    except ConfigError as error:
        raise CheckpointError(f"{name}: its metadata holds no usable classes: {printable(error)}") from None
    if len(classes.classes) != count:
        raise CheckpointError(f"{name}: its metadata names {len(classes.classes)} classes, the network has {count}")
    return classes


def save_checkpoint(
    model: SegmentationNetwork, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32
) -> None:
    """Write weights, config and classes as `.safetensors`, whole or not at all.

    Args:
        dtype: of the convolutions' weights, e.g. `torch.float16` for half the size; all else stays float32, because
            variances may be too small for float16. What is read back is float32 in any case.

    Raises:
        CheckpointError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: checkpoints are written as .safetensors; give the file that suffix")
    state = {
        name: (tensor.detach().to("cpu", dtype) if tensor.ndim > 1 else tensor.detach().cpu()).contiguous()
        for name, tensor in model.state_dict().items()
    }
    metadata = {_METADATA_KEY: model.config.to_json()}
    if model.class_set is not None:
        metadata[CLASSES_KEY] = model.class_set.to_json()
    with replacing(path, CheckpointError) as part, part.open("wb") as file:
        # Not `save_file`: it would make the file readable for its owner only, whatever the umask.
        file.writelines(_in_order(save(state, metadata=metadata)))


def _in_order(content: bytes) -> tuple[bytes, bytes, memoryview]:
    """The parts of a safetensors file with its metadata in an order that does not change, so that equal checkpoints are
    equal files."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little"), text, memoryview(content)[8 + size :]


def load_backbone(model: SegmentationNetwork, path: str | os.PathLike[str]) -> None:
    """Load plain ImageNet ResNet weights (torchvision's names; `fc` is ignored) into the encoder, in place.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    use_threads()
    path = Path(path)
    state, _, account = read_weights(path)
    account.log(str(path))
    state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    training = model.encoder.training
    _fill(model.encoder, state, str(path), f"the encoder {model.config.encoder}", assign=False)
    model.encoder.train(training)


def infer_config(state: Mapping[str, Tensor], without_decoder: Architecture = "fcn8s") -> tuple[ModelConfig, list[str]]:
    """Tell from names and shapes what network `state` belongs to, and what had to be assumed.

    `state` has our names (or others, already translated). `without_decoder`: the architecture of what has no decoder:
    "fcn8s" and "fcn" have the same names.

    Raises:
        ConfigError: it is no network of the family.
    """

    def shape(name: str, dimension: int = 0) -> int:
        tensor = state.get(name)
        if tensor is None or tensor.ndim <= dimension:
            raise ConfigError(f"not a checkpoint of the AGLN family: there is no {name!r} among {len(state)} entries")
        return tensor.shape[dimension]

    hidden, num_classes = shape("classifier.0.weight"), shape("classifier.4.weight")
    bottleneck = "encoder.layer1.0.conv3.weight" in state
    depths = tuple(_count(state, rf"encoder\.layer{stage}\.(\d+)\.conv1\.weight") for stage in (1, 2, 3, 4))
    if (bottleneck, depths) not in _DEPTHS:
        raise ConfigError(f"the encoder has {depths} blocks a stage: no ResNet-18, -34, -50 or -101")
    encoder = _DEPTHS[bottleneck, depths]
    if "encoder.conv1.0.weight" in state:
        encoder += "c" if shape("encoder.conv1.6.weight") == shape("encoder.layer1.0.conv1.weight") else "s"
    values: dict[str, Any] = {
        "encoder": encoder,
        "num_classes": num_classes,
        "width": _width([shape(f"encoder.layer{stage}.0.conv1.weight") for stage in (1, 2, 3, 4)]),
        "channels": hidden // 2,
    }
    if "decoder.convs.0.0.weight" in state:
        return ModelConfig.from_dict({**values, "architecture": "fcn", "concat_input": True}), []
    if "decoder.reduce.0.weight" not in state:
        return ModelConfig.from_dict({**values, "architecture": without_decoder}), []
    if "decoder.sab.0.phi.weight" not in state:
        return ModelConfig.from_dict({**values, "architecture": "fpn"}), []

    first = "decoder.cfb.0.0"
    released = f"{first}.sdm.project.weight" in state
    refined = f"{first}.gamma" in state if released else any(name.startswith(f"{first}.fuse.") for name in state)
    convolution = f"{first}.fuse" if released else f"{first}.enhance"
    config = ModelConfig.from_dict(
        {
            **values,
            "architecture": "agln",
            "formulation": "release" if released else "paper",
            "decoder": "dense" if "decoder.sab.1.phi.weight" in state else "straight",
            "pooling": "attention" if "decoder.sab.0.theta.weight" in state else "average",
            "num_descriptors": shape(f"{first}.sdm.phi.weight"),
            "channel_resampling": refined,
            "spatial_gating": refined,
            "learnable_alpha": f"{first}.alpha" in state,
            "learnable_beta": f"{first}.beta" in state or not (released or refined),
            "lite": f"{convolution}.2.weight" in state,
        }
    )
    remarks = []
    if refined:
        remarks.append(
            "channel resampling and spatial gating have no weights, so the file cannot tell whether both are there; "
            "both are assumed: pass a config if not"
        )
    return config, remarks


def _width(planes: list[int]) -> float:
    """A width factor that rounds to the channels of all four stages (64, 128, 256, 512 at width 1)."""
    bases = (64, 128, 256, 512)
    if all(base * planes[3] == 512 * plane for plane, base in zip(planes, bases, strict=True)):
        return planes[3] / 512
    low = max((plane - 0.5) / base for plane, base in zip(planes, bases, strict=True))
    high = min((plane + 0.5) / base for plane, base in zip(planes, bases, strict=True))
    return (low + high) / 2


def _count(names: Mapping[str, Tensor], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)


def _our_name(name: str) -> str:
    for pattern, replacement in _RELEASED_NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def _fill(module: nn.Module | ResNet, state: StateDict, path: str, what: str, *, assign: bool = True) -> None:
    """Give `module` the tensors of `state` (float32), after checking names, shapes and values."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    counters = [name for name in expected if name.endswith("num_batches_tracked")]
    # Older PyTorch did not store the counter, and inference does not use it. ImageNet encoders come with `fc`.
    state = {name: tensor for name, tensor in state.items() if not name.startswith("encoder.fc.")}
    state |= {name: torch.tensor(0) for name in counters if name not in state}

    problems = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [name for name in state if name not in expected],
        "misshapen": [
            f"{name}: {tuple(state[name].shape)} in the file, {shape} in the network"
            for name, shape in expected.items()
            if name in state and tuple(state[name].shape) != shape
        ],
    }
    if any(problems.values()):
        listing = "; ".join(
            f"{len(names)} {kind} ({', '.join(map(printable, names[:3]))}{', …' if len(names) > 3 else ''})"
            for kind, names in problems.items()
            if names
        )
        raise CheckpointError(f"{path}: does not fit {what}: {listing}")
    # Not `isfinite` of all: the largest tensor may be most of the file, and twice as much would be set aside.
    broken = [name for name, tensor in state.items() if not all(end.isfinite() for end in tensor.aminmax())]
    if broken:
        raise CheckpointError(
            f"{path}: NaN or Inf in {len(broken)} of {len(state)} tensors, first in {broken[0]!r}; "
            "the training diverged or the file is damaged"
        )
    for name, tensor in state.items():
        if name.endswith("running_var") and (tensor < 0).any():
            raise CheckpointError(
                f"{path}: {name!r} holds a negative variance ({tensor.min():.3g}); the file is damaged or was changed"
            )
    module.load_state_dict(state, assign=assign)
    if assign:
        module.requires_grad_(True)
