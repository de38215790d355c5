"""Every error that agln-fast raises on purpose, and the exit code that the command line gives it.

    AglnError                     1
    ├── ConfigError               2   an option, a name or a value that makes no sense (also a ValueError)
    ├── CheckpointError           3   a weights file that cannot be used
    ├── ImageError                4   an input image that cannot be used
    ├── BundleError               5   a bundle that is damaged, foreign or of another version
    │   └── BundleChangedError    5   ... because its files are not those any more that were opened
    ├── BackendError              6   an engine that cannot run on this machine
    │   └── MissingPackageError   6   ... because a package is not installed
    ├── BuildError                7   an export or an engine build that failed
    │   └── VerificationError     8   an engine that does not agree with the reference network
    ├── DatasetError              9   a dataset's folder that is missing, incomplete or damaged
    └── TrainingError            10   a training that diverged, or whose state cannot be saved

Each message is one line that says what was wrong, where, and what to do next; where folders of a dataset are missing,
the tree that they belong to follows.
"""

import difflib
from collections.abc import Iterable
from typing import TypeVar

__all__ = [
    "AglnError",
    "BackendError",
    "BuildError",
    "BundleChangedError",
    "BundleError",
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "ImageError",
    "MissingPackageError",
    "TrainingError",
    "VerificationError",
    "choose",
    "did_you_mean",
    "missing_half",
    "printable",
]

T = TypeVar("T")

_OF_BUILDING = "torch", "triton", "onnx", "onnx_ir", "onnxscript", "safetensors"


class AglnError(Exception):
    """Base of all errors of agln-fast."""

    exit_code = 1


class ConfigError(AglnError, ValueError):
    """An option, a name or a value that makes no sense."""

    exit_code = 2


class CheckpointError(AglnError):
    """A weights file that is missing, damaged, hostile, or does not fit the network."""

    exit_code = 3


class ImageError(AglnError):
    """An input image that is missing, damaged, empty, animated or too large."""

    exit_code = 4


class BundleError(AglnError):
    """A bundle that is missing, damaged, foreign, or of another schema version."""

    exit_code = 5


class BundleChangedError(BundleError):
    """A bundle whose files were changed, replaced or removed after it was opened; opening it again may help."""


class BackendError(AglnError):
    """An engine that cannot run on this machine, or not as it was asked to."""

    exit_code = 6


class MissingPackageError(BackendError):
    """An optional package that is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, hint: str = "") -> None:
        """`package` is the import name, `extra` the extra of agln-fast that installs it."""
        super().__init__(
            f'package "{package}" is not installed: pip install "agln-fast[{extra}]"{hint and f" ({hint})"}'
        )


def missing_half(error: ModuleNotFoundError) -> MissingPackageError | None:
    """What to raise where an import fails because agln-fast is installed without building; None for other imports."""
    package = (error.name or "").partition(".")[0]
    return MissingPackageError(package, "build") if package in _OF_BUILDING else None


class BuildError(AglnError):
    """An export or an engine build that failed."""

    exit_code = 7


class VerificationError(BuildError):
    """An engine whose output does not agree with the reference network."""

    exit_code = 8


class DatasetError(AglnError):
    """A dataset's folder that is missing, incomplete or damaged."""

    exit_code = 9


class TrainingError(AglnError):
    """A training that diverged, or whose state cannot be saved."""

    exit_code = 10


def choose(
    what: str,
    value: object,
    known: Iterable[T],
    *,
    where: str = "",
    listed: str = "",
    error: type[AglnError] = ConfigError,
) -> T:
    """`value`, which is one of `known`.

    Args:
        what: what it names, e.g. "backend".
        where: what the message begins with, e.g. the file in which it stands.
        listed: where the known ones are listed, if they are too many for a message.

    Raises:
        error: it is none of them; the message has those that may be meant, and all that are known.
    """
    known = list(known)
    for one in known:
        if one == value:
            return one
    names = [str(one) for one in known]
    hint = did_you_mean(str(value), names) or ";"
    place = where and f"{where}: "
    raise error(f"{place}unknown {what} {printable(repr(value))}{hint} known: {listed or ', '.join(names)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x', 'y'?"` for the known names closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, close))}?" if close else ""


def printable(text: object, longest: int = 200) -> str:
    """Text of others as it can be shown in one line: what cannot be printed, such as an escape sequence, is escaped.

    It is cut after `longest` characters.
    """
    shown = str(text)
    cut, more = shown[:longest], "…" if len(shown) > longest else ""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in cut) + more
