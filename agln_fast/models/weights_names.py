"""Which entries of a file are a network's weights, and what they are called without what trainings put around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from agln_fast.errors import CheckpointError, did_you_mean, printable
from agln_fast.models.weights_account import Account, several
from agln_fast.models.weights_pickle import Inert, StoredTensor

__all__ = ["CONTAINERS", "Found", "find_weights", "kind_of"]

# In the order in which they are preferred: plain names first, the trained weights before their moving averages.
CONTAINERS = (
    "state_dict",
    "model_state_dict",
    "model",
    "network",
    "net",
    "weights",
    "state_dict_ema",
    "ema_state_dict",
    "model_ema_state_dict",
    "model_ema",
    "ema",
    "module",
)
_DEEPEST = 4  # containers in containers, e.g. "ema" -> "module"; a damaged file may hold itself
# A ResNet-101 has 600 names, and operation counters triple them.
_MOST_NAMES = 20_000
_LONGEST_NAME = 500
_MOST_PREFIXES = 16
_AVERAGE = "ema"
_LOSSES = {"loss", "losses", "criterion", "criterions", "criteria"}
_OPTIMIZERS = {"optim", "optimizer", "optimizers"}
# thop leaves the first two in every layer, PyTorch's `AveragedModel` the last one beside the weights.
_COUNTERS = ("total_ops", "total_params", "n_averaged")
# Compilation, several devices and recomputation wrap a network, or any part of it.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


class Found(NamedTuple):
    """Tensors by name (with `Inert` and others where there is no tensor), and how they were found."""

    state: dict[str, Any]
    account: Account


def find_weights(content: object, wanted: str | None = None) -> Found:
    """The state dict in what a file holds.

    The first container of `CONTAINERS` that holds tensors is opened, or the one that is `wanted`. First parts that all
    names share and wrappers are stripped; entries of losses and counters are left out.

    Args:
        wanted: the name of a container, whether one of `CONTAINERS` or not, or the first part of names; "ema" means
            "model_ema", too, and the like.

    Raises:
        CheckpointError: no state dict is there, none that is wanted, several of which none is preferred, or one with
            impossible names. The message does not name the file.
    """
    account = Account()
    state = _opened(content, wanted, account)
    if not isinstance(state, dict) or not state:
        found = "an empty one" if state == {} else kind_of(state)
        raise CheckpointError(f"not a checkpoint: it holds no state dict but {found}")
    if len(state) > _MOST_NAMES:
        raise CheckpointError(f"not a checkpoint: its state dict has {len(state):,} entries, which no network has")
    for name in state:
        if not isinstance(name, str) or len(name) > _LONGEST_NAME:
            shown = f"'{printable(name)}'" if isinstance(name, str) else f"of type {kind_of(name)}"
            raise CheckpointError(f"not a checkpoint: {shown} is no name of a tensor")
    if not any(_is_tensor(value) for value in state.values()):
        found = ", ".join(f"'{printable(name)}' ({kind_of(value)})" for name, value in [*state.items()][:5])
        more = ", …" if len(state) > 5 else ""
        raise CheckpointError(
            f"not a checkpoint: it holds no tensors but {found}{more}; weights may be under {', '.join(CONTAINERS)}"
        )
    kept = _stripped(_unwrapped(state, account), wanted, account)
    if not kept:
        raise CheckpointError("not a checkpoint: it holds no state dict but losses and counters")
    if wanted is not None and not account.asked:
        places = [".".join(account.place), *account.others] if account.place else []
        held = f"it has them under {several(places)}" if places else "it is one state dict"
        raise CheckpointError(f"holds no weights under '{printable(wanted)}': {held}{did_you_mean(wanted, places)}")
    return Found(kept, account)


def kind_of(value: object) -> str:
    """What `value` is, for a message."""
    if isinstance(value, StoredTensor):
        return "tensor"
    return value.what if isinstance(value, Inert) else type(value).__name__


def _opened(content: object, wanted: str | None, account: Account) -> object:
    for _ in range(_DEEPEST):
        if not isinstance(content, dict):
            break
        named = [name for name in CONTAINERS if isinstance(content.get(name), dict)]
        known = {id(content): False}
        fitting = [name for name in named if _has_tensors(content[name], known)]
        # Names that nobody knows count where no known one holds anything, e.g. "student".
        guesses = [] if fitting or _is_state(content) else _guesses(content)
        asked = None if account.asked else _asked(wanted, content, account.place)
        if asked is not None:
            chosen, account.asked = asked, True
            others = [name for name in (*fitting, *guesses) if name != asked]
        elif len(guesses) > 1:
            raise CheckpointError(
                f"holds weights under {several(guesses)}: say which with --weights NAME, or weights=NAME"
            )
        elif fitting or guesses:
            chosen, *others = fitting or guesses
            account.guessed = account.guessed or bool(guesses)
        elif named and not any(_is_tensor(value) for value in content.values()):
            chosen, others = named[0], []
        else:
            break
        account.others += [".".join([*account.place, name]) for name in others]
        account.unused += [name for name in content if isinstance(name, str) and name not in (chosen, *others)]
        account.place.append(chosen)
        content = content[chosen]
    return content


def _asked(wanted: str | None, content: dict[Any, Any], place: list[str]) -> str | None:
    """The name in `content` that is `wanted`: itself, its whole path, or that of a moving average."""
    if wanted is None:
        return None
    names = [name for name, value in content.items() if isinstance(name, str) and isinstance(value, dict)]
    for name in names:
        if wanted in (name, ".".join([*place, name])):
            return name
    return _average(wanted, names)


def _average(wanted: str, names: Iterable[str]) -> str | None:
    """The only one of `names` that is a moving average, if that is what is `wanted`."""
    averages = [name for name in names if wanted == _AVERAGE and _AVERAGE in name.split("_")]
    if len(averages) > 1:
        raise CheckpointError(f"holds several moving averages, {several(averages)}: name one of them")
    return averages[0] if averages else None


def _has_tensors(content: dict[Any, Any], known: dict[int, bool], depth: int = _DEEPEST) -> bool:
    """Whether tensors are in `content`, or in a container in it; `known` is filled with the answers by identity."""
    if id(content) not in known:  # one may be named again and again at no cost, or hold itself
        known[id(content)] = False
        inner = [content[name] for name in CONTAINERS if isinstance(content.get(name), dict)]
        known[id(content)] = any(_is_tensor(value) for value in content.values()) or (
            depth > 1 and any(_has_tensors(values, known, depth - 1) for values in inner)
        )
    return known[id(content)]


def _guesses(content: dict[Any, Any]) -> list[str]:
    """The names in `content` of what looks like the state dict of a network, or holds one in a container."""
    known: dict[int, bool] = {}

    def is_state(values: object) -> bool:
        if isinstance(values, dict) and id(values) not in known:
            known[id(values)] = _is_state(values)
        return known.get(id(values), False)

    guesses = []
    for name, values in content.items():
        if isinstance(name, str) and isinstance(values, dict) and (_LOSSES | _OPTIMIZERS).isdisjoint(name.split("_")):
            inner = (values.get(container) for container in CONTAINERS)
            guesses += [name] if is_state(values) or any(map(is_state, inner)) else []
    return guesses


def _is_state(content: dict[Any, Any]) -> bool:
    """Whether tensors have names of parts."""
    return any(isinstance(name, str) and "." in name and _is_tensor(value) for name, value in content.items())


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor | StoredTensor) or (isinstance(value, Inert) and value.tensor)


def _unwrapped(state: dict[str, Any], account: Account) -> dict[str, Any]:
    """`state` with names from which the wrappers are gone, wherever they stood."""
    unwrapped: dict[str, Any] = {}
    for name, value in state.items():
        *parts, last = name.split(".")
        bare = ".".join([*(part for part in parts if part not in _WRAPPERS), last])
        if bare in unwrapped:
            raise CheckpointError(f"several of its entries are '{printable(bare)}' without wrappers such as 'module.'")
        if bare != name:
            account.stripped += [part for part in parts if part in _WRAPPERS and part not in account.stripped]
        unwrapped[bare] = value
    return unwrapped


def _stripped(state: dict[str, Any], wanted: str | None, account: Account) -> dict[str, Any]:
    """`state` without the first parts that are no part of a network, and without what belongs to losses."""
    kept = state
    for _ in range(_MOST_PREFIXES + 1):
        kept = {name: value for name, value in state.items() if not _is_foreign(name)}
        account.ignored += [name for name in state if name not in kept]
        firsts = dict.fromkeys(name.partition(".")[0] for name in kept)
        whole = len(firsts) == 1 and all("." in name for name in kept)
        first = next(iter(firsts)) if whole else _group(kept, wanted, account)
        if first is None:
            break
        if whole:
            account.stripped.append(first)
            account.asked = account.asked or first == wanted
        state = {name.removeprefix(f"{first}."): value for name, value in kept.items() if name.startswith(f"{first}.")}
    return kept


def _group(state: dict[str, Any], wanted: str | None, account: Account) -> str | None:
    """The first part of the names of a network, where others stand beside them; None if all are parts of one."""
    inner = Counter(name.partition(".")[0] for name in state if "." in name)
    asked = None
    if wanted is not None and not account.asked:
        asked = wanted if wanted in inner else _average(wanted, inner)
        account.asked = asked is not None
    known = [name for name in CONTAINERS if name in inner]
    chosen = asked or (known[0] if known else None)
    if chosen is not None:
        account.others += [".".join([*account.place, name]) for name in known if name != chosen]
        firsts = (name.partition(".")[0] for name in state)
        account.strangers.update(first for first in firsts if first != chosen and first not in known)
        account.place.append(chosen)
    return chosen


def _is_foreign(name: str) -> bool:
    first, dot, _ = name.partition(".")
    of_loss = dot == "." and not _LOSSES.isdisjoint(first.split("_"))
    return of_loss or name.rpartition(".")[2] in _COUNTERS
