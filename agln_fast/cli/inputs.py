"""Pictures that a command line names, without those that an earlier run wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from agln_fast.cli.console import err
from agln_fast.errors import ImageError

__all__ = ["find_images"]


def find_images(named: Sequence[str], *, recursive: bool) -> tuple[list[Path], dict[str, str]]:
    """The image files that names, folders and patterns stand for, in their order, and why others stand for none.

    Raises:
        ImageError: all of them stand for none.
    """
    from agln_fast.runtime.images import list_images

    found: list[Path] = []
    failed: dict[str, str] = {}
    for pattern in named:
        try:
            found += list_images(pattern, recursive=recursive)
        except ImageError as error:
            failed[pattern] = str(error)
    found = _without_outputs(list(dict.fromkeys(found)), named)
    if not found:
        raise ImageError("; ".join(failed.values()))
    return found, failed


def _without_outputs(found: list[Path], named: Sequence[str]) -> list[Path]:
    """Leave out what an earlier run wrote: a shell's `*.png` names it beside its sources. Alone, it is an input."""
    from agln_fast.runtime.images import is_output

    by_name = set(map(Path, named))
    outputs = {path for path in found if path in by_name and is_output(path)}
    if not outputs or len(outputs) == len(found):
        return found
    err.print(
        f"left out {len(outputs)} pictures that agln-fast wrote; name them alone to segment them", highlight=False
    )
    return [path for path in found if path not in outputs]
