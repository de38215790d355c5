"""`agln-fast run`: which files are inputs, how they and their outputs are named, and the exit code."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from deep_images import GREY, png
from fake_engine import fake_segmenter
from PIL import Image

import agln_fast.cli.request
import agln_fast.runtime.segmenter
from agln_fast.cli.console import progress_bar
from agln_fast.runtime.images import is_output
from agln_fast.runtime.result import Kind


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(path.name)).integers(0, 256, (20, 30, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def run(cli, monkeypatch):
    """`run(*arguments)` with an engine of no weight: exit code, the report, standard error."""
    monkeypatch.setattr(agln_fast.cli.request, "open_matching", lambda *_: None)
    monkeypatch.setattr(agln_fast.runtime.segmenter, "load", lambda *_, **__: fake_segmenter(max_batch=2, resize="pad"))

    def call(*arguments):
        code, out, err = cli("run", "x.agln", *arguments, "--json")
        return code, json.loads(out) if out else None, err.replace("\n", " ")

    return call


def inputs(report) -> list[str]:
    return [Path(row["image"]).name for row in report["images"]]


def test_second_run_into_the_folder_of_the_images_has_the_same_inputs_and_outputs(run, tmp_path):
    for name in ("a.png", "b.jpg"):
        write(tmp_path / name)
    reports = [run(tmp_path, "-o", tmp_path)[1] for _ in range(3)]
    assert [inputs(report) for report in reports] == [["a.png", "b.jpg"]] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.labels.png", "a.overlay.png", "a.png", "b.jpg", "b.labels.png", "b.overlay.png",
    ]  # fmt: skip


def test_outputs_in_a_folder_inside_are_no_inputs_of_a_recursive_run(run, tmp_path):
    write(tmp_path / "street" / "a.png")
    for _ in range(2):
        code, report, _ = run(tmp_path, "-r", "-o", tmp_path / "out")
        assert (code, inputs(report)) == (0, ["a.png"])


@pytest.mark.parametrize("by", ["shell", "pattern"])
def test_outputs_that_a_pattern_gives_are_left_out(by, run, tmp_path):
    write(tmp_path / "a.png")
    for index in range(2):
        named = sorted(tmp_path.glob("*.png")) if by == "shell" else [tmp_path / "*.png"]
        code, report, err = run(*named, "-o", tmp_path)
        assert (code, inputs(report)) == (0, ["a.png"])
        told = "left out 2 pictures that agln-fast wrote; name them alone to segment them" in err
        assert told == (by == "shell" and index == 1)


def test_output_that_is_named_alone_is_an_input(run, tmp_path):
    write(tmp_path / "a.png")
    run(tmp_path, "-o", tmp_path)
    assert inputs(run(tmp_path / "a.overlay.png", "-o", tmp_path / "out")[1]) == ["a.overlay.png"]


def test_folder_of_nothing_but_outputs_says_so(run, tmp_path):
    run(write(tmp_path / "a.png"), "-o", tmp_path / "out")
    code, _, err = run(tmp_path / "out", "-o", tmp_path / "out2")
    assert code == 4
    assert "its 2 images were all written by agln-fast; name them to use them" in err


def test_ground_truth_with_the_name_of_an_output_is_an_input_and_is_not_replaced(run, tmp_path):
    write(tmp_path / "a.png")
    before = write(tmp_path / "a.labels.png").read_bytes()
    code, report, err = run(tmp_path, "-o", tmp_path)
    assert (code, inputs(report)) == (1, ["a.labels.png"])
    assert "a.labels.png is itself an input; choose another folder" in err
    assert (tmp_path / "a.labels.png").read_bytes() == before


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        ("png", "overlay"),
        ("tif", "overlay"),
        ("jpg", "overlay"),
        ("webp", "overlay"),
        ("png", "labels"),
        ("tif", "labels"),
    ],
)
def test_saved_results_are_known_as_outputs_by_their_header(suffix: str, kind: Kind, tmp_path):
    source = write(tmp_path / f"a.{suffix}")
    result = fake_segmenter()(source)
    result.save(tmp_path / f"b.{suffix}", kind)
    assert not is_output(source)
    assert is_output(tmp_path / f"b.{suffix}")
    (tmp_path / f"cut.{suffix}").write_bytes((tmp_path / f"b.{suffix}").read_bytes()[:20])
    assert not is_output(tmp_path / f"cut.{suffix}")


def test_recursion_finds_what_a_folder_of_folders_hides(run, tmp_path):
    for name in ("day/a.png", "night/rain/a.png", ".cache/c.png", "day/._a.png"):
        write(tmp_path / "in" / name)
    code, _, err = run(tmp_path / "in", "-o", tmp_path / "out")
    assert code == 4
    assert "holds no files; it has folders: search them, too, with --recursive" in err
    for flag in ("-r", "--recursive"):
        code, report, _ = run(tmp_path / "in", flag, "-o", tmp_path / "out")
        assert code == 0
        assert [Path(row["overlay"]).name for row in report["images"]] == ["day_a.overlay.png", "rain_a.overlay.png"]


def test_recursion_searches_folders_that_a_pattern_gives(run, tmp_path):
    write(tmp_path / "in" / "day" / "deep" / "a.png")
    assert inputs(run(tmp_path / "in" / "d*", "-r", "-o", tmp_path / "out")[1]) == ["a.png"]


def test_folder_without_images_beside_folders_has_the_hint(run, tmp_path):
    write(tmp_path / "in" / "day" / "a.png")
    (tmp_path / "in" / "notes.txt").write_text("")
    _, _, err = run(tmp_path / "in", "-o", tmp_path / "out")
    assert "none of its 1 files is an image" in err
    assert "with --recursive" in err


@pytest.mark.parametrize(
    ("sound", "damaged", "code"),
    [pytest.param(2, 0, 0, id="none"), pytest.param(2, 3, 1, id="some"), pytest.param(0, 3, 4, id="all")],
)
def test_exit_code_says_how_many_failed(sound, damaged, code, run, tmp_path):
    for index in range(sound):
        write(tmp_path / f"{index}.png")
    for index in range(damaged):
        (tmp_path / f"damaged{index}.png").write_bytes(b"no image")
    found, report, err = run(tmp_path, "-o", tmp_path / "out")
    assert found == code
    assert (len(report["images"]), len(report["failed"])) == (sound, damaged)
    assert err.count("failed:") == damaged


def test_bit_depth_reaches_the_image_and_its_absence_is_told(run, tmp_path):
    """A 12-bit picture, the same in 8: equal overlays."""
    values = np.linspace(0, 4095, 600).reshape(20, 30, 1).round().astype(np.uint16)
    (tmp_path / "deep.png").write_bytes(png(values, GREY))
    Image.fromarray((values[..., 0] / 4095 * 255).round().astype(np.uint8)).save(tmp_path / "flat.png")
    code, _, err = run(tmp_path / "deep.png", "-o", tmp_path / "out")
    assert code == 4
    assert "--bit-depth 12" in err
    assert run(tmp_path, "--bit-depth", "12", "-o", tmp_path / "out")[0] == 0
    deep, flat = (np.asarray(Image.open(tmp_path / "out" / f"{name}.overlay.png")) for name in ("deep", "flat"))
    np.testing.assert_array_equal(deep, flat)
    code, _, err = run(tmp_path, "--bit-depth", "17", "-o", tmp_path / "out")
    assert code == 2


def test_help_lists_every_precision(cli):
    for verb in ("run", "eval"):
        assert "int8" in cli(verb, "--help")[1]


def test_table_tells_images_of_one_name_apart(cli, run, tmp_path):
    for name in ("day/a.png", "night/a.png"):
        write(tmp_path / name)
    _, out, _ = cli("run", "x.agln", tmp_path, "-r", "-o", tmp_path / "out")
    assert "day/a.png" in out
    assert "night/a.png" in out


def test_progress_has_a_unit_and_a_total():
    with progress_bar("images") as bar:
        task = bar.add_task("segment", total=12, completed=3)
        row = [column(bar.tasks[task]) for column in bar.columns]
    assert [str(cell) for cell in row[-3:-1]] == [" 3/12", "images"]


def test_open_files_and_content_go_through_a_segmenter(tmp_path):
    path = write(tmp_path / "a.png")
    segment = fake_segmenter(max_batch=4)
    with path.open("rb") as file:
        sources = [path, path.read_bytes(), io.BytesIO(path.read_bytes()), file]
        results = segment(sources)
    assert len(results) == 4
    for result in results:
        np.testing.assert_array_equal(result.labels, results[0].labels)


@pytest.mark.parametrize("resize", ["pad", "slide"])
def test_bit_depth_goes_through_a_segmenter(resize):
    segment = fake_segmenter(resize=resize)
    image = segment(np.full((20, 30), 1023, np.uint16), bit_depth=10).image
    assert (image == 255).all()
