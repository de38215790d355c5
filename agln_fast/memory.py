"""What was measured or compiled on this machine, remembered from one run to the next, in the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

from agln_fast import environment
from agln_fast.errors import ConfigError
from agln_fast.files import replacing
from agln_fast.machine import installed, processor

__all__ = ["place", "recall", "recall_bytes", "remember", "remember_bytes"]

_LARGEST = 2**20  # bytes of JSON: what is larger is none of ours
_LARGEST_BYTES = 2**30


def place(kind: str, facts: dict[str, Any], packages: tuple[str, ...]) -> Path:
    """The file for what depends on `facts`, on this machine's processor and on the versions of `packages`."""
    here = processor()
    facts = {
        **facts,
        "machine": [platform.machine(), here.name, sorted(here.flags), os.cpu_count()],
        "versions": [installed(package) for package in packages],
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return environment.cache_folder() / kind / f"{digest[:32]}.json"


def recall(file: Path) -> Any:
    """What `remember` wrote, or None: a file that cannot be used is as good as none. The caller checks the values."""
    try:
        return json.loads(recall_bytes(file, _LARGEST))
    except (ValueError, RecursionError):
        return None


def recall_bytes(file: Path, largest: int = _LARGEST_BYTES) -> bytes:
    """What `remember_bytes` wrote; nothing where there is no such file, or a larger one."""
    try:
        with file.open("rb") as stream:
            return stream.read() if os.fstat(stream.fileno()).st_size <= largest else b""
    except OSError:
        return b""


def remember(file: Path, values: Any) -> None:
    """Write plain JSON types, whole or not at all; where nothing can be written, nothing is remembered."""
    remember_bytes(file, (json.dumps(values, indent=1) + "\n").encode())


def remember_bytes(file: Path, data: bytes) -> None:
    """Write `data`, as `remember` does."""
    with suppress(OSError, ConfigError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, ConfigError) as part:
            part.write_bytes(data)
