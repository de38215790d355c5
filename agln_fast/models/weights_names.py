"""Which entries of a file are a network's weights, and what they are called without what trainings put around them."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from agln_fast.errors import CheckpointError, printable
from agln_fast.models.weights_pickle import Inert, StoredTensor

__all__ = ["CONTAINERS", "find_weights", "kind_of"]

# In the order in which they are preferred: plain names first, the trained weights before their moving averages.
CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "network",
    "net",
    "state_dict_ema",
    "model_ema",
    "ema",
    "module",
)
_DEEPEST = 4  # containers in containers, e.g. "ema" -> "module"; a damaged file may hold itself
# A ResNet-101 has 600 names, and operation counters triple them.
_MOST_NAMES = 20_000
_LONGEST_NAME = 500
_MOST_PREFIXES = 16
_LOSSES = {"loss", "losses", "criterion", "criterions", "criteria"}
# thop leaves the first two in every layer, PyTorch's `AveragedModel` the last one beside the weights.
_COUNTERS = ("total_ops", "total_params", "n_averaged")

_log = logging.getLogger("agln_fast.checkpoint")


def find_weights(content: object, path: str) -> dict[str, Any]:
    """The state dict in what a file holds: tensors by name (with `Inert` and others where there is no tensor).

    The first container of `CONTAINERS` that holds tensors is opened, and said if several do. First parts that all
    names share are stripped; entries of losses and counters are left out, with a line in the log.

    Raises:
        CheckpointError: no state dict is there, or one with impossible names. The message does not name the file.
    """
    state = _opened(content, path)
    if not isinstance(state, dict) or not state:
        found = "an empty one" if state == {} else kind_of(state)
        raise CheckpointError(f"not a checkpoint: it holds no state dict but {found}")
    if len(state) > _MOST_NAMES:
        raise CheckpointError(f"not a checkpoint: its state dict has {len(state):,} entries, which no network has")
    for name in state:
        if not isinstance(name, str) or len(name) > _LONGEST_NAME:
            shown = f"'{printable(name)}'" if isinstance(name, str) else f"of type {kind_of(name)}"
            raise CheckpointError(f"not a checkpoint: {shown} is no name of a tensor")
    foreign: list[str] = []
    for _ in range(_MOST_PREFIXES + 1):
        kept = {name: value for name, value in state.items() if not _is_foreign(name)}
        foreign += [name for name in state if name not in kept]
        if not kept or len({name.partition(".")[0] for name in kept}) > 1 or not all("." in name for name in kept):
            break
        state = {name.partition(".")[2]: value for name, value in kept.items()}
    if foreign:
        names = ", ".join(printable(name) for name in foreign[:3])
        more = ", …" if len(foreign) > 3 else ""
        _log.warning("%s: %d entries of losses or counters ignored (%s%s)", path, len(foreign), names, more)
    if not kept:
        raise CheckpointError("not a checkpoint: it holds no state dict but losses and counters")
    return kept


def kind_of(value: object) -> str:
    """What `value` is, for a message."""
    if isinstance(value, StoredTensor):
        return "tensor"
    return value.what if isinstance(value, Inert) else type(value).__name__


def _opened(content: object, path: str) -> object:
    for _ in range(_DEEPEST):
        if not isinstance(content, dict):
            break
        inside = [name for name in CONTAINERS if isinstance(content.get(name), dict)]
        fitting = [name for name in inside if _has_tensors(content[name])]
        if len(fitting) > 1:
            _log.warning(
                "%s: holds weights under %s; those of '%s' are taken: save the others by themselves to use them",
                path,
                " and ".join(f"'{name}'" for name in fitting),
                fitting[0],
            )
        chosen = fitting or ([] if _has_tensors(content) else inside)
        if not chosen:
            break
        content = content[chosen[0]]
    return content


def _has_tensors(content: dict[Any, Any]) -> bool:
    """Whether tensors are in `content`, or in a container in it."""
    inner = [content[name] for name in CONTAINERS if isinstance(content.get(name), dict)]
    return any(_is_tensor(value) for values in (content, *inner) for value in values.values())


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor | StoredTensor) or (isinstance(value, Inert) and value.tensor)


def _is_foreign(name: str) -> bool:
    first, dot, _ = name.partition(".")
    of_loss = dot == "." and not _LOSSES.isdisjoint(first.split("_"))
    return of_loss or name.rpartition(".")[2] in _COUNTERS
