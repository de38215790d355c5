"""Released checkpoints for tests: weights and inputs follow from names and a salt, as `golden/README.md` says."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def _random(salt: str, name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32((salt + name).encode()))


def _value(name: str, shape: Sequence[int], salt: str) -> np.ndarray[Any, Any]:
    random, s = _random(salt, name), tuple(shape)
    if name.endswith("num_batches_tracked"):
        return np.zeros(s, np.int64)
    if name.endswith(("alpha", "beta", "gamma")):
        value = random.uniform(0.3, 0.9, s)
    elif name.endswith("running_var"):
        value = random.uniform(0.5, 1.5, s)
    elif name.endswith(("running_mean", "bias")):
        value = random.normal(0, 0.1, s)
    elif len(s) == 1:
        value = random.uniform(0.1, 0.3, s) if ".bn3." in name else random.uniform(0.5, 1.5, s)
    else:
        value = random.normal(0, np.sqrt(2 / np.prod(s[1:])), s)
    return np.asarray(value, np.float32)


def weights(shapes: Mapping[str, Sequence[int]], salt: str) -> dict[str, Tensor]:
    """A state dict of these names and shapes."""
    return {name: torch.from_numpy(_value(name, shape, salt)) for name, shape in shapes.items()}


def released_shapes(network: str, num_classes: int) -> dict[str, list[int]]:
    """Names and shapes of a released checkpoint, such as "agln_resnet50s"."""
    shapes: dict[str, list[int]] = json.loads((GOLDEN / "state_dict_keys.json").read_text())[network]
    for name in ("head.conv5.4.weight", "head.conv5.4.bias"):
        shapes[name] = [num_classes, *shapes[name][1:]]
    return shapes


def stored_shapes(network: str, *, narrow: bool = False) -> dict[str, list[int]]:
    """Names and shapes of a checkpoint of torchvision or MMSegmentation, such as "mmseg_fcn_r50_19c".

    narrow: at an eighth of the width.
    """
    shapes: dict[str, list[int]] = json.loads((GOLDEN / f"{network}.keys.json").read_text())
    if narrow:  # numbers below 32 are kernels, colours and classes
        shapes = {name: [side // 8 if side >= 32 else side for side in shape] for name, shape in shapes.items()}
    return shapes


def normalised_image(shape: tuple[int, ...], salt: str) -> Tensor:
    """The input that belongs to the salt."""
    return torch.from_numpy(_random(salt, "image").normal(0, 1, shape).astype(np.float32))
