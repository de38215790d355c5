"""Pictures of a sequence as the frames of a video."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

from agln_fast.errors import ImageError
from agln_fast.runtime.images import load_image
from agln_fast.video.selection import Selection
from agln_fast.video.source import Frame, Source

__all__ = ["Pictures", "is_numbered", "is_pattern", "list_numbered", "numbered"]

_NUMBER = re.compile(r"%(?:0?(\d{1,2}))?d")  # the place of a number in a name, as printf and FFmpeg write it


class Pictures(Source):
    """Image files, shown one after the other, `rate` a second. The first gives the size."""

    def __init__(self, files: Sequence[Path], rate: Fraction, name: str, bit_depth: int | None = None) -> None:
        super().__init__()
        self.name, self.rate, self.total, self.time_base = name, rate, len(files), 1 / rate
        self.files, self._bit_depth = files, bit_depth

    def frames(self, selection: Selection) -> Iterator[Frame]:
        wanted, began, size = selection.chooser(), None, None
        for index, file in enumerate(self.files):
            take = wanted(index, time := index * self.time_base)
            if take is None or self._stopped.is_set():
                return
            if not take:
                continue
            began = time if began is None else began
            try:
                image = load_image(file, bit_depth=self._bit_depth)
            except ImageError as error:
                self._skip(str(error))
                continue
            height, width, _ = image.shape
            size = size or (height, width)
            if (height, width) != size:
                raise ImageError(
                    f"{file}: has {width}x{height} pixels, those before it {size[1]}x{size[0]}; the pictures of a "
                    "video have one size"
                )
            yield Frame(image, index, time - began, self.time_base)


def is_numbered(path: Path) -> bool:
    """Whether the name has a place for a number."""
    return _NUMBER.search(path.name) is not None


def is_pattern(name: str) -> bool:
    """Whether it stands for files with numbers, such as `frames/%05d.png`, and is not itself one."""
    return is_numbered(Path(name)) and "://" not in name and not os.path.exists(name)


def numbered(pattern: Path, number: int) -> Path:
    """The name with that number in its place."""
    return pattern.with_name(_NUMBER.sub(lambda place: place[0] % number, pattern.name, count=1))


def list_numbered(pattern: str) -> list[Path]:
    """The files whose names have a number where `pattern`, such as `frames/%05d.png`, has its place; by that number.

    Raises:
        ImageError: there is none.
    """
    path = Path(pattern)
    place = _NUMBER.search(path.name)
    assert place is not None
    before, after = map(re.escape, (path.name[: place.start()], path.name[place.end() :]))
    name = re.compile(rf"{before}(\d{{{place[1] or 1},}}){after}")
    try:
        matches = [match for file in path.parent.iterdir() if (match := name.fullmatch(file.name))]
    except OSError as error:
        raise ImageError(f"{pattern}: {path.parent} cannot be read ({error.strerror})") from None
    if not matches:
        raise ImageError(f"{pattern}: no file of such a name; {place[0]} stands for a number")
    return [path.with_name(match.string) for match in sorted(matches, key=lambda match: (int(match[1]), match.string))]
