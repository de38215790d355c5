"""Pictures of a sequence: their order, their times, and what is wrong with some."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agln_fast.errors import ImageError
from agln_fast.video.pictures import Pictures, is_numbered, is_pattern, list_numbered, numbered
from agln_fast.video.selection import Selection


def write(path: Path, value: int = 0, size: tuple[int, int] = (6, 4)) -> Path:
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def test_order_is_that_of_the_numbers(tmp_path):
    for name in ("f10.png", "f9.png", "f100.png", "f1.png", "g2.png", "f3.png.txt", "fx.png"):
        (tmp_path / name).touch()
    assert [file.name for file in list_numbered(f"{tmp_path}/f%d.png")] == ["f1.png", "f9.png", "f10.png", "f100.png"]
    assert [file.name for file in list_numbered(f"{tmp_path}/f%02d.png")] == ["f10.png", "f100.png"]
    with pytest.raises(ImageError, match="no file of such a name; %04d stands for a number"):
        list_numbered(f"{tmp_path}/f%04d.png")
    with pytest.raises(ImageError, match="missing cannot be read"):
        list_numbered(f"{tmp_path}/missing/%d.png")


def test_names(tmp_path):
    assert numbered(Path("a%d/f_%04d.png"), 7) == Path("a%d/f_0007.png")
    assert numbered(Path("f%d.png"), 12) == Path("f12.png")
    assert not is_numbered(Path("%d/f.png"))
    assert is_pattern("f%5d.png")
    assert not is_pattern("http://host/%20d%2d.mp4")
    (tmp_path / "f%d.png").touch()
    assert not is_pattern(f"{tmp_path}/f%d.png")


def test_frames_have_their_times_and_places(tmp_path):
    files = [write(tmp_path / f"{value}.png", value) for value in range(5)]
    source = Pictures(files, Fraction(10), "x")
    frames = list(source.frames(Selection(1, None, 2)))
    assert [(frame.index, frame.time, frame.duration) for frame in frames] == [
        (1, 0, Fraction(1, 10)),
        (3, Fraction(1, 5), Fraction(1, 10)),
    ]
    assert [frame.image[0, 0, 0] for frame in frames] == [1, 3]
    assert (source.total, source.rate, source.damaged) == (5, 10, 0)


def test_what_cannot_be_decoded_is_counted_and_leaves_its_time(tmp_path):
    files = [write(tmp_path / f"{value}.png", value) for value in range(4)]
    files[1].write_bytes(b"no picture")
    source = Pictures(files, Fraction(1), "x")
    assert [frame.time for frame in source.frames(Selection())] == [0, 2, 3]
    assert source.damaged == 1
    assert "1.png" in source.damage


def test_one_of_another_size_is_refused(tmp_path):
    files = [write(tmp_path / "0.png"), write(tmp_path / "1.png", size=(4, 6))]
    with pytest.raises(ImageError, match=r"1\.png: has 4x6 pixels, those before it 6x4"):
        list(Pictures(files, Fraction(1), "x").frames(Selection()))


def test_stopped_it_ends(tmp_path):
    source = Pictures([write(tmp_path / f"{value}.png") for value in range(4)], Fraction(1), "x")
    frames = source.frames(Selection())
    next(frames)
    source.stop()
    assert list(frames) == []


def test_bit_depth_reaches_the_pictures(tmp_path):
    Image.fromarray(np.full((4, 6), 1023, np.uint16)).save(tmp_path / "0.png")
    (frame,) = Pictures([tmp_path / "0.png"], Fraction(1), "x", 10).frames(Selection())
    assert (frame.image == 255).all()
