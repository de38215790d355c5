"""Variables that nobody means, and users without a home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from agln_fast import environment
from agln_fast.errors import ConfigError
from agln_fast.tensorrt_library import load_layers


@pytest.mark.parametrize("name", ["AGLN_FAST_THREADS", "AGLN_FAST_MAX_PIXELS", "AGLN_FAST_TUNE_SECONDS"])
@pytest.mark.parametrize("text", ["9" * 5000, "x" * 5000, "0" * 5000, "-1", "1.5", "", "٣" * 30])
def test_numbers_are_refused_in_a_short_line(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python itself raises ValueError for more than 4300 digits."""
    monkeypatch.setenv(name, text)
    read = {"THREADS": environment.default_threads, "MAX_PIXELS": environment.max_pixels}
    with pytest.raises(
        ConfigError, match=rf"^environment variable {name}='.*': must be a (positive )?whole number"
    ) as refused:
        read.get(name.removeprefix("AGLN_FAST_"), environment.tuning_seconds)()
    assert len(str(refused.value)) < 160


def test_telemetry_is_allowed_by_one_word_only(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for text in ("0", "1"):
        monkeypatch.setenv("AGLN_FAST_ALLOW_TELEMETRY", text)
        answers.append(environment.allow_telemetry())
    monkeypatch.delenv("AGLN_FAST_ALLOW_TELEMETRY")
    assert [*answers, environment.allow_telemetry()] == [False, True, False]
    monkeypatch.setenv("AGLN_FAST_ALLOW_TELEMETRY", "yes")
    with pytest.raises(ConfigError, match="AGLN_FAST_ALLOW_TELEMETRY='yes': must be 0 or 1"):
        environment.allow_telemetry()


def test_without_a_home_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("AGLN_FAST_CACHE")
    monkeypatch.setattr(Path, "home", no_home)
    assert environment.cache_folder() == Path(os.devnull)


_CACHES = """
import os
from agln_fast import environment
environment.keep_caches_together()
for name in ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
    print(os.environ[name], os.path.isdir(os.path.dirname(os.environ[name])))
"""


def caches(**variables: str) -> list[str]:
    hidden = ("MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    command = [sys.executable, "-c", _CACHES]
    done = subprocess.run(command, env=kept | variables, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout.splitlines()


def test_libraries_keep_their_caches_in_ours(tmp_path: Path) -> None:
    """Not made before a library needs it, and never against what the user has said."""
    folder = tmp_path / "new" / "cache"
    told = caches(AGLN_FAST_CACHE=str(folder), TRITON_CACHE_DIR="/elsewhere/triton")
    assert told == [f"{folder}/matplotlib False", f"{folder}/torchinductor False", "/elsewhere/triton False"]


def test_without_a_folder_caches_go_with_the_process(tmp_path: Path) -> None:
    told = caches(AGLN_FAST_CACHE=os.devnull, TMPDIR=str(tmp_path))
    assert [line.startswith(f"{tmp_path}/agln-fast.") and line.endswith(" True") for line in told] == [True] * 3
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_even_be_looked_at_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its name is too long, or the user must not enter the one before it, which root always may."""
    assert environment.obstacle_to_writing(tmp_path / "new" / "folder") is None
    assert (environment.obstacle_to_writing(tmp_path / ("1" * 5000)) or "").startswith("File name too long: ")

    def forbidden(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", forbidden)
    assert environment.obstacle_to_writing(tmp_path) == f"Permission denied: {tmp_path}"


def test_without_any_folder_libraries_keep_to_their_own_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.delenv("MPLCONFIGDIR", raising=False)
    monkeypatch.setattr("tempfile.mkdtemp", full)
    environment.keep_caches_together()
    assert "MPLCONFIGDIR" not in os.environ


def test_who_has_no_home_gets_one_that_goes_with_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_homeless", lambda: True)
    monkeypatch.setenv("AGLN_FAST_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", "before")
    for name in environment._CACHES:
        monkeypatch.setenv(name, "theirs")
    environment.keep_caches_together()
    assert os.environ["HOME"] == str(tmp_path)


def test_who_asks_for_layers_is_not_given_them_before(monkeypatch):
    """The library of our layers reads the variable when it is loaded, for programs that never ask."""
    seen = []

    class Registry:
        def get_creator(self, *layer):
            return seen or None

        def load_library(self, name):
            seen.append(os.environ.get("AGLN_FAST_REGISTER_LAYERS"))

    monkeypatch.setenv("AGLN_FAST_REGISTER_LAYERS", "1")
    load_layers(SimpleNamespace(get_plugin_registry=Registry), b"")
    assert seen == [None]
