"""Pickles made by hand, and the files of PyTorch around them: what no library would write, but anybody can."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping

__all__ = ["archive", "call", "dictionary", "legacy", "name", "number", "pickled", "text", "together"]


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    """The object `module.attribute`."""
    return f"c{module}\n{attribute}\n".encode()


def together(*items: bytes) -> bytes:
    """A tuple."""
    return b"(" + b"".join(items) + b"t"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + together(*arguments) + b"R"


def dictionary(items: Mapping[str, bytes]) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def pickled(value: bytes) -> bytes:
    return b"\x80\x02" + value + b"."


def archive(value: bytes, records: Mapping[str, bytes] = {}, compression: int = zipfile.ZIP_STORED) -> bytes:
    """A `.pth` file that holds `value`, a pickle's body, and `records` by name ("data/0")."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as opened:
        for key, data in {"data.pkl": pickled(value), "version": b"3\n", **records}.items():
            opened.writestr(f"archive/{key}", data)
    return file.getvalue()


def legacy(value: bytes) -> bytes:
    """The same as PyTorch before 1.6 wrote it; with no record."""
    start = (number(0x1950A86A20F9469CFC6C), number(1001), b"}")
    return b"".join(map(pickled, (*start, value, b"]")))
