"""`agln-fast run` with videos: what is one, what is told, and how signals end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clips import damage, labels, pictures, read_frames, read_times, write_clip
from fake_engine import fake_segmenter
from PIL import Image

import agln_fast.cli.request
import agln_fast.runtime.segmenter
from agln_fast.cli.console import progress_bar

needs_video = pytest.mark.video


@pytest.fixture
def run(cli, monkeypatch):
    """`run(*arguments)` with an engine of no weight: exit code, the report, standard error."""
    monkeypatch.setattr(agln_fast.cli.request, "open_matching", lambda *_: None)
    monkeypatch.setattr(agln_fast.runtime.segmenter, "load", lambda *_, **__: fake_segmenter(max_batch=2))

    def call(*arguments):
        code, out, err = cli("run", "x.agln", *arguments, "--json")
        return code, json.loads(out) if out else None, err.replace("\n", " ")

    return call


@pytest.fixture
def sequence(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    for number, image in enumerate(pictures(12)):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


def masks(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in folder.iterdir()}


@needs_video
def test_a_clip_becomes_an_overlay_and_labels(run, tmp_path):
    clip = write_clip(tmp_path / "a.mkv", pictures(10), codec="ffv1")
    code, report, err = run(clip, "-o", tmp_path / "o.mp4", "--mask", tmp_path / "m.mkv")
    assert (code, err) == (0, "")
    assert report.pop("seconds") > 0
    assert report.pop("frames_per_second") > 0
    assert report == {
        "engine": "fake-fp32", "device": "cpu", "precision": "fp32", "input": str(clip), "frames": 10, "damaged": 0,
        "height": 64, "width": 96, "overlay": str(tmp_path / "o.mp4"), "labels": str(tmp_path / "m.mkv"),
        "left_out": [], "ended_early": None,
    }  # fmt: skip
    assert len(read_frames(tmp_path / "o.mp4")) == 10
    assert np.array_equal(read_frames(tmp_path / "m.mkv", "gray")[7], labels(pictures(10)[7]))


@needs_video
def test_a_part_in_numbered_pictures(run, tmp_path):
    clip = write_clip(tmp_path / "a.mkv", pictures(20), codec="ffv1")
    assert run(clip, "--mask", tmp_path / "m", "--frames", "3:12", "--every", 4)[0] == 0
    found = masks(tmp_path / "m")
    assert sorted(found) == ["000003.png", "000007.png", "000011.png"]
    assert np.array_equal(found["000007.png"], labels(pictures(20)[7]))
    assert run(clip, "--mask", tmp_path / "n" / "f%02d.png", "--fps", "5", "--seconds", "0.4")[0] == 0
    assert sorted(masks(tmp_path / "n")) == ["f00.png", "f05.png"]


@needs_video
@pytest.mark.parametrize("by", ["pattern", "folder", "glob", "shell"])
def test_pictures_become_a_video(by, run, sequence, tmp_path):
    """By a pattern in the order of their numbers, else of their names."""
    named = {
        "pattern": [f"{sequence}/%d.png"],
        "folder": [sequence],
        "glob": [f"{sequence}/*.png"],
        "shell": sorted(sequence.iterdir()),
    }[by]
    code, report, _ = run(*named, "-o", tmp_path / "o.mp4", "--mask", tmp_path / "m.mkv", "--fps", "10")
    assert (code, report["frames"]) == (0, 12)
    order = list(range(12)) if by == "pattern" else sorted(range(12), key=str)
    for place, mask in zip(order, read_frames(tmp_path / "m.mkv", "gray"), strict=True):
        assert np.array_equal(mask, labels(pictures(12)[place]))
    times = read_times(tmp_path / "o.mp4")
    assert [time * 10 for time in times] == list(range(12))


def test_pictures_without_a_video_need_no_pyav(run, sequence, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert run(f"{sequence}/%d.png", "--mask", tmp_path / "m")[0] == 0
    assert np.array_equal(masks(tmp_path / "m")["000011.png"], labels(pictures(12)[11]))


@pytest.mark.parametrize("arguments", [("x.mp4", "-o", "o.mp4"), ("x.mp4", "--mask", "m"), ("x.png", "-o", "o.mp4")])
def test_without_pyav_the_extra_is_named(arguments, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "av", None)
    for name in ("x.mp4", "x.png"):
        (tmp_path / name).touch()
    code, report, err = run(*arguments)
    assert (code, report) == (6, None)
    assert 'package "av" is not installed: pip install "agln-fast[video]"' in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.mp4", "x.png"]


@needs_video
def test_damage_and_a_bad_picture_are_told_at_the_end(run, sequence, tmp_path):
    clip = write_clip(tmp_path / "a.mp4", pictures(30), codec="mpeg4", options={"g": "10"})
    damage(clip, [12, 14])
    code, report, err = run(clip, "-o", tmp_path / "o.mp4")
    assert (code, report["frames"], report["damaged"]) == (1, 28, 2)
    assert "skipped: 2 damaged frames; the first: its data is damaged" in err
    (sequence / "3.png").write_bytes(b"no picture")
    code, report, err = run(sequence, "-o", tmp_path / "o.mp4")
    assert (code, report["frames"], report["damaged"]) == (1, 11, 1)
    assert "skipped: 1 damaged frame; the first: " in err
    assert "3.png" in err


@needs_video
def test_what_is_read_is_not_written_over(run, sequence, tmp_path):
    clip = write_clip(tmp_path / "a.mp4", pictures(3))
    (tmp_path / "link.mp4").symlink_to(clip)
    before = clip.read_bytes()
    for arguments in (
        (clip, "-o", clip),
        (clip, "-o", tmp_path / "link.mp4"),
        (tmp_path / "link.mp4", "-o", clip),
        (f"{sequence}/%d.png", "--mask", f"{sequence}/%d.png"),
    ):
        code, _, err = run(*arguments)
        assert code == 4
        assert "is itself an input; choose another name" in err
    assert clip.read_bytes() == before
    code, _, err = run(clip, "-o", tmp_path / "x.mkv", "--mask", tmp_path / "x.mkv")
    assert code == 2
    assert "is named for the overlay and for the labels; choose two names" in err


@needs_video
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("a.mp4",), 2, "missing option -o: give a video for the overlay"),
        (("a.mp4", "-o", "folder"), 2, "suffix '' is none for videos: use .m4v, "),
        (("a.mp4", "-o", "missing/o.mp4"), 4, "there is no folder missing; create it"),
        (("a.mp4", "-o", "o.mp4", "--codec", "x264"), 2, "unknown codec 'x264'; did you mean 'h264', 'libx264'"),
        (("a.mp4", "-o", "o.mp4", "--frames", "5"), 2, "give A:B"),
        (("a.mp4", "-o", "o.mp4", "--fps", "fast"), 2, "give frames a second"),
        (("a.mp4", "-o", "o.mp4", "--seconds", "0"), 2, "seconds 0.0: must be above 0"),
        (("a.mp4", "-o", "o.mp4", "--frames", "90:"), 4, "a.mp4: has no such frames"),
        (("a.mp4", "a.mp4", "-o", "o.mp4"), 2, "a.mp4: one video at a time; pictures may be several"),
        (("a.mp4", "-o", "o.mp4", "--bit-depth", "12"), 2, "--bit-depth is for pictures; a.mp4 is a video"),
        (("a.mp4", "--mask", "m.mp4"), 2, "labels stay exact in a file .mkv, or as PNG files in a folder"),
        (("a.mp4", "--mask", "%d.jpg"), 2, "labels stay exact as .png or .tif"),
        (("a.mp4", "--mask", "m", "--crf", "5"), 2, "--codec and --crf are for the overlay"),
        (("b.mp4", "-o", "o.mp4"), 4, "b.mp4: no such file; did you mean 'a.mp4'?"),
        (("%d.png", "-o", "o.mp4"), 4, "%d.png: no file of such a name"),
        (("nothing", "-o", "o.mp4"), 4, "nothing: no such file"),
        (("a.png", "-o", "out", "--fps", "5"), 2, "--fps is for videos: name one, or write one"),
        (("a.png",), 2, "missing option -o: give a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_is_one_line_and_leaves_nothing(arguments, code, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_clip(tmp_path / "a.mp4", pictures(3))
    Image.fromarray(pictures(1)[0]).save("a.png")
    found, report, err = run(*arguments)
    assert (found, report) == (code, None)
    assert message in err
    assert sorted(os.listdir()) == ["a.mp4", "a.png"]


_ENDLESS = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have told its background to ignore it
import agln_fast.cli.request, agln_fast.runtime.segmenter
from fake_engine import colours, fake_segmenter
from agln_fast.cli import main

seen = 0
def engine(frame):
    global seen
    seen += 1
    if seen == 10:
        print("ten", file=sys.stderr, flush=True)
    return colours(frame)

agln_fast.cli.request.open_matching = lambda *_: None
agln_fast.runtime.segmenter.load = lambda *_, **__: fake_segmenter(engine)
main()
"""


@needs_video
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_video_that_plays(number, code, tmp_path):
    arguments = [
        "run",
        "x.agln",
        "lavfi:testsrc=size=96x64:rate=25",
        "-o",
        tmp_path / "o.mp4",
        "--mask",
        tmp_path / "m.mkv",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", _ENDLESS, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    with process:
        assert process.stderr.readline() == "ten\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert f"interrupted by {number.name}" in err
    count = len(read_frames(tmp_path / "o.mp4"))
    assert count >= 1
    assert f"ended after {count} frame" in err
    assert len(read_frames(tmp_path / "m.mkv", "gray")) == count
    assert sorted(os.listdir(tmp_path)) == ["m.mkv", "o.mp4"]


def test_progress_tells_how_many_a_second():
    now = [0.0]
    with progress_bar("frames", remaining=True, rate=True) as bar:
        bar.get_time = lambda: now[0]
        task = bar.add_task("segment", total=100)
        for _ in range(3):
            now[0] += 0.25
            bar.advance(task)
        row = [str(column(bar.tasks[task])) for column in bar.columns]
    assert "4.0/s" in row
    assert row[-1] == "0:00:25"  # 97 frames are left
