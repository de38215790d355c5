"""Small JSON and YAML files of others: settings, class files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from agln_fast.errors import AglnError, MissingPackageError, printable

__all__ = ["SUFFIXES", "read_document", "read_lines"]

SUFFIXES = (".json", ".yaml", ".yml")
_LARGEST = 4 << 20  # bytes; the names and colours of 10,000 classes need one


def read_document(path: str | os.PathLike[str], error: type[AglnError]) -> Any:
    """What a JSON file, or else YAML, holds: plain types, which may be of any depth and refer to each other.

    Raises:
        error: it cannot be read, is too large, or is neither.
        MissingPackageError: PyYAML is not installed.
    """
    text = _read_text(Path(path), error)
    try:
        if Path(path).suffix.lower() == ".json":
            return json.loads(text)
        try:
            import yaml
        except ImportError:
            raise MissingPackageError("yaml", "eval", "or write it as JSON") from None
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as reason:
            raise error(f"{path}: not YAML ({printable(' '.join(str(reason).split()))})") from None
    except ValueError as reason:
        kind = "JSON" if Path(path).suffix.lower() == ".json" else "YAML"  # also of a date that there is not
        raise error(f"{path}: not {kind} ({printable(reason)})") from None
    except RecursionError:
        raise error(f"{path}: lists too deep in each other") from None


def read_lines(path: str | os.PathLike[str], error: type[AglnError]) -> list[str]:
    """The lines of a text file without the blanks around them, but for empty ones at the end.

    Raises:
        error: it cannot be read, is too large, or no text in UTF-8.
    """
    return [line.strip() for line in _read_text(Path(path), error).rstrip().splitlines()]


def _read_text(path: Path, error: type[AglnError]) -> str:
    try:
        if path.exists() and not path.is_file():
            raise error(f"{path}: not a file")
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise error(f"{path}: larger than {_LARGEST >> 20} MiB, too large for a file of this kind")
        return content.decode("utf-8-sig")  # Windows writes a mark before it
    except OSError as reason:
        raise error(f"{printable(path)}: cannot be read ({reason.strerror})") from None
    except UnicodeDecodeError as reason:
        raise error(f"{path}: no text in UTF-8 ({reason.reason} at byte {reason.start}); save it as UTF-8") from None
