"""Frames of whatever FFmpeg reads: a file, a camera, an address."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from agln_fast.errors import ImageError, did_you_mean, printable
from agln_fast.runtime.images import ImageArray
from agln_fast.video.library import library, reason
from agln_fast.video.selection import Selection
from agln_fast.video.source import Colours, Frame, Source

__all__ = ["Clip", "is_clip", "is_live"]

_DEVICES = ("avfoundation", "dshow", "fbdev", "gdigrab", "kmsgrab", "lavfi", "v4l2", "vfwcap", "x11grab")
_CAMERA = re.compile(r"/dev/video\d+")
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_SUFFIXES = {
    *(".3gp", ".264", ".265", ".asf", ".avi", ".flv", ".h264", ".h265", ".hevc", ".ivf", ".m2ts", ".m4v", ".mjpeg"),
    *(".mjpg", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m"),
}
_PATIENCE_S = 10  # with an address that does not answer, or falls silent


class Clip(Source):
    """A video, by PyAV.

    FFmpeg lets a file, such as a playlist, lead to no address, and an address to no file.

    Raises:
        ImageError: it is missing, cannot be read, or has no video.
        MissingPackageError: PyAV is not installed.
    """

    def __init__(self, address: str) -> None:
        super().__init__()
        self.name, self._av = printable(address), library()
        self._container = self._open(address)
        try:
            self._stream = self._video()
        except ImageError:
            self._container.close()
            raise
        stream = self._stream
        stream.thread_type = "AUTO"
        self.audio = tuple(each for each in self._container.streams.audio if each.codec_context is not None)
        self.rate = stream.average_rate or stream.guessed_rate
        self.time_base = stream.time_base
        length = stream.duration * stream.time_base if stream.duration else _seconds(self._container.duration)
        self.total = stream.frames or (math.ceil(length * self.rate) if length and self.rate else None)
        self._live, self._sound, self._origin = is_live(address), list[Any](), Fraction(0)

    def _open(self, address: str) -> Any:
        try:
            if camera := _camera(address):
                device, name = camera
                return self._av.open(name, format=device, timeout=_PATIENCE_S)
            if _ADDRESS.match(address):
                return self._av.open(address, timeout=_PATIENCE_S)
            if os.path.isdir(address):
                raise ImageError(f"{self.name}: is a folder; needs a video")
            if not os.path.exists(address):
                path = Path(address)
                near = did_you_mean(path.name, (file.name for file in path.parent.glob("*")))
                raise ImageError(f"{self.name}: no such file{near}")
            return self._av.open(f"file:{address}")  # whatever colons it has
        except self._av.FFmpegError as error:
            raise ImageError(f"{self.name}: cannot be read as a video: {reason(error)}") from None
        except ValueError as error:  # a format that this build of FFmpeg has not
            raise ImageError(f"{self.name}: cannot be read as a video: {error}") from None

    def _video(self) -> Any:
        """The video stream that FFmpeg takes for the best; the cover of an album is none."""
        cover = self._av.stream.Disposition.attached_pic
        streams = [each for each in self._container.streams.video if not each.disposition & cover]
        if not streams:
            kinds = ", ".join(sorted({each.type for each in self._container.streams})) or "nothing"
            raise ImageError(f"{self.name}: has no video; it has {kinds}")
        best = self._container.streams.best("video")
        stream = best if best in streams else streams[0]
        if stream.codec_context is None:
            raise ImageError(f"{self.name}: this FFmpeg has no decoder of its video")
        return stream

    def frames(self, selection: Selection) -> Iterator[Frame]:
        wanted, started, last, size = selection.chooser(), False, None, None
        for index, frame in enumerate(self._decoded()):
            last = time = self._time(frame, last)
            take = wanted(index, time)
            if take is None:
                self._read_sound(until=time)
                return
            if not take:
                continue
            if not started:
                started = True
                starts = _seconds(self._container.start_time)
                cut = self._live or selection.start > 0 or starts is None
                self._origin = time if cut or starts is None else min(starts, time)
                self.aspect = _aspect(self._stream.sample_aspect_ratio, frame.rotation)
                self.colours = Colours(frame.colorspace, frame.color_primaries, frame.color_trc)
                size = frame.width, frame.height
            duration = (frame.duration or 0) * frame.time_base
            yield Frame(self._upright(frame, size), index, time - self._origin, duration, self._take_sound(until=time))

    def last_sound(self) -> tuple[Any, ...]:
        return self._take_sound()

    def close(self) -> None:
        super().close()
        self._container.close()

    def _decoded(self) -> Iterator[Any]:
        """Sound goes aside."""
        packets, end = 0, Fraction(0)
        try:
            for packet in self._container.demux(self._stream, *self.audio):
                if self._stopped.is_set():
                    return
                if packet.stream is not self._stream:
                    self._keep(packet)
                    continue
                if packet.pts is not None:
                    packets, end = packets + 1, max(end, packet.pts * packet.time_base)
                yield from self._whole_frames(packet)
            self.broken = self._shortfall(packets, end)
        except self._av.FFmpegError as error:
            self.broken = reason(error)
            yield from self._whole_frames(None)

    def _whole_frames(self, packet: Any) -> Iterator[Any]:
        """What the decoder makes of a packet, or has held back until the last."""
        try:
            decoded = self._stream.decode(packet)
        except self._av.FFmpegError as error:
            self._skip(reason(error))
            return
        for frame in decoded:
            frame.time_base = frame.time_base or self.time_base  # the last ones have none
            if frame.is_corrupt:
                self._skip("its data is damaged")
            else:
                yield frame

    def _shortfall(self, packets: int, end: Fraction) -> str | None:
        """How a file that was cut off ends: with fewer frames than its header counts, and before its time.

        One that was trimmed by its header has fewer frames, too, and ends in time.
        """
        stream = self._stream
        if not stream.frames or packets >= stream.frames or not stream.duration or not self.rate:
            return None
        announced = ((stream.start_time or 0) + stream.duration) * stream.time_base
        return f"the file has {packets} of its {stream.frames} frames" if end + 2 / self.rate < announced else None

    def _time(self, frame: Any, last: Fraction | None) -> Fraction:
        """When it is shown, s; later than `last`, that of the frame before it, also where the source says nothing."""
        if frame.pts is not None:
            time: Fraction = frame.pts * frame.time_base
        elif last is None:
            return Fraction(0)
        else:
            time = last + 1 / (self.rate or Fraction(25))
        return time if last is None or time > last else last + self.time_base

    def _upright(self, frame: Any, size: Any) -> ImageArray:
        """Turned as its metadata says; one of another size than the first, as cameras send them, is scaled to that."""
        width, height = size
        rgb = frame.reformat(width, height, "rgb24").to_ndarray()
        image: ImageArray = np.rot90(rgb, round(frame.rotation / 90))
        return np.ascontiguousarray(image)

    def _keep(self, packet: Any) -> None:
        if packet.pts is not None:  # what ends a stream has none
            self._sound.append(packet)

    def _read_sound(self, until: Fraction) -> None:
        """Up to a time of the source, s. It may lie behind the picture that it belongs to."""
        waited = set() if self._live else set(self.audio)
        try:
            for packet in self._container.demux(*self.audio) if waited else ():
                if packet.pts is None or packet.pts * packet.time_base >= until:
                    waited.discard(packet.stream)
                    if not waited:
                        break
                else:
                    self._keep(packet)
        except self._av.FFmpegError as error:
            self.broken = reason(error)
        self._sound = [packet for packet in self._sound if packet.pts * packet.time_base < until]

    def _take_sound(self, until: Fraction | None = None) -> tuple[Any, ...]:
        """What has been set aside, up to a time of the source, in the output's time; not what ends before it begins."""
        taken, kept = [], []
        for packet in self._sound:
            if until is not None and packet.pts * packet.time_base > until:
                kept.append(packet)  # it came with frames that the decoder still holds back
                continue
            shift = math.floor(self._origin / packet.time_base)
            if self._origin <= 0 or packet.pts + (packet.duration or 0) > shift:
                packet.pts -= shift
                packet.dts = packet.pts if packet.dts is None else packet.dts - shift
                taken.append(packet)
        self._sound = kept
        return tuple(taken)


def is_clip(name: str) -> bool:
    """Whether a name is one of a video: a file by its suffix, a camera, an address."""
    return _camera(name) is not None or bool(_ADDRESS.match(name)) or Path(name).suffix.lower() in _SUFFIXES


def is_live(address: str) -> bool:
    """Whether it is a camera, or a stream by a protocol that knows no end."""
    scheme = _ADDRESS.match(address)
    return _camera(address) is not None or (scheme is not None and scheme[1].lower() not in ("http", "https", "ftp"))


def _camera(address: str) -> tuple[str, str] | None:
    """FFmpeg's name of the kind of device, and its name of the device: `/dev/video0`, `v4l2:/dev/video0`."""
    if _CAMERA.fullmatch(address):
        return "v4l2", address
    device, colon, name = address.partition(":")
    return (device, name) if colon and device in _DEVICES else None


def _seconds(microseconds: int | None) -> Fraction | None:
    """FFmpeg's times of a whole file."""
    return None if microseconds is None else Fraction(microseconds, 1_000_000)


def _aspect(aspect: Fraction | None, rotation: int) -> Fraction | None:
    if not aspect or aspect == 1:
        return None
    return 1 / aspect if round(rotation / 90) % 2 else aspect
