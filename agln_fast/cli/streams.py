"""Standard streams that no full disk, closed pipe, missing stream or narrow encoding can break the work with."""

from __future__ import annotations

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

__all__ = ["Stream", "open_streams"]


class Stream(io.FileIO):
    """A file descriptor that notes why it cannot be written, and swallows the rest.

    What was computed is worth more than what is said about it: a build goes on when its reader has gone. Who raised at
    the first failed write would raise inside some library, and again when Python flushes at its end.
    """

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Number of bytes written or swallowed."""
        if self.failure is None:
            try:
                while (written := super().write(data)) is None:  # the descriptor does not wait, so it is waited for
                    select.select((), (self,), ())
                return written
            except OSError as error:
                self.failure = error
        return len(data)


def open_streams() -> Stream:
    """Make `sys.stdout` and `sys.stderr` such streams, whose characters are replaced where the encoding has none.

    Returns standard output, for its `failure`. Streams that somebody else has put there already stay as they are.
    """
    _fill_missing()
    out, err = Stream(1, "w", closefd=False), Stream(2, "w", closefd=False)
    if sys.stdout in (None, sys.__stdout__):
        sys.stdout = _text(out, sys.stdout, "replace")
    if sys.stderr in (None, sys.__stderr__):
        sys.stderr = _text(err, sys.stderr, "backslashreplace")
    return out


def _fill_missing() -> None:
    """Open the null device where a descriptor of the three is closed: else the next file opened would get its number,
    and what a library prints would end in a bundle.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _text(raw: Stream, before: TextIO | None, errors: str) -> io.TextIOWrapper:
    encoding, given = getattr(before, "encoding", None) or "utf-8", getattr(before, "errors", None) or "strict"
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=encoding,
        errors=errors if given == "strict" else given,
        line_buffering=raw.isatty() or raw.fileno() == 2,
    )
