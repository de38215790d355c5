"""Standard streams as shells hand them over, each in a process of its own."""

from __future__ import annotations

import io
import os
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from agln_fast.cli.streams import Stream

_COMMAND = [sys.executable, "-c", "from agln_fast.cli import main; main()"]
_TABLE = ("inspect", "agln_resnet18")
_FULL = Path("/dev/full")

needs_full = pytest.mark.skipif(not _FULL.exists(), reason="needs /dev/full")


def run(*arguments: str, redirect: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run in a shell with its `redirect`."""
    shell = ["bash", "-o", "pipefail", "-c", f'"$@" {redirect}', "bash", *_COMMAND, *arguments]
    done = subprocess.run(shell, env=os.environ | environment, capture_output=True, timeout=120, check=False)
    return subprocess.CompletedProcess(
        shell, done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode()
    )


@needs_full
@pytest.mark.parametrize("arguments", [("--version",), ("--help",), _TABLE], ids=" ".join)
def test_a_full_disk_is_one_line(arguments: tuple[str, ...]) -> None:
    done = run(*arguments, redirect=">/dev/full")
    expected = "error: standard output cannot be written (No space left on device); all else was done"
    assert (done.returncode, done.stderr.splitlines()) == (1, [expected])


@needs_full
def test_a_full_disk_does_not_hide_another_error() -> None:
    done = run("inspect", "agln_resnet5", redirect=">/dev/full")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")


@needs_full
@pytest.mark.parametrize(
    ("arguments", "code"), [(("--version",), 0), (("inspect", "agln_resnet5"), 2)], ids=["fine", "error"]
)
def test_errors_that_cannot_be_told_keep_their_code(arguments: tuple[str, ...], code: int) -> None:
    assert run(*arguments, redirect="2>/dev/full").returncode == code


@pytest.mark.parametrize("arguments", [("--help",), (*_TABLE, "--json")], ids=" ".join)
def test_a_reader_that_has_gone_is_no_message(arguments: tuple[str, ...]) -> None:
    """128 plus the number of SIGPIPE, as with the tools that die from it."""
    done = run(*arguments, redirect="| { exec <&-; wait; }")
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


@pytest.mark.parametrize("redirect", [">&-", ">&- 2>&- <&-"])
def test_closed_streams(redirect: str, tmp_path: Path) -> None:
    """A file that is opened while a descriptor is free gets its number, and what is printed would end in it."""
    done = run("scenes", "--write", str(tmp_path), "-n", "1", "--size", "32x32", redirect=redirect)
    assert (done.returncode, done.stderr) == (0, "")
    (image,) = (tmp_path / "images").iterdir()
    assert image.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"TERM": "dumb"},
    ],
    ids=["ascii", "latin-1", "locale-C", "dumb"],
)
def test_encodings_without_our_characters(environment: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "Straße σ×→"
    told = run("scenes", "--write", str(folder), "-n", "1", "--size", "32x32", **environment)
    assert (told.returncode, told.stderr, folder.is_dir()) == (0, "", True)
    assert ": 1 images in images/" in told.stdout


def test_a_pipe_gets_all_of_it() -> None:
    done = run("scenes", "--help", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.rstrip().endswith("╯")


def test_a_cache_that_cannot_be_looked_at_is_none() -> None:
    done = run("--version", AGLN_FAST_CACHE="1" * 5000)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("build", "agln_nano", "-o", "{long}"),
        ("build", "agln_nano", "-o", "{long}/x.agln"),
        ("scenes", "--write", "{long}"),
        ("visualize", "agln_nano", "photo.png", "-o", "{long}.png"),
    ],
    ids=" ".join,
)
def test_a_place_that_cannot_be_looked_at_is_an_error_in_one_line(arguments: tuple[str, ...]) -> None:
    done = run(*(word.format(long="1" * 300) for word in arguments))
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert done.returncode in (2, 4, 9)


def test_a_full_pipe_that_does_not_wait_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some terminals and runtimes of other languages hand over such descriptors."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 1000)
    wait = select.select

    def read_and_wait(*arguments: Any) -> Any:
        os.read(reader, 10_000)
        return wait(*arguments)

    monkeypatch.setattr(select, "select", read_and_wait)
    with open(reader, "rb") as pipe, io.BufferedWriter(Stream(writer, "w")) as stream:
        stream.write(b"x" * 8_000)
        stream.flush()
        stream.close()
        assert pipe.read().endswith(b"." + b"x" * 8_000)
