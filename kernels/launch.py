"""Launch configurations: read from each op's `configs.json`, chosen by dtype and compute capability.

A configuration gives upper limits: a tile is never larger than the dimension it covers, rounded up to a power of two.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib import resources

import torch
from torch import Tensor

__all__ = ["LaunchConfig", "block", "choose", "load_configs", "pixel_block", "regular", "split"]

_WIDEST = 256
_SMALL_TILE = 64  # of pixels: with fewer of them, what is read for each tile counts more than one more program
_SMALLEST_TILE = 16  # what a tensor-core instruction takes, in every dimension


@dataclass(frozen=True)
class LaunchConfig:
    """One row of a `configs.json`.

    dtypes: those of the activations, e.g. ("float16", "bfloat16").
    tile: largest tile by the letter of its dimension, e.g. {"P": 64, "C": 256}.
    num_warps, num_stages: Triton's; stages are those of the software pipeline.
    capabilities: e.g. ("sm80", "sm90"); none for all that no row before names.
    regular: only for what `regular` says is so.
    waves: programs for each multiprocessor, where an op may choose how finely it splits its work.
    steps: the least tiles of pixels for each program then: what it writes is merged later, at a cost of its own.
    processors: multiprocessors of the device; `choose` fills it in.
    """

    dtypes: tuple[str, ...]
    tile: dict[str, int] = field(hash=False)
    num_warps: int
    num_stages: int
    capabilities: tuple[str, ...] = ()
    regular: bool = False
    waves: int = 1
    steps: int = 1
    processors: int = 132


def load_configs(package: str, op: str) -> tuple[LaunchConfig, ...]:
    """The rows of `op` in the `configs.json` of `package`, in their order: the first that fits is taken."""
    rows = json.loads(resources.files(package).joinpath("configs.json").read_text())[op]
    return tuple(
        LaunchConfig(
            **{**row, "dtypes": tuple(row["dtypes"]), "capabilities": tuple(row.get("capabilities", ()))},
        )
        for row in rows
    )


def regular(*tensors: Tensor | None) -> bool:
    """Each stride is 1 or a multiple of 16, and no map or matrix has more than 256 channels.

    Loads are 16 bytes wide then, and tiles hold all channels. Otherwise Triton needs many more registers for the same
    tile, and takes a smaller one.
    """
    return all(
        max(x.shape[1:2], default=0) <= _WIDEST and all(stride == 1 or stride % 16 == 0 for stride in x.stride())
        for x in tensors
        if x is not None
    )


def choose(
    configs: tuple[LaunchConfig, ...],
    x: Tensor,
    is_regular: bool,
    capability: str | None = None,
    processors: int | None = None,
) -> LaunchConfig:
    """The first configuration for the dtype and the device of `x`.

    Args:
        is_regular: what `regular` says of the op's arguments.
        capability, processors: e.g. "sm90" and 132; None for those of the CUDA device that `x` is on.

    Raises:
        TypeError: no configuration for this dtype.
    """
    if capability is None or processors is None:
        capability, processors = _device(x.device)
    name = str(x.dtype).removeprefix("torch.")
    for config in configs:
        fits = name in config.dtypes and (not config.capabilities or capability in config.capabilities)
        if fits and is_regular >= config.regular:
            return replace(config, processors=processors)
    raise TypeError(f"no kernel for {x.dtype}: needs float16, bfloat16 or float32")


@lru_cache
def _device(device: torch.device) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(device)
    return f"sm{properties.major}{properties.minor}", properties.multi_processor_count


def block(size: int, limit: int) -> int:
    """Side of a tile over a dimension of `size`: a power of two from 16 to `limit`."""
    return max(_SMALLEST_TILE, min(limit, 1 << (size - 1).bit_length()))


def pixel_block(count: int, programs: int, config: LaunchConfig) -> int:
    """Tile P over `count` pixels, each of `programs` programs; smaller where multiprocessors would be idle, and down to
    64 where each would have fewer programs than `waves`."""
    share = -(-count * programs // config.processors)
    return block(min(count, max(share // config.waves, min(share, _SMALL_TILE))), config.tile["P"])


def split(count: int, step: int, programs: int, config: LaunchConfig) -> tuple[int, int]:
    """Divide `count` pixels among programs so that `programs` of them for each part fill the device.

    Returns:
        Parts, and pixels for each, a multiple of `step`; no part is empty.
    """
    wanted = max(1, config.waves * config.processors // programs)
    most = max(1, count // (config.steps * step))
    size = -(-count // (min(wanted, most) * step)) * step
    return -(-count // size), size
