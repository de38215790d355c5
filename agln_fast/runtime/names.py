"""Names for what is written, one for each image."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path, PurePosixPath

__all__ = ["output_names", "telling_ends"]


def telling_ends(paths: Sequence[Path]) -> list[str]:
    """For each path its shortest end, in whole names, that none of the others has."""
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    lengths = [1] * len(parts)
    while True:
        ends = ["/".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        counts = Counter(ends)
        longer = [
            min(len(part), length + (counts[end] > 1)) for part, length, end in zip(parts, lengths, ends, strict=True)
        ]
        if longer == lengths:
            return ends
        lengths = longer


def output_names(paths: Sequence[str], separator: str = "_") -> list[str]:
    """A file name for each of these relative paths, without case, since some file systems know none.

    It is the path without the suffix, `a_x` for `a/x.png`; with it, `x_png`, for those that differ in nothing else. So
    an image that is added or fails does not change the names of others. `separator`: "/" to keep the folders.
    """
    plain = [separator.join(PurePosixPath(path).with_suffix("").parts) for path in paths]
    counts = Counter(name.casefold() for name in plain)
    names: dict[str, str] = {}
    for path, name in zip(paths, plain, strict=True):
        wanted = name + PurePosixPath(path).suffix.replace(".", "_") if counts[name.casefold()] > 1 else name
        free = (f"{wanted}_{number}" if number > 1 else wanted for number in count(1))
        chosen = next(each for each in free if each.casefold() not in names)
        names[chosen.casefold()] = chosen
    return list(names.values())
