"""Each file is made once, and goes into the bundle as it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from agln_fast.artefact import Artefact
from agln_fast.builder import pictures as pictures_module
from agln_fast.builder import workshop as module
from agln_fast.builder.workshop import Workshop
from agln_fast.contract import IOContract


@pytest.fixture
def workshop(small_network, tmp_path: Path) -> Workshop:
    (tmp_path / "drafts").mkdir()
    return Workshop(small_network("fpn_resnet18"), IOContract(64, 64, min_batch=2, max_batch=4), tmp_path / "drafts")


def _artefact(name: str, file: Path, workshop: Workshop) -> Artefact:
    return Artefact(name, "echo", "fp32", file, workshop.contract, workshop.model)


def test_a_file_is_written_when_it_is_first_asked_for(workshop: Workshop) -> None:
    written: list[Path] = []

    def write(path: Path) -> None:
        inner = workshop.file("inner.txt", "inner", lambda inner: inner.write_text("inner"))
        path.write_text(inner.read_text())
        written.append(path)

    files = [workshop.file("model.txt", key, write) for key in ("a", "b", "a")]
    assert files[0] == files[2] != files[1]
    assert [file.name for file in files] == ["model.txt"] * 3
    assert written == files[:2]
    assert workshop.seconds(files[0]) > 0


def test_a_file_costs_what_it_was_made_of_whoever_made_that_first(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only moves while something is written: a graph in 3 s, and engines of it in 5 and 7 s."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])

    def take(seconds: float) -> None:
        now[0] += seconds

    def engine(name: str, seconds: float) -> Path:
        def write(path: Path) -> None:
            workshop.file("graph", "graph", lambda path: take(3))
            take(seconds)

        return workshop.file(name, name, write)

    first, second = engine("first", 5), engine("second", 7)
    assert workshop.seconds(first) == 3 + 5
    assert workshop.seconds(second) == 3 + 7
    assert workshop.spent == 3 + 5 + 7


def test_files_are_delivered_under_names_of_their_own(workshop: Workshop, tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text(str(path))
        path.with_suffix(".bin").write_text("weights")

    for key in ("first", "second"):
        made = _artefact(f"echo-{key}", workshop.file("model.int8.xml", key, write), workshop)
        delivered = workshop.deliver(made, tmp_path)
        assert delivered.file.read_text() == str(made.file), "the very file"
        assert workshop.file("model.int8.xml", key, write) == delivered.file, "and it is known where it went"
        assert workshop.deliver(delivered, tmp_path) == delivered
    files = {file.name for file in tmp_path.iterdir() if file.is_file()}
    assert files == {"model.int8.xml", "model.int8.bin", "model.echo-second.xml", "model.echo-second.bin"}


def test_calibration_fills_up_its_last_batch(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures_module, "CALIBRATION", 3)
    first, second = workshop.calibration()
    assert first.shape == second.shape == (2, 64, 64, 3)
    assert np.array_equal(second[1], first[0])
    assert not np.array_equal(second[0], first[0])


def test_what_was_a_trial_is_gone_and_is_made_again_if_it_is_wanted(workshop: Workshop) -> None:
    def made() -> Path:
        return workshop.file("x.onnx", "key", lambda file: file.write_bytes(b"x"))

    file = made()
    workshop.discard(SimpleNamespace(file=file))  # type: ignore[arg-type]
    assert not file.parent.exists()
    assert made().read_bytes() == b"x"
