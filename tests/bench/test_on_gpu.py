"""The script for a machine with a GPU: what each stage runs, and what becomes of it. No command really runs here."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from agln_fast.bench.kernels.profile import main

SCRIPT = Path(__file__).parents[2] / "bench" / "on_gpu.sh"
RECORDER = """#!/bin/sh
echo "$(basename "$0")" "${PYTORCH_NO_CUDA_MEMORY_CACHING:-0}" "$@" >> "$COMMANDS"
case "$*" in *"$FAILS"*) exit 9 ;; esac
"""


@pytest.fixture
def stages(tmp_path):
    """Run the script with commands that only note how they are called; -> its answer and these notes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python-that-notes", "compute-sanitizer"):
        (folder / name).write_text(RECORDER)
        (folder / name).chmod(0o755)

    def run(*arguments, fails="nothing", sanitizer=True):
        if not sanitizer:
            (folder / "compute-sanitizer").unlink()
        notes = tmp_path / "commands"
        environment = {
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHON": "python-that-notes",
            "OUT": str(tmp_path / "out"),
            "COMMANDS": str(notes),
            "FAILS": fails,
        }
        answer = subprocess.run(
            ["bash", SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment, timeout=60
        )
        return answer, notes.read_text().splitlines() if notes.exists() else []

    return run


def test_profile_is_of_the_large_network_where_a_gpu_is(stages):
    """The recorder answers that CUDA is there: every command of it ends with status 0."""
    answer, commands = stages("profile")
    assert answer.returncode == 0
    assert commands[0].split()[2:5] == ["-m", "pip", "install"]
    assert "agln_fast.bench.kernels.profile --save" in commands[-1]
    _, commands = stages("profile", fails="is_available")
    assert "profile --network agln_nano --save" in commands[-1]


def test_sanitizer_sees_each_tensor_as_an_allocation(stages):
    answer, commands = stages("sanitize")
    assert answer.returncode == 0
    name, alone, *rest = commands[-1].split()
    assert (name, alone) == ("compute-sanitizer", "1")
    assert rest[: rest.index("--error-exitcode") + 1] == ["--tool", "memcheck", "--error-exitcode"]
    assert "-m pytest -m gpu tests/kernels" in commands[-1]


@pytest.mark.parametrize("stage", ["profile", "sanitize", "tests", "kernels", "models"])
def test_what_fails_is_no_success(stage, stages):
    """And the next stage runs all the same."""
    answer, commands = stages(
        stage, "profile", fails={"profile": "profile", "sanitize": "memcheck"}.get(stage, "pytest")
    )
    if stage == "models":
        answer, commands = stages(stage, "profile", fails="cli bench")
    assert answer.returncode == 1
    assert any("kernels.profile" in command for command in commands)


def test_what_is_not_there_is_said(stages):
    answer, commands = stages("sanitize", sanitizer=False)
    assert answer.returncode == 0
    assert "left out: sanitize: compute-sanitizer is not on the PATH" in answer.stdout
    assert len(commands) == 1


def test_unknown_stage_is_refused_before_anything_runs(stages):
    answer, commands = stages("profiles")
    assert answer.returncode == 2
    assert "unknown stage profiles" in answer.stderr
    assert not commands


def test_profile_of_the_network(tmp_path, capsys):
    """On the CPU: operators. Some of the network's convolutions are run by ops of ours."""
    file = tmp_path / "profile.json"
    main(["--network", "agln_nano", "--runs", "2", "--save", str(file)])
    found = json.loads(file.read_text())
    rows = {row["kernel"]: row for row in found["rows"]}
    assert rows["agln::label_upsample"]["launches"] == 1
    assert 1 < rows["aten::convolution"]["launches"] <= sum(found["ways"].values())
    times = [row["microseconds"] for row in found["rows"]]
    assert times == sorted(times, reverse=True)
    printed = capsys.readouterr().out
    assert "agln::label_upsample" in printed
    assert f"{sum(times):.1f}" in printed


def test_profile_of_no_run_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--runs", "0"])
    assert "--runs: at least 1" in capsys.readouterr().err
