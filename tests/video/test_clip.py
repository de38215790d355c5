"""Clips as FFmpeg reads them: frames upright and in order, damage counted, and nothing opened but what was named."""

from __future__ import annotations

import functools
import http.server
import socket
import threading
from fractions import Fraction

import numpy as np
import pytest
from clips import damage, pictures, read_frames, turn, write_clip

from agln_fast.errors import ImageError
from agln_fast.video.clip import Clip, is_clip, is_live
from agln_fast.video.selection import Selection

pytestmark = pytest.mark.video


@pytest.fixture
def server(tmp_path):
    """A server of the files in `tmp_path`: its address, and the names that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}", asked
        served.shutdown()
        thread.join()


def frames_of(address: object, selection: Selection | None = None) -> list:
    with Clip(str(address)) as clip:
        return list(clip.frames(selection or Selection()))


def test_frames_are_those_of_the_file(tmp_path):
    images = pictures(12)
    path = write_clip(tmp_path / "a.mkv", images, codec="ffv1")
    with Clip(str(path)) as clip:
        frames = list(clip.frames(Selection()))
        assert (clip.rate, clip.time_base, clip.damaged, clip.damage, clip.broken) == (
            25,
            Fraction(1, 1000),
            0,
            None,
            None,
        )
        assert clip.total in (12, 13)  # Matroska has a duration alone
    assert [frame.index for frame in frames] == list(range(12))
    assert [frame.time for frame in frames] == [Fraction(index, 25) for index in range(12)]
    for frame, image in zip(frames, images, strict=True):
        assert np.array_equal(frame.image, image)
        assert frame.image.flags.c_contiguous


def test_what_is_chosen_begins_at_0(tmp_path):
    path = write_clip(tmp_path / "a.mkv", pictures(12), codec="ffv1")
    frames = frames_of(path, Selection(4, 11, 3))
    assert [(frame.index, frame.time) for frame in frames] == [(4, 0), (7, Fraction(3, 25)), (10, Fraction(6, 25))]
    assert np.array_equal(frames[1].image, pictures(12)[7])


def test_a_turned_clip_is_upright(tmp_path):
    """A picture of four colours, far from each other: compression does not matter."""
    image = np.zeros((64, 96, 3), np.uint8)
    image[:32, :48], image[:32, 48:], image[32:, :48], image[32:, 48:] = 0, 90, 170, 255
    path = write_clip(tmp_path / "a.mp4", [image] * 3)
    turn(path)
    with Clip(str(path)) as clip:
        frame = next(clip.frames(Selection()))
    expected = np.rot90(image, -1)  # clockwise
    assert frame.image.shape == expected.shape
    assert np.abs(frame.image.astype(int) - expected).max() < 20
    assert frame.image.flags.c_contiguous


def test_pixels_that_are_not_square_turn_along(tmp_path):
    path = write_clip(tmp_path / "a.mp4", pictures(3), aspect=Fraction(4, 3))
    with Clip(str(path)) as clip:
        list(clip.frames(Selection()))
        assert clip.aspect == Fraction(4, 3)
    turn(path)
    with Clip(str(path)) as clip:
        list(clip.frames(Selection()))
        assert clip.aspect == Fraction(3, 4)


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_damaged_frames_are_counted_and_skipped(codec, tmp_path):
    """What is left is what an undamaged clip has there, up to the first damage: later frames are made from it."""
    path = write_clip(tmp_path / "a.mp4", pictures(40), codec=codec, options={"g": "10", "bf": "0"})
    whole = read_frames(path)
    damage(path, [12, 25])
    with Clip(str(path)) as clip:
        frames = list(clip.frames(Selection()))
        assert clip.damaged == 2
        assert clip.damage in ("its data is damaged", "Invalid data found when processing input")
    times = [frame.time * 25 for frame in frames]
    assert not {12, 25} & set(times)
    assert times == sorted(times)
    assert times[:12] == list(range(12))
    assert set(range(30, 40)) <= set(times)  # a new group of pictures
    for frame in frames[:10]:
        assert np.array_equal(frame.image, whole[frame.index])


def test_an_address_is_read(server, tmp_path):
    images = pictures(6)
    write_clip(tmp_path / "a.mkv", images, codec="ffv1")
    address, asked = server
    frames = frames_of(f"{address}/a.mkv")
    assert all(np.array_equal(frame.image, image) for frame, image in zip(frames, images, strict=True))
    assert set(asked) == {"/a.mkv"}
    with pytest.raises(ImageError, match=r"missing\.mp4: cannot be read as a video: .*404"):
        Clip(f"{address}/missing.mp4")
    with pytest.raises(ImageError, match="Connection refused"):
        Clip("http://127.0.0.1:9/a.mp4")


def test_an_address_that_is_silent_has_ended(monkeypatch):
    monkeypatch.setattr("agln_fast.video.clip._PATIENCE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ImageError, match="cannot be read as a video"):
        Clip(f"http://127.0.0.1:{silent.getsockname()[1]}/a.mp4")


def test_a_connection_that_breaks_ends_the_video(tmp_path):
    """The server promises twice of what it sends."""
    content = write_clip(tmp_path / "a.mkv", pictures(12), codec="ffv1").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(2 * len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        try:
            with Clip(f"http://127.0.0.1:{served.server_port}/a.mkv") as clip:
                assert len(list(clip.frames(Selection()))) == 12
                assert clip.broken is not None
        finally:
            served.shutdown()
            thread.join()


def test_a_file_leads_to_no_address_and_an_address_to_no_file(server, tmp_path):
    """A playlist under the name of a video, as somebody may have sent it."""
    address, asked = server
    local = write_clip(tmp_path / "a.ts", pictures(6))
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"
    (tmp_path / "sent.mp4").write_text(playlist.format(f"{address}/a.ts"))
    (tmp_path / "sent.m3u8").write_text(playlist.format(f"{address}/a.ts"))
    (tmp_path / "served.m3u8").write_text(playlist.format(f"file:{local}"))
    for name in ("sent.mp4", "sent.m3u8"):
        with pytest.raises(ImageError):
            frames_of(tmp_path / name)
    assert asked == []
    with pytest.raises(ImageError):
        frames_of(f"{address}/served.m3u8")
    assert len(frames_of(f"{address}/sent.m3u8")) == 6


def test_what_is_no_video(tmp_path):
    import av

    write_clip(tmp_path / "a.mp4", pictures(5), sound=True)
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:-2000])  # its index stood at the end
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    with av.open(str(tmp_path / "a.mp4")) as source, av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    for name in ("cut.mp4", "empty.mp4", "text.mp4"):
        with pytest.raises(ImageError, match=f"{name}: cannot be read as a video: "):
            Clip(str(tmp_path / name))
    with pytest.raises(ImageError, match=r"sound\.mp4: has no video; it has audio"):
        Clip(str(tmp_path / "sound.mp4"))
    with pytest.raises(ImageError, match=r"b\.mp4: no such file; did you mean 'a\.mp4'"):
        Clip(str(tmp_path / "b.mp4"))
    with pytest.raises(ImageError, match="is a folder; needs a video"):
        Clip(str(tmp_path))
    with pytest.raises(ImageError, match="/dev/video97: cannot be read as a video: No such file"):
        Clip("/dev/video97")
    with pytest.raises(ImageError, match="cannot be read as a video"):
        Clip("dshow:video=none")


def test_a_file_that_was_cut_off_says_so(tmp_path):
    path = write_clip(tmp_path / "a.mp4", pictures(40), options={"g": "10"})
    import av

    with av.open(str(path)) as source, av.open(str(tmp_path / "b.mp4"), "w", options={"movflags": "+faststart"}) as to:
        stream = to.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                to.mux(packet)
    content = (tmp_path / "b.mp4").read_bytes()
    for name, share, broken in (("b.mp4", 1, False), ("cut.mp4", 2, True)):
        (tmp_path / name).write_bytes(content[: len(content) // share])
        with Clip(str(tmp_path / name)) as clip:
            frames = list(clip.frames(Selection()))
            assert (clip.broken is not None) == broken
            assert broken == (len(frames) < 40)
    assert "of its 40 frames" in clip.broken


def test_a_camera_is_live_and_ends_when_it_is_told_to():
    """FFmpeg's test picture stands for a camera: it has no end."""
    with Clip("lavfi:testsrc=size=64x48:rate=10") as camera:
        assert camera.total is None
        frames = camera.frames(Selection(seconds=1))
        assert [frame.time for frame in frames] == [Fraction(index, 10) for index in range(10)]
    with Clip("lavfi:testsrc=size=64x48:rate=10") as camera:
        frames = camera.frames(Selection())
        assert next(frames).image.shape == (48, 64, 3)
        camera.stop()
        assert len(list(frames)) <= 1


def test_full_range_is_read_as_such(tmp_path):
    """White is 235 in most videos, and 255 in those of phones and webcams."""
    import av

    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        video = container.add_stream("ffv1", rate=25)
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        video.codec_context.color_range = 2
        frame = av.VideoFrame.from_ndarray(
            np.concatenate([np.full((32, 32), 235), np.full((16, 32), 128)]).astype(np.uint8), "yuv420p"
        )
        frame.color_range = 2
        container.mux(video.encode(frame))
        container.mux(video.encode(None))
    (frame,) = frames_of(path)
    assert np.abs(frame.image.astype(int) - 235).max() <= 1


NAMES = {
    "clip.mp4": (True, False),
    "CLIP.MOV": (True, False),
    "/dev/video0": (True, True),
    "v4l2:/dev/video0": (True, True),
    "rtsp://host/stream": (True, True),
    "http://host/clip": (True, False),
    "photo.png": (False, False),
    "folder": (False, False),
    "a:b": (False, False),
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_names_of_videos(name, expected):
    assert (is_clip(name), is_live(name)) == expected
