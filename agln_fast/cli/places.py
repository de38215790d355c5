"""Where a verb will write: refused before the work, not after it."""

from __future__ import annotations

from pathlib import Path

from agln_fast.environment import obstacle_to_writing
from agln_fast.errors import AglnError, ConfigError, ImageError, MissingPackageError, printable

__all__ = ["check_figure", "check_file", "check_folder"]


def check_folder(path: Path, error: type[AglnError]) -> None:
    """Refuse a folder that can neither be written nor made; nothing is made here.

    Raises:
        error: with the reason.
    """
    if obstacle := obstacle_to_writing(path):
        raise error(f"{printable(path)}: cannot be written ({obstacle}); choose another folder")


def check_file(path: Path | None, error: type[AglnError] = ConfigError) -> None:
    """Refuse a file that could not be written; None is no file.

    Raises:
        error: with the reason.
    """
    if path is None:
        return
    check_folder(path.parent, error)
    try:
        if path.is_dir():
            raise error(f"{path}: is a folder; name a file in it")
    except OSError as reason:
        raise error(f"{printable(path)}: cannot be written ({reason.strerror}); choose another name") from None
    if not path.parent.is_dir():
        raise error(f"{path}: there is no folder {path.parent}; create it")


def check_figure(path: Path | None) -> None:
    """Refuse a figure that could not be drawn or written; None is no figure.

    Raises:
        ImageError: another suffix than those of figures, or a place that cannot be written.
        MissingPackageError: matplotlib is not installed.
    """
    from importlib.util import find_spec

    from agln_fast.figures.saving import FORMATS

    if path is None:
        return
    if path.suffix.lower() not in FORMATS:
        raise ImageError(f"{path}: suffix {path.suffix!r} is none for figures: use {', '.join(FORMATS)}")
    check_file(path, ImageError)
    if find_spec("matplotlib") is None:
        raise MissingPackageError("matplotlib", "eval")
