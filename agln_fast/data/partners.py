"""Which files of a folder are images and which are masks, and which belong together: folders, patterns, a CSV file."""

from __future__ import annotations

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from agln_fast.data.decoding import image_suffixes
from agln_fast.data.document import read_lines
from agln_fast.errors import DatasetError, printable

__all__ = ["Partners", "first_few", "from_csv", "from_patterns"]

_COLUMNS = ("image", "mask", "split")
_FIRST_FEW = 3


@dataclass(frozen=True)
class Partners:
    """Images and masks by a name that partners have in common; `splits` are those that a CSV file names."""

    images: Mapping[str, Path]
    masks: Mapping[str, Path]
    splits: Mapping[str, list[str]] = field(default_factory=dict)

    def names_in(self, listing: Path, home: Path) -> list[str]:
        """The names that the lines of a file mean: a name, that of a file with or without suffix, or a path of one.

        Raises:
            DatasetError: it cannot be read or is empty, or a line means nothing, several files, or one twice.
        """
        meanings = self._meanings(home)
        names: dict[str, None] = {}
        strange = []
        for line in filter(None, read_lines(listing, DatasetError)):
            meant = meanings.get(os.path.normpath(unicodedata.normalize("NFC", line)), set())
            if len(meant) > 1:
                raise DatasetError(
                    f"{listing}: {printable(line)!r} may be any of {first_few(sorted(meant))}; give paths"
                )
            if not meant:
                strange.append(line)
            for name in meant:
                if name in names:
                    raise DatasetError(f"{listing}: {printable(name)} stands there twice")
                names[name] = None
        if strange:
            raise DatasetError(f"{listing}: {len(strange)} lines name no image here: {first_few(strange)}")
        if not names:
            raise DatasetError(f"{listing}: names no image; fill it, or remove it")
        return list(names)

    def _meanings(self, home: Path) -> dict[str, set[str]]:
        """What may stand for an image -> its name, or the names of several."""
        meanings: dict[str, set[str]] = {}
        for files in (self.masks, self.images):
            for name, file in files.items():
                within = file.relative_to(home) if file.is_relative_to(home) else file
                texts = {name, PurePath(name).name, file.stem, file.name, str(file), str(within)}
                texts.add(f"{name}{file.suffix}")
                texts.add(str(within.with_suffix("")))
                for text in texts:
                    meanings.setdefault(unicodedata.normalize("NFC", text), set()).add(name)
        for name in (*self.images, *self.masks):
            meanings[name] = {name}  # whatever else may be called so
        return meanings


def from_patterns(home: Path, images: str, masks: str) -> Partners:
    """Of two folders, partners have the same path in theirs, but for the suffix; of two patterns, the same texts stand
    for their wildcards `*`, `**` and `?`. Folders and patterns lie in `home`.

    Raises:
        DatasetError: there is no such folder, no such file, or two have one name.
    """
    return Partners(_find(home, images, "images"), _find(home, masks, "masks"))


def from_csv(path: Path) -> Partners:
    """Of the columns image and mask, paths from the folder of the file; a third one is the split. Without a first line
    that names them they come in this order.

    Raises:
        DatasetError: it cannot be read, has other columns, or an image twice.
    """
    lines = read_lines(path, DatasetError)
    if not lines:
        raise DatasetError(f"{path}: is empty; needs lines of image,mask")
    delimiter = next((mark for mark in ",;\t" if mark in lines[0]), ",")
    try:
        rows = [row for row in csv.reader(io.StringIO("\n".join(lines)), delimiter=delimiter) if any(row)]
    except csv.Error as error:
        raise DatasetError(f"{path}: no CSV file ({error})") from None
    header = [cell.strip().lower() for cell in rows[0]]
    columns = header if {"image", "mask"} <= set(header) else list(_COLUMNS[: len(header)])
    if columns == header:
        rows = rows[1:]
    images: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    splits: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        cells = dict(zip(columns, map(str.strip, row), strict=False))
        if len(row) != len(columns) or not (cells.get("image") and cells.get("mask")):
            raise DatasetError(f"{path}: row {number} has not the columns {', '.join(columns)}, but {len(row)} cells")
        name = unicodedata.normalize("NFC", os.path.normpath(cells["image"]))
        if name in images:
            raise DatasetError(f"{path}: {printable(name)} stands there twice")
        images[name], masks[name] = path.parent / cells["image"], path.parent / cells["mask"]
        if cells.get("split"):
            splits.setdefault(cells["split"], []).append(name)
    return Partners(images, masks, splits)


def first_few(names: Iterable[str]) -> str:
    """The first few of them, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _FIRST_FEW} more" if len(names) > _FIRST_FEW else ""
    return f"{', '.join(printable(name, 300) for name in names[:_FIRST_FEW])}{more}"


def _find(home: Path, place: str, what: str) -> dict[str, Path]:
    """The files in a folder, or of a pattern, by name."""
    parts = PurePath(place).parts
    is_pattern = any("*" in part or "?" in part for part in parts)
    fixed = next((i for i, part in enumerate(parts) if "*" in part or "?" in part), len(parts))
    root = home.joinpath(*parts[:fixed])
    if not root.is_dir():
        raise DatasetError(f"{root}: no such folder; put {what} there, or say where they are: {what} in data.yaml")
    wanted = re.compile(_expression(parts[fixed:])) if is_pattern else None
    suffixes = image_suffixes()
    found: dict[str, Path] = {}
    for file in _walk(root):
        within = PurePath(os.path.relpath(file, root))
        if wanted is None:
            if file.suffix.lower() not in suffixes:
                continue
            name = str(within.with_suffix(""))
        else:
            match = wanted.fullmatch(str(within))
            if match is None:
                continue
            name = "/".join(filter(None, (group.strip("/") for group in match.groups())))
            if parts[-1].endswith(("*", "?")):
                name = str(PurePath(name).with_suffix(""))
        name = unicodedata.normalize("NFC", name)
        if name in found:
            raise DatasetError(f"{file}: has the name of {found[name]}; give one of them another, or a pattern")
        found[name] = file
    if not found:
        raise DatasetError(f"{home / place}: holds no {what}")
    return found


def _expression(parts: Iterable[str]) -> str:
    """A pattern as a regular expression, with a group for each wildcard."""
    kinds = {"*": "([^/]*)", "?": "([^/])"}
    texts = [
        "((?:[^/]+/)*)" if part == "**" else "".join(kinds.get(char, re.escape(char)) for char in part) + "/"
        for part in parts
    ]
    return "".join(texts).removesuffix("/")


def _walk(root: Path) -> Iterator[Path]:
    """All plain files below a folder, sorted, but hidden ones; links are followed, and those in circles once."""
    seen = set()

    def refuse(error: OSError) -> None:
        raise DatasetError(f"{error.filename}: cannot be read ({error.strerror})")

    for parent, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        place = os.path.realpath(parent)
        folders[:] = [] if place in seen else sorted(name for name in folders if not name.startswith("."))
        if place in seen:
            continue
        seen.add(place)
        paths = (Path(parent, name) for name in sorted(files) if not name.startswith("."))
        yield from (path for path in paths if path.is_file())
