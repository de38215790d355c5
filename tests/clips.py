"""Small clips, written here by PyAV alone."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

RATE = 25
HERTZ = 48_000


def pictures(count: int, height: int = 64, width: int = 96) -> list[np.ndarray]:
    """Blocks of 8x8 pixels in red, green and blue, other ones in each: the double engine's labels are 0, 1 and 2."""
    rng = np.random.default_rng(count)
    blocks = rng.integers(0, 3, (count, -(-height // 8), -(-width // 8)))
    colours = np.array([[220, 40, 30], [30, 200, 50], [40, 20, 230]], np.uint8)
    return [colours[np.kron(one, np.ones((8, 8), int))[:height, :width]] for one in blocks]


def labels(picture: np.ndarray) -> np.ndarray:
    """What the double engine says of it: the strongest colour."""
    return picture.argmax(2)


def write_clip(
    path: Path,
    images: Sequence[np.ndarray],
    *,
    codec: str = "libx264",
    times: Sequence[int] | None = None,
    sound: bool = False,
    options: dict[str, str] | None = None,
    aspect: Fraction | None = None,
    matrix: int | None = None,
) -> Path:
    """times: of the frames, ms; sound: a sine in AAC, as long as the frames. "ffv1" keeps each pixel."""
    import av

    height, width = images[0].shape[:2]
    times = times or [round(1000 * index / RATE) for index in range(len(images))]
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=RATE, options=options or {})
        video.width, video.height = width, height
        video.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        video.time_base = video.codec_context.time_base = Fraction(1, 1000)
        if aspect is not None:
            video.codec_context.sample_aspect_ratio = aspect
        if matrix is not None:
            video.codec_context.colorspace = matrix
        if sound:
            voice = container.add_stream("aac", rate=HERTZ, layout="mono")
        spoken = 0
        for image, time in zip(images, times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image))
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            if matrix is not None:
                frame.colorspace = matrix
            container.mux(video.encode(frame))
            while sound and spoken * 1000 < time * HERTZ:
                wave = np.sin(np.arange(spoken, spoken + 1024) * (440 * 2 * np.pi / HERTZ)).astype(np.float32)
                samples = av.AudioFrame.from_ndarray(wave[None] / 4, "fltp", "mono")
                samples.sample_rate, samples.pts, samples.time_base = HERTZ, spoken, Fraction(1, HERTZ)
                container.mux(voice.encode(samples))
                spoken += 1024
        container.mux(video.encode(None))
        if sound:
            container.mux(voice.encode(None))
    return path


def read_frames(path: Path, pixels: str = "rgb24") -> list[np.ndarray]:
    """All frames, as PyAV gives them."""
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format=pixels) for frame in container.decode(video=0)]


def read_times(path: Path) -> list[Fraction]:
    """When each frame is shown, s."""
    import av

    with av.open(str(path)) as container:
        return [frame.pts * frame.time_base for frame in container.decode(video=0)]


def read_sound(path: Path) -> list[tuple[bytes, Fraction]]:
    """Packets of the first audio stream, and their times, s."""
    import av

    with av.open(str(path)) as container:
        packets = container.demux(audio=0)
        return [(bytes(packet), packet.pts * packet.time_base) for packet in packets if packet.size]


def damage(path: Path, numbers: Sequence[int]) -> None:
    """Overwrite the inside of these video packets of an MP4 file."""
    import av

    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(1)
    for number in numbers:
        start, size = places[number]
        content[start + 6 : start + size - 4] = rng.integers(0, 256, size - 10, np.uint8).tobytes()
    path.write_bytes(content)


def turn(path: Path) -> None:
    """Have an MP4 file be shown turned by 90 degrees clockwise: x' = -y, y' = x (ISO/IEC 14496-12, 8.3.2)."""
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # version 0: behind times, track, duration, layer, volume
    matrix = np.array([[0, 1 << 16, 0], [-(1 << 16), 0, 0], [0, 0, 1 << 30]], ">i4")
    content[start : start + 36] = matrix.tobytes()
    path.write_bytes(content)
