"""Every environment variable that agln-fast reads or sets, and nothing else does (docs/environment.md lists them)."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from agln_fast.errors import ConfigError, printable

__all__ = [
    "allow_telemetry",
    "cache_folder",
    "default_threads",
    "forbid_reports",
    "keep_caches_together",
    "keep_ray_in_bounds",
    "let_layers_be_asked_for",
    "max_pixels",
    "obstacle_to_writing",
    "tensorrt_headers",
    "tuning_seconds",
]

_CACHES = {"MPLCONFIGDIR": "matplotlib", "TORCHINDUCTOR_CACHE_DIR": "torchinductor", "TRITON_CACHE_DIR": "triton"}
_LONGEST_SHOWN = 40
_MOST_DIGITS = 18  # below what Python converts, and more than anything here can be


def default_threads() -> int | None:
    """`AGLN_FAST_THREADS`: CPU threads of an engine when none are asked for; unset for the library's own choice.

    Raises:
        ConfigError: not a positive whole number.
    """
    return _whole("AGLN_FAST_THREADS")


def max_pixels() -> int:
    """`AGLN_FAST_MAX_PIXELS`: largest image, width x height, that is decoded; 89,478,485 unless set.

    The default, 256 MiB as 24-bit RGB, is where Pillow, too, suspects a decompression bomb.

    Raises:
        ConfigError: not a positive whole number.
    """
    return _whole("AGLN_FAST_MAX_PIXELS") or 89_478_485


def tuning_seconds() -> float | None:
    """`AGLN_FAST_TUNE_SECONDS`: wall clock to choose an engine's plan in, 0 to time nothing; None for a short race.

    Raises:
        ConfigError: not a whole number.
    """
    return _whole("AGLN_FAST_TUNE_SECONDS", least=0)


def cache_folder() -> Path:
    """`AGLN_FAST_CACHE`: where measurements are remembered; ~/.cache/agln-fast unless set.

    For a user without a home folder it is `os.devnull`, below which nothing can be written or read.
    """
    given = os.environ.get("AGLN_FAST_CACHE")
    if given:
        return Path(given)
    return Path(os.devnull) if _homeless() else Path.home() / ".cache" / "agln-fast"


def tensorrt_headers() -> Path | None:
    """`AGLN_FAST_TENSORRT_INCLUDE`: the folder of NvInfer.h, to compile our layers with; unset to look for it."""
    given = os.environ.get("AGLN_FAST_TENSORRT_INCLUDE")
    return Path(given) if given else None


def allow_telemetry() -> bool:
    """`AGLN_FAST_ALLOW_TELEMETRY`: 1 lets libraries report on their use; unset or 0, they do not.

    Raises:
        ConfigError: something else.
    """
    text = os.environ.get("AGLN_FAST_ALLOW_TELEMETRY", "0")
    if text not in ("0", "1"):
        raise ConfigError(f"environment variable AGLN_FAST_ALLOW_TELEMETRY={_shown(text)}: must be 0 or 1")
    return text == "1"


def let_layers_be_asked_for() -> None:
    """Unset `AGLN_FAST_REGISTER_LAYERS`, which the library of our layers reads when it is loaded: to who asks it for
    them it must not have given them already."""
    os.environ.pop("AGLN_FAST_REGISTER_LAYERS", None)


def forbid_reports() -> None:
    """Set the variables by which libraries are told not to report on their use, unless the user has set them."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def keep_ray_in_bounds(*, alone: bool) -> None:
    """Set the variables of Ray, before it is imported, that nothing else can: unless the user has set them.

    It reports on nothing (`AGLN_FAST_ALLOW_TELEMETRY`), prints no log of its own, and leaves the GPUs visible to what
    asks for none. alone: a Ray of this process' own. It listens on the loopback interface, since whoever reaches its
    ports can run code.
    """
    if not allow_telemetry():
        forbid_reports()
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if alone:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # the name is Ray's


def keep_caches_together() -> None:
    """Let libraries keep their caches below `cache_folder`, unless the user has said where.

    For a process that is ours alone. Where that folder cannot be written, they get one that goes with the process.
    It is the home, too, of a user who has none: NNCF cannot be imported without.
    """
    folder = cache_folder()
    if obstacle_to_writing(folder):
        try:
            folder = Path(tempfile.mkdtemp(prefix="agln-fast."))
        except OSError:
            return
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name, library in _CACHES.items():
        os.environ.setdefault(name, str(folder / library))
    if _homeless():
        os.environ["HOME"] = str(folder)


def obstacle_to_writing(folder: Path) -> str | None:
    """Why nothing can be written into `folder`, which need not be there yet, e.g. "Not a directory: /x", or None."""
    try:
        there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
        if not there.is_dir():
            return f"Not a directory: {there}"
    except OSError as error:  # a name that is too long, a folder that must not be entered
        return f"{error.strerror}: {printable(error.filename or folder)}"
    return None if os.access(there, os.W_OK | os.X_OK) else f"Permission denied: {there}"


def _homeless() -> bool:
    """Neither HOME is set, nor is the user a known one."""
    try:
        Path.home()
    except RuntimeError:
        return True
    return False


def _whole(name: str, *, least: int = 1) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal() or len(text) > _MOST_DIGITS or int(text) < least:
        kind = "a positive whole number" if least else "a whole number, 0 or more"
        raise ConfigError(f"environment variable {name}={_shown(text)}: must be {kind}")
    return int(text)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…")
