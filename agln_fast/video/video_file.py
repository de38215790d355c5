"""A video on the disk: pictures encoded, sound copied, times kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agln_fast.errors import ConfigError, ImageError
from agln_fast.files import replacing
from agln_fast.video.encoding import CONTAINERS, Encoding
from agln_fast.video.library import library, reason
from agln_fast.video.source import Frame, Source

__all__ = ["VideoFile", "open_video_file"]

_MPEG4_TICKS = 60_000  # a second: its standard allows 65535, and this is a multiple of common rates


@contextmanager
def open_video_file(path: Path, encoding: Encoding, source: Source, *, sound: bool = False) -> Iterator[VideoFile]:
    """A video that appears at `path` at the end of the block, or not at all when anything fails.

    Args:
        path: its suffix decides the container.
        encoding: of the pictures.
        source: what it is made from: rate, times and colours are those.
        sound: whether it is copied, as far as the container takes it.

    Raises:
        ImageError: it cannot be written.
    """
    with replacing(path, ImageError) as part:
        file = VideoFile(part, path, encoding, source, sound)
        try:
            yield file
            file.finish()
        finally:
            file.discard()


class VideoFile:
    """What `open_video_file` gives: the first picture decides the size.

    left_out: streams of sound that the container does not take, known from the first picture on.
    """

    def __init__(self, part: Path, path: Path, encoding: Encoding, source: Source, sound: bool) -> None:
        self._path, self._encoding, self._source, self._av = path, encoding, source, library()
        self._container = self._av.open(str(part), "w", format=CONTAINERS[path.suffix.lower()])
        self._video: Any = None
        self._sound: dict[int, Any] = {}
        self._with_sound = sound
        self.left_out: list[str] = []

    def write(self, picture: npt.NDArray[Any], frame: Frame) -> None:
        """A picture at the time of `frame`, and the sound that came with it.

        Args:
            picture: (H, W, 3) uint8 RGB, or (H, W) uint8 or uint16 of labels.
            frame: as above.

        Raises:
            ConfigError: container, codec and size do not go together.
            ImageError, OSError: it cannot be written.
        """
        colour = picture.ndim == 3
        with self._told():
            if self._video is None:
                self._begin(picture.shape[0], picture.shape[1], colour)
            pixels = "rgb24" if colour else "gray" if picture.dtype == np.uint8 else "gray16le"
            image = self._av.VideoFrame.from_ndarray(self._fitting(picture), pixels)
            if colour:
                image.colorspace = self._source.colours.matrix
            base = self._video.codec_context.time_base
            image.pts, image.time_base = math.floor(frame.time / base), base
            image.duration = math.floor(frame.duration / base)
            self._container.mux(self._video.encode(image))
        self.write_sound(frame.sound)

    def write_sound(self, packets: Sequence[Any]) -> None:
        """Packets of the source's audio, as they are. Raises as `write` does."""
        with self._told():
            for packet in packets:
                if packet.stream.index in self._sound:
                    packet.stream = self._sound[packet.stream.index]
                    self._container.mux(packet)

    def finish(self) -> None:
        """Write what the encoder still has, and the end of the file. Raises as `write` does."""
        if self._sound:
            self.write_sound(self._source.last_sound())
        with self._told():
            self._container.mux(self._video.encode(None))
            self._container.close()

    def discard(self) -> None:
        """Close what is not finished; nothing, where it is."""
        with suppress(self._av.FFmpegError):
            self._container.close()

    def _begin(self, height: int, width: int, colour: bool) -> None:
        source, encoding = self._source, self._encoding
        try:
            video = self._container.add_stream(encoding.codec, source.rate or 25, dict(encoding.options))
        except ValueError as error:  # the container does not take it
            raise ConfigError(f"{self._path}: {error}; choose another codec, or another suffix") from None
        context = video.codec_context
        video.width, video.height, video.pix_fmt = width, height, encoding.pixels
        if encoding.needs_even_sides:
            video.width, video.height = width + width % 2, height + height % 2
        base = source.time_base
        if encoding.codec == "mpeg4" and (base.numerator > 1 or base.denominator > _MPEG4_TICKS):
            base = Fraction(1, _MPEG4_TICKS)
        video.time_base = context.time_base = base
        if source.aspect is not None:
            context.sample_aspect_ratio = source.aspect
        if colour:
            context.colorspace = source.colours.matrix
            context.color_primaries, context.color_trc = source.colours.primaries, source.colours.transfer
        try:
            context.open()
        except (self._av.FFmpegError, ValueError) as error:
            size = f"{video.width}x{video.height} pixels"
            raise ConfigError(f"codec {encoding.codec}: cannot be used for {size} ({reason(error)})") from None
        self._video = video
        for audio in self._source.audio if self._with_sound else ():
            try:
                self._sound[audio.index] = self._container.add_stream_from_template(audio)
            except ValueError:
                self.left_out.append(f"{audio.codec_context.name} audio cannot be copied into {self._path.suffix}")

    def _fitting(self, picture: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """With the last row or column once more where a side is odd and must not be."""
        height, width = picture.shape[:2]
        if not self._encoding.needs_even_sides or not (height % 2 or width % 2):
            return picture
        return np.pad(picture, [(0, height % 2), (0, width % 2), *[(0, 0)] * (picture.ndim - 2)], "edge")

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError:  # has a number, and `replacing` words it
            raise
        except self._av.FFmpegError as error:
            raise ImageError(f"{self._path}: cannot be written ({reason(error)})") from None
