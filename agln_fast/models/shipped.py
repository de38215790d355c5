"""Which file a checkpoint's name or path means; the trained ones that ship have names. It loads without PyTorch."""

from __future__ import annotations

import os
from pathlib import Path

from agln_fast.errors import CheckpointError, did_you_mean

__all__ = ["CONFIG_FILE", "WEIGHTS_FILE", "find_checkpoint", "list_checkpoints"]

CONFIG_FILE, WEIGHTS_FILE = "config.yaml", "weights.safetensors"
"""What they are called in the folder of a training; weights also in a bundle."""

_SHIPPED = Path(__file__).parents[1] / "checkpoints"


def list_checkpoints() -> list[str]:
    """Names of the trained networks that ship with the package."""
    return sorted(file.stem for file in _SHIPPED.glob("*.safetensors"))


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """The file that `path` means: the weights in the folder of a training, a shipped checkpoint, or itself.

    Raises:
        CheckpointError: no file is there, or none that can be read; the shipped checkpoint that may be meant is named.
    """
    found = Path(path)
    try:
        if (found / CONFIG_FILE).is_file() and (found / WEIGHTS_FILE).is_file():
            return found / WEIGHTS_FILE
        there = found.exists()
    except OSError as error:  # e.g. its folder must not be looked into
        raise CheckpointError(f"{path}: cannot be found ({error.strerror})") from None
    if not there:
        if str(path) in list_checkpoints():
            return _SHIPPED / f"{path}.safetensors"
        raise CheckpointError(f"{path}: no such file{did_you_mean(str(path), list_checkpoints())}")
    if found.is_dir():
        raise CheckpointError(f"{path}: not a file; a folder is taken if it is that of a training")
    if not os.access(found, os.R_OK):
        raise CheckpointError(f"{path}: cannot be read; check its permissions")
    return found
