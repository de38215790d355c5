"""What was measured on this machine, remembered from one run to the next: JSON files in the cache folder."""

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

__all__ = ["place", "recall", "remember"]

_LARGEST = 2**20  # bytes: what is larger is none of ours


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
        with file.open("rb") as stream:
            text = stream.read(_LARGEST + 1)
        return None if len(text) > _LARGEST else json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None


def remember(file: Path, values: Any) -> None:
    """Write plain JSON types, whole or not at all; where nothing can be written, nothing is remembered."""
    with suppress(OSError, ConfigError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file, ConfigError) as part:
            part.write_text(json.dumps(values, indent=1) + "\n")
