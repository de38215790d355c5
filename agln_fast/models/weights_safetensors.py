"""The tensors in safetensors files: in one, or in shards with an index in JSON that names the file of each tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from agln_fast.errors import CheckpointError, printable

__all__ = ["read_shards", "read_tensors"]

_MOST_HEADER_BYTES = 8 << 20  # of a file, or of an index; 600 tensors need 100 kB
_MOST_SHARDS = 1000
_FORM = '{"weight_map": {tensor: file}}'


def read_tensors(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors by name, and the metadata.

    Raises:
        CheckpointError: truncated, damaged, or another kind of file. The message does not name it.
    """
    header_bytes = int.from_bytes(data[:8], "little")
    if _MOST_HEADER_BYTES < header_bytes < len(data):
        raise CheckpointError(f"its header has {header_bytes >> 20} MiB: no state dict of a network")
    try:
        content = load(data)
    except (SafetensorError, LookupError, ValueError, RuntimeError, AssertionError) as error:
        reason = printable((str(error).strip() or type(error).__name__).splitlines()[0])
        raise CheckpointError(f"truncated, damaged, or not a checkpoint ({reason})") from None
    return content, json.loads(data[8 : 8 + header_bytes]).get("__metadata__") or {}


def read_shards(index: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As `read_tensors`, of all the files in the folder of `index` that it names.

    Raises:
        CheckpointError: it is no index, names files elsewhere, or they hold other tensors than it says. The message
            does not name the index.
        OSError: the index cannot be read.
    """
    content: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    shards: dict[str, set[str]] = {}
    for name, file in _weight_map(index).items():
        shards.setdefault(file, set()).add(name)
    if len(shards) > _MOST_SHARDS:
        raise CheckpointError(f"names {len(shards):,} files: no index of a network")
    for file, names in shards.items():
        if Path(file).name != file or "\\" in file:
            raise CheckpointError(f"names the file '{printable(file)}', which is not one beside it")
        tensors, more = _shard(index.parent / file)
        if tensors.keys() != names:
            name = min(names ^ tensors.keys())
            what = "does not hold" if name in names else "holds"
            raise CheckpointError(
                f"and '{printable(file)}' do not belong together: the latter {what} '{printable(name)}'"
            )
        content |= tensors
        metadata |= more
    return content, metadata


def _weight_map(index: Path) -> dict[str, str]:
    if index.stat().st_size > _MOST_HEADER_BYTES:
        raise CheckpointError(f"an index of more than {_MOST_HEADER_BYTES >> 20} MiB: no state dict of a network")
    try:
        values: Any = json.loads(index.read_bytes())
        files: Any = values["weight_map"]
        if files and all(isinstance(file, str) and file for file in files.values()):
            return dict(files)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        pass
    raise CheckpointError(f"not a checkpoint: JSON is read as the index of shards, which is {_FORM}")


def _shard(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    shown = printable(path.name)
    if not path.is_file():
        raise CheckpointError(f"its shard '{shown}' is missing: fetch it, too, into the same folder")
    try:
        return read_tensors(path.read_bytes())
    except CheckpointError as error:
        raise CheckpointError(f"its shard '{shown}': {error}") from None
    except OSError as error:
        raise CheckpointError(f"its shard '{shown}' cannot be read ({printable(error.strerror)})") from None
