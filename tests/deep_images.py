"""Image files of more than 8 bits a sample, written by hand: Pillow writes few of them."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

GREY, RGB, GREY_ALPHA, RGB_ALPHA = 0, 2, 4, 6  # PNG colour types
CHANNELS = {GREY: 1, RGB: 3, GREY_ALPHA: 2, RGB_ALPHA: 4}


def png(values: np.ndarray[Any, Any], colour_type: int = GREY, significant: tuple[int, ...] = ()) -> bytes:
    """A PNG of 16-bit samples (H, W, C), with a chunk sBIT of `significant`. Pillow writes none for colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    declared = chunk(b"gAMA", struct.pack(">I", 45455)) + (chunk(b"sBIT", bytes(significant)) if significant else b"")
    return b"\x89PNG\r\n\x1a\n" + header + declared + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def tiff(
    values: np.ndarray[Any, Any],
    bits: int = 16,
    order: str = "<",
    *,
    largest: int | None = None,
    packed: bytes = b"",
    planar: bool = False,
) -> bytes:
    """An uncompressed TIFF of grey, RGB or CMYK (H, W, C).

    largest: its MaxSampleValue; packed: what it holds instead of `values`; planar: whether each colour has a plane.
    """
    height, width, channels = values.shape
    planes = np.ascontiguousarray(values.transpose(2, 0, 1)) if planar else values
    data = packed or planes.astype(f"{order}u{-(-bits // 8)}").tobytes()
    strips = channels if planar else 1
    size = len(data) // strips
    tags = [
        (256, 3, [width]), (257, 3, [height]), (258, 3, [bits] * channels), (259, 3, [1]),
        (262, 3, [{1: 1, 3: 2, 4: 5}[channels]]), (273, 4, [8 + strip * size for strip in range(strips)]),
        (277, 3, [channels]), (278, 3, [height]), (279, 4, [size] * strips),
    ]  # fmt: skip
    if largest is not None:
        tags.append((281, 3, [largest] * channels))
    if planar:
        tags.append((284, 3, [2]))
    start = 8 + len(data) + len(data) % 2
    entries, extra = b"", b""
    for tag, kind, numbers in tags:
        packed_numbers = b"".join(struct.pack(order + ("H" if kind == 3 else "I"), number) for number in numbers)
        if len(packed_numbers) > 4:
            offset = start + 2 + 12 * len(tags) + 4 + len(extra)
            extra += packed_numbers
            packed_numbers = struct.pack(order + "I", offset)
        entries += struct.pack(order + "HHI", tag, kind, len(numbers)) + packed_numbers.ljust(4, b"\0")
    directory = struct.pack(order + "H", len(tags)) + entries + struct.pack(order + "I", 0) + extra
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(order + "I", start) + data.ljust(start - 8, b"\0") + directory


def pnm(values: np.ndarray[Any, Any], maxval: int) -> bytes:
    """A binary PGM or PPM of 16-bit samples (H, W, 1 or 3)."""
    kind = b"P6" if values.shape[2] == 3 else b"P5"
    return b"%s %d %d %d\n" % (kind, values.shape[1], values.shape[0], maxval) + values.astype(">u2").tobytes()
