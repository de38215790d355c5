"""A source through a segmenter into files: labels, times, sound, sizes; and nothing where something fails."""

from __future__ import annotations

import threading
import weakref
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from clips import RATE, damage, labels, pictures, read_frames, read_sound, read_times, turn, write_clip
from fake_engine import colours, fake_segmenter
from PIL import Image

from agln_fast.data.classes import ClassSet
from agln_fast.errors import BackendError, ConfigError, ImageError
from agln_fast.video.clip import Clip
from agln_fast.video.convert import Outputs, Report, convert
from agln_fast.video.encoding import choose_encoding
from agln_fast.video.pictures import Pictures
from agln_fast.video.selection import Selection

pytestmark = pytest.mark.video


def run(source, outputs: Outputs, selection: Selection | None = None, segment=None) -> Report:
    report = Report()
    with source, segment or fake_segmenter(max_batch=4) as opened:
        convert(opened, source, selection or Selection(), outputs, report)
    return report


def overlay(path: Path, codec: str | None = None, crf: int | None = None, **others: object) -> Outputs:
    return Outputs(path, choose_encoding(path, codec, crf), **others)


def inner(picture: np.ndarray) -> np.ndarray:
    """The midst of each block: elsewhere neighbours mix, where 2x2 pixels share a colour."""
    return np.stack([picture[y::8, x::8] for y in (3, 4) for x in (3, 4)]).astype(int)


@pytest.fixture(autouse=True)
def _no_thread_stays():
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("agln-fast")]


def test_labels_are_exact_in_both_forms(tmp_path):
    images = pictures(30)
    clip = write_clip(tmp_path / "a.mkv", images, codec="ffv1")
    report = run(Clip(str(clip)), Outputs(mask=tmp_path / "mask.mkv"))
    assert (report.frames, report.height, report.width) == (30, 64, 96)
    run(Clip(str(clip)), Outputs(mask=tmp_path / "masks" / "%04d.png"))
    for index, (image, mask) in enumerate(zip(images, read_frames(tmp_path / "mask.mkv", "gray"), strict=True)):
        assert np.array_equal(mask, labels(image))
        assert np.array_equal(Image.open(tmp_path / "masks" / f"{index:04d}.png"), labels(image))
    assert len(list((tmp_path / "masks").iterdir())) == 30
    assert read_times(tmp_path / "mask.mkv") == read_times(clip)


@pytest.mark.parametrize("resize", ["stretch", "pad", "slide"])
def test_labels_are_those_of_frames_segmented_one_by_one(resize, tmp_path):
    clip = write_clip(tmp_path / "a.mp4", pictures(10, 80, 120))
    segment = fake_segmenter(resize=resize)
    expected = [segment(frame).labels for frame in read_frames(clip)]
    run(Clip(str(clip)), Outputs(mask=tmp_path / "mask.mkv"), segment=segment)
    for mask, one in zip(read_frames(tmp_path / "mask.mkv", "gray"), expected, strict=True):
        assert np.array_equal(mask, one)


def test_more_than_256_classes_keep_their_numbers(tmp_path):
    """The engine says class 299 on the left and 255 on the right."""
    names = ClassSet("many", "many", tuple(f"c{i}" for i in range(300)), tuple((i % 256,) * 3 for i in range(300)))

    def engine(frame):
        logits = np.zeros((300, *frame.shape[:2]), np.float32)
        logits[299, :, :48], logits[255, :, 48:] = 1, 1
        return logits

    clip = write_clip(tmp_path / "a.mkv", pictures(2), codec="ffv1")
    run(Clip(str(clip)), Outputs(mask=tmp_path / "m.mkv"), segment=fake_segmenter(engine, class_set=names))
    (first, _) = read_frames(tmp_path / "m.mkv", "gray16le")
    assert (first[:, :48] == 299).all()
    assert (first[:, 48:] == 255).all()


def test_the_overlay_is_that_of_pictures(tmp_path):
    """Encoded without loss, apart from the conversion of colours."""
    clip = write_clip(tmp_path / "a.mkv", pictures(5), codec="ffv1")
    expected = np.asarray(fake_segmenter()(pictures(5)[3]).overlay(0.25, legend=False)).astype(int)
    run(Clip(str(clip)), overlay(tmp_path / "o.mkv", "ffv1", alpha=0.25))
    found = read_frames(tmp_path / "o.mkv")[3].astype(int)
    assert np.abs(inner(found) - inner(expected)).max() <= 4


def test_sound_and_varying_times_are_kept(tmp_path):
    times = [0, 10, 50, 60, 200, 210, 500, *range(533, 1800, 33)]
    clip = write_clip(tmp_path / "a.mp4", pictures(len(times)), times=times, sound=True)
    report = run(Clip(str(clip)), overlay(tmp_path / "o.mp4"))
    assert read_times(tmp_path / "o.mp4") == read_times(clip) == [Fraction(time, 1000) for time in times]
    assert read_sound(tmp_path / "o.mp4") == read_sound(clip)
    assert len(read_sound(clip)) > 60
    assert report.left_out == []


def test_a_part_has_the_sound_of_its_part(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", pictures(100), sound=True)
    run(Clip(str(clip)), overlay(tmp_path / "o.mp4"), Selection(50, 75))
    assert read_times(tmp_path / "o.mp4") == [Fraction(index, 25) for index in range(25)]
    whole = dict(read_sound(clip))
    part = read_sound(tmp_path / "o.mp4")
    shifts = {whole[content] - time for content, time in part}
    assert len(part) == 48  # of a second, which is 46.9 packets, with the two that it cuts
    assert all(abs(shift - 2) <= Fraction(1024, 48_000) for shift in shifts)


def test_sound_that_the_container_does_not_take_is_told(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", pictures(5), sound=True)
    report = run(Clip(str(clip)), overlay(tmp_path / "o.webm"))
    assert report.left_out == ["aac audio cannot be copied into .webm"]
    assert len(read_frames(tmp_path / "o.webm")) == 5


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".m4v", ".mkv", ".webm"])
def test_every_container_plays(suffix, tmp_path):
    clip = write_clip(tmp_path / "a.mp4", pictures(30))
    run(Clip(str(clip)), overlay(tmp_path / f"o{suffix}"))
    assert len(read_frames(tmp_path / f"o{suffix}")) == 30


def test_odd_sides_get_one_more_row_and_column(tmp_path):
    images = pictures(4, 63, 95)
    clip = write_clip(tmp_path / "a.mkv", images, codec="ffv1")
    run(Clip(str(clip)), overlay(tmp_path / "o.mp4", crf=0, mask=tmp_path / "m.mkv", alpha=0))
    found = read_frames(tmp_path / "o.mp4")[0].astype(int)
    assert found.shape == (64, 96, 3)
    assert np.abs(found[-1] - found[-2]).max() <= 2
    assert np.abs(found[:, -1] - found[:, -2]).max() <= 2
    assert np.abs(found[28, 36] - images[0][28, 36]).max() <= 4  # in the midst of a block
    assert np.array_equal(read_frames(tmp_path / "m.mkv", "gray")[0], fake_segmenter()(images[0]).labels)


def test_a_turned_clip_becomes_an_upright_video(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", pictures(4))
    expected = [np.rot90(frame, -1) for frame in read_frames(clip)]
    turn(clip)
    run(Clip(str(clip)), overlay(tmp_path / "o.mp4", mask=tmp_path / "m.mkv"))
    import av

    with av.open(str(tmp_path / "o.mp4")) as container:
        frame = next(container.decode(video=0))
        assert (frame.width, frame.height, frame.rotation) == (64, 96, 0)
    segment = fake_segmenter()
    for mask, frame in zip(read_frames(tmp_path / "m.mkv", "gray"), expected, strict=True):
        assert np.array_equal(mask, segment(frame).labels)


@pytest.mark.parametrize("matrix", [1, 2, 5])
def test_colours_come_out_as_they_went_in(matrix, tmp_path):
    """BT.709, not said, BT.601: an overlay of alpha 0 is the clip, but for FFmpeg's rounding, down at each conversion.

    One matrix taken for another is 15 off and more.
    """
    clip = write_clip(tmp_path / "a.mp4", pictures(3), options={"crf": "0"}, matrix=matrix)
    run(Clip(str(clip)), overlay(tmp_path / "o.mp4", crf=0, alpha=0))
    before, after = read_frames(clip)[1], read_frames(tmp_path / "o.mp4")[1]
    assert np.abs(inner(before) - inner(after)).max() <= 6
    import av

    with av.open(str(tmp_path / "o.mp4")) as container:
        assert next(container.decode(video=0)).colorspace == matrix


def test_the_shape_of_pixels_is_kept(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", pictures(3), aspect=Fraction(4, 3))
    run(Clip(str(clip)), overlay(tmp_path / "o.mp4"))
    import av

    with av.open(str(tmp_path / "o.mp4")) as container:
        assert container.streams.video[0].sample_aspect_ratio == Fraction(4, 3)


def test_damaged_frames_leave_their_time(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", pictures(40), codec="mpeg4", options={"g": "10"})
    damage(clip, [12])
    source = Clip(str(clip))
    report = run(source, overlay(tmp_path / "o.mp4"))
    assert source.damaged == 1
    assert report.frames == 39
    assert Fraction(12, RATE) not in read_times(tmp_path / "o.mp4")
    assert read_times(tmp_path / "o.mp4")[-1] == Fraction(39, RATE)


def test_pictures_become_a_video(tmp_path):
    for index, image in enumerate(pictures(7)):
        Image.fromarray(image).save(tmp_path / f"{index}.png")
    files = sorted(tmp_path.glob("*.png"))
    run(Pictures(files, Fraction(30000, 1001), "x"), overlay(tmp_path / "o.mp4", mask=tmp_path / "m" / "%d.png"))
    assert read_times(tmp_path / "o.mp4") == [Fraction(1001 * index, 30000) for index in range(7)]
    for index, image in enumerate(pictures(7)):
        assert np.array_equal(Image.open(tmp_path / "m" / f"{index}.png"), labels(image))


def test_mpeg4_has_its_times(tmp_path):
    """Its standard has 16 bits for ticks of a second; transport streams have 90,000."""
    clip = write_clip(tmp_path / "a.ts", pictures(20))
    run(Clip(str(clip)), overlay(tmp_path / "o.mp4", "mpeg4"))
    found = read_times(tmp_path / "o.mp4")
    assert [time - found[0] for time in found] == [Fraction(index, 25) for index in range(20)]


def test_memory_does_not_grow_with_the_clip(tmp_path, monkeypatch):
    """Of 400 frames no more are alive at any time than may be in flight, and one that the decoder's thread begins."""
    alive: set[int] = set()
    most = 0
    upright = Clip._upright

    def counted(self, frame, size):
        nonlocal most
        image = upright(self, frame, size)
        key = len(seen)
        seen.append(key)
        alive.add(key)
        weakref.finalize(image, alive.discard, key)
        most = max(most, len(alive))
        return image

    seen: list[int] = []
    monkeypatch.setattr(Clip, "_upright", counted)
    clip = write_clip(tmp_path / "a.mp4", pictures(8) * 50, sound=True)
    report = run(
        Clip(str(clip)), overlay(tmp_path / "o.mp4", mask=tmp_path / "m.mkv"), segment=fake_segmenter(max_batch=2)
    )
    assert report.frames == len(seen) == 400
    assert most <= 3 * 2 + 1 + 1


def fails_at(number: int, error: Exception):
    seen = 0

    def engine(frame):
        nonlocal seen
        seen += 1
        if seen > number:
            raise error
        return colours(frame)

    return fake_segmenter(engine)


def test_an_engine_that_fails_leaves_nothing(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", pictures(30))
    with pytest.raises(BackendError, match="out of memory"):
        run(
            Clip(str(clip)),
            overlay(tmp_path / "o.mp4", mask=tmp_path / "m.mkv"),
            segment=fails_at(10, BackendError("out of memory")),
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_failure_stops_a_source_that_is_far_from_its_next_frame(tmp_path):
    """It never comes to its second: the thread that looks for it is told to end, and waited for."""

    def fail():
        raise RuntimeError("enough")

    source = Clip("lavfi:testsrc=size=96x64:rate=25")
    with source, fake_segmenter() as segment, pytest.raises(RuntimeError, match="enough") as info:
        convert(segment, source, Selection(every=10**9), overlay(tmp_path / "o.mp4"), Report(), fail)
    assert info.tb is not None  # and with it the generator
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("agln-fast")]
    assert list(tmp_path.iterdir()) == []


def test_no_frame_is_an_error_and_no_file(tmp_path):
    clip = write_clip(tmp_path / "a.mp4", pictures(5))
    with pytest.raises(ImageError, match=r"a\.mp4: has no such frames"):
        run(Clip(str(clip)), overlay(tmp_path / "o.mp4"), Selection(100))
    damage(clip, range(5))
    with pytest.raises(ImageError, match=r"a\.mp4: none of its frames can be used; the first: "):
        run(Clip(str(clip)), overlay(tmp_path / "o.mp4"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_full_disk_leaves_nothing(tmp_path):
    import resource

    clip = write_clip(tmp_path / "a.mp4", pictures(60))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ImageError, match=r"o\.mp4: cannot be written \(File too large\)"):
            run(Clip(str(clip)), overlay(tmp_path / "o.mp4", crf=0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_ctrl_c_ends_the_video_where_it_is(tmp_path):
    """In a program of others: the second frame presses it, in the main thread."""
    import signal

    source = Clip("lavfi:testsrc=size=96x64:rate=25")
    report, mask = Report(), tmp_path / "m.mkv"

    def press():
        if report.frames == 2:
            signal.raise_signal(signal.SIGINT)

    with source, fake_segmenter() as segment, pytest.raises(KeyboardInterrupt):
        convert(segment, source, Selection(), overlay(tmp_path / "o.mp4", mask=mask), report, press)
    assert 2 <= report.frames <= 2 + 4 + 1
    assert len(read_frames(tmp_path / "o.mp4")) == len(read_frames(mask, "gray")) == report.frames
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.mkv", "o.mp4"]


def test_encoders():
    assert choose_encoding(Path("o.mp4")).codec == "libx264"
    assert choose_encoding(Path("o.mp4")).options["crf"] == "20"
    assert choose_encoding(Path("o.webm")).codec == "libvpx-vp9"
    assert choose_encoding(Path("o.mkv"), "libx265", 5).options["crf"] == "5"
    assert "crf" not in choose_encoding(Path("o.mkv"), "ffv1").options


def test_without_libx264_there_is_mpeg4(monkeypatch):
    import agln_fast.video.encoding as encoding

    known = encoding._encoder
    monkeypatch.setattr(encoding, "_encoder", lambda name: None if name == "libx264" else known(name))
    assert choose_encoding(Path("o.mp4")).codec == "mpeg4"


@pytest.mark.parametrize(
    ("name", "codec", "crf", "match"),
    [
        ("o.avi", None, None, r"suffix '\.avi' is none for videos: use \.m4v, "),
        ("o.mp4", "libx246", None, "unknown codec 'libx246'; did you mean .*'libx264'"),
        ("o.mp4", "aac", None, "unknown codec 'aac'"),
        ("o.mp4", "mpeg4", 20, "crf 20: codec mpeg4 has none"),
    ],
)
def test_encodings_that_cannot_be(name, codec, crf, match):
    with pytest.raises(ConfigError, match=match):
        choose_encoding(Path(name), codec, crf)


@pytest.mark.parametrize(
    ("codec", "match"), [("prores", "does not support 'prores'"), ("h264_nvenc", "cannot be used")]
)
def test_encoders_that_cannot_be_used_here(codec, match, tmp_path):
    clip = write_clip(tmp_path / "a.mp4", pictures(3))
    if codec == "h264_nvenc" and Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU, which may encode")
    with pytest.raises(ConfigError, match=match):
        run(Clip(str(clip)), overlay(tmp_path / "o.mp4", codec))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
