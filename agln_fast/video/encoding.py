"""Which encoder writes a video, and how well."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agln_fast.errors import ConfigError, did_you_mean, printable
from agln_fast.video.library import library

__all__ = ["CONTAINERS", "Encoding", "choose_encoding", "lossless"]

CONTAINERS = {".m4v": "mp4", ".mkv": "matroska", ".mov": "mov", ".mp4": "mp4", ".webm": "webm"}
"""FFmpeg's name of the container, by suffix."""

_PREFERRED = {".webm": ("libvpx-vp9", "libvpx")}
_USUAL = ("libx264", "mpeg4")
_CRF = {"libx264": 20, "libx265": 24, "libvpx-vp9": 31, "libvpx": 10, "libaom-av1": 30, "libsvtav1": 30}
_BESIDE = {  # with a rate the factor would only bound it; x265 talks
    **{codec: {"b": "0"} for codec in ("libvpx-vp9", "libvpx", "libaom-av1")},
    "libx265": {"x265-params": "log-level=none"},
}
_QUALITY = 3  # of mpeg4: 1 to 31, 1 is best
_LAMBDA = 118  # FFmpeg's unit of it


@dataclass(frozen=True)
class Encoding:
    """codec: FFmpeg's name of an encoder. pixels: its format of pixels. options: the encoder's own."""

    codec: str
    pixels: str = "yuv420p"
    options: dict[str, str] = field(default_factory=dict)

    @property
    def needs_even_sides(self) -> bool:
        """Whether 2x2 pixels share a colour."""
        return "420" in self.pixels


def lossless(classes: int) -> Encoding:
    """FFV1 of grey pixels, which are the ids of so many classes."""
    return Encoding("ffv1", "gray" if classes <= 256 else "gray16le")


def choose_encoding(path: Path, codec: str | None = None, crf: int | None = None) -> Encoding:
    """For a file of that suffix.

    Args:
        path: the video.
        codec: FFmpeg's name of an encoder; None for libx264 (for .webm libvpx-vp9), or mpeg4 where that is missing.
        crf: constant rate factor, 0 is best; None for a good one of each encoder, e.g. 20 of libx264.

    Raises:
        ConfigError: an unknown suffix or encoder, or one that has no such factor.
        MissingPackageError: PyAV is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in CONTAINERS:
        raise ConfigError(f"{path}: suffix {suffix!r} is none for videos: use {', '.join(CONTAINERS)}")
    known = _encoder(codec) if codec is not None else None
    if codec is None:
        known = next(filter(None, map(_encoder, _PREFERRED.get(suffix, _USUAL))), None)
    if known is None:
        asked, names = codec or "", sorted(name for name in library().codecs_available if _encoder(name))
        hint = did_you_mean(asked, names) or ";"
        raise ConfigError(f"unknown codec {printable(repr(asked))}{hint} needs a video encoder of FFmpeg")
    formats = [each.name for each in known.video_formats or ()]
    pixels = "yuv420p" if "yuv420p" in formats or not formats else formats[0]
    if crf is None and known.name == "mpeg4":
        return Encoding(known.name, pixels, {"flags": "+qscale", "global_quality": str(_QUALITY * _LAMBDA)})
    if crf is None and known.name not in _CRF:
        return Encoding(known.name, pixels)
    if known.name not in _CRF:
        raise ConfigError(f"crf {crf}: codec {known.name} has none; those have: {', '.join(_CRF)}")
    factor = str(_CRF[known.name] if crf is None else crf)
    return Encoding(known.name, pixels, {"crf": factor, **_BESIDE.get(known.name, {})})


def _encoder(name: str) -> Any:
    """PyAV's codec, None where FFmpeg has no video encoder of that name."""
    av = library()
    try:
        known = av.Codec(name, "w")
    except ValueError:
        return None
    return known if known.type == "video" else None
