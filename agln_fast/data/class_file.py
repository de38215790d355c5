"""Class files: names, and maybe colours and mask values, in JSON, in YAML, or one name a line."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from agln_fast.data.classes import ClassSet, class_set, default_class_set, list_class_sets
from agln_fast.data.document import SUFFIXES, read_document, read_lines
from agln_fast.errors import ConfigError, DatasetError, choose, printable

__all__ = ["Classes", "Colour", "parse_classes", "parse_colour", "read_classes"]

Colour: TypeAlias = tuple[int, int, int]

_FORMS = 'a list of names, a list of {name, color, id}, {name: color}, or {"classes": [...], "palette": [...]}'
_HEX = re.compile(r"#[0-9a-fA-F]{6}")
_LARGEST_VALUE = 65535  # masks have 16 bits at most


@dataclass(frozen=True)
class Classes:
    """What a class file says of K classes; class k is `names[k]`.

    colours: RGB 0..255 of each, or None where the file has none.
    values: what stands in masks of ids for each, 0..65535, or None for 0 to K - 1.
    """

    names: tuple[str, ...]
    colours: tuple[Colour, ...] | None = None
    values: tuple[int, ...] | None = None

    def class_set(self, name: str) -> ClassSet:
        """Of that name; where the file has no colours, in those of VOC's colour map.

        Raises:
            ConfigError: as `ClassSet`.
        """
        generic = default_class_set(max(1, len(self.names))).palette
        return ClassSet(name, name, self.names, generic if self.colours is None else self.colours)


def read_classes(path: str | os.PathLike[str]) -> Classes:
    """Read a class file: JSON or YAML by its suffix, else text with a name in each line.

    Raises:
        DatasetError: it cannot be read, or is no class file.
        MissingPackageError: YAML without PyYAML.
    """
    if Path(path).suffix.lower() in SUFFIXES:
        return parse_classes(read_document(path, DatasetError), str(path))
    return _checked(Classes(tuple(read_lines(path, DatasetError))), str(path))


def parse_classes(value: Any, where: str) -> Classes:
    """The classes in what a JSON or YAML file holds; `where` is what errors call it.

    `value` is a list of names; a list of objects with `name`, and all or none of them with `color` and with `id`, the
    mask value; an object that names a colour for each class; or one with `classes` and `palette`, as our own files.

    Raises:
        DatasetError: it is none of these.
    """
    if isinstance(value, dict) and "classes" in value:
        names, palette = value["classes"], value.get("palette")
        if not isinstance(names, list) or not (palette is None or isinstance(palette, list)):
            raise DatasetError(f"{where}: `classes` and `palette` must be lists")
        listed = parse_classes(names, where)
        return listed if palette is None else _checked(Classes(listed.names, _colours(palette, where)), where)
    if isinstance(value, dict) and value:
        return _checked(Classes(_names(list(value), where), _colours(list(value.values()), where)), where)
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        return _of_objects(value, where)
    if isinstance(value, list) and value:
        return _checked(Classes(_names(value, where)), where)
    if isinstance(value, str) and value in list_class_sets():
        known = class_set(value)
        return Classes(known.classes, known.palette)
    raise DatasetError(f"{where}: {_shown(value)} is no list of classes; give {_FORMS}")


def parse_colour(value: Any, where: str) -> Colour:
    """[R, G, B] of 0..255, or "#rrggbb".

    Raises:
        DatasetError: it is neither.
    """
    if isinstance(value, str) and _HEX.fullmatch(value):
        value = list(bytes.fromhex(value[1:]))
    if isinstance(value, list) and len(value) == 3 and all(type(v) is int and 0 <= v <= 255 for v in value):
        red, green, blue = value
        return red, green, blue
    raise DatasetError(f'{where}: {_shown(value)} is no colour; give [R, G, B] from 0 to 255, or "#rrggbb"')


def _of_objects(entries: list[dict[str, Any]], where: str) -> Classes:
    columns: dict[str, list[Any]] = {"name": [], "color": [], "id": []}
    for number, entry in enumerate(entries):
        for key, value in entry.items():
            name = choose("key", "color" if key == "colour" else key, columns, where=where, error=DatasetError)
            columns[name].append(value)
        for name, column in columns.items():
            if len(column) not in (0 if name != "name" else number + 1, number + 1):
                raise DatasetError(f"{where}: class number {number} has no {name!r}, or is the first that has one")
    colours, values = columns["color"], columns["id"]
    for value in values:
        if type(value) is not int or not 0 <= value <= _LARGEST_VALUE:
            raise DatasetError(f"{where}: id {_shown(value)} is no mask value from 0 to {_LARGEST_VALUE}")
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise DatasetError(f"{where}: id {twice} stands there twice")
    classes = Classes(
        _names(columns["name"], where), _colours(colours, where) if colours else None, tuple(values) or None
    )
    return _checked(classes, where)


def _names(values: Sequence[Any], where: str) -> tuple[str, ...]:
    for value in values:
        if not isinstance(value, str):
            raise DatasetError(f"{where}: {_shown(value)} is no class name; put it in quotes, or give {_FORMS}")
    return tuple(values)


def _colours(values: Sequence[Any], where: str) -> tuple[Colour, ...]:
    return tuple(parse_colour(value, where) for value in values)


def _checked(classes: Classes, where: str) -> Classes:
    """`classes`, of which a class set can be made."""
    if not classes.names:
        raise DatasetError(f"{where}: names no class")
    try:
        classes.class_set(Path(where).name)
    except ConfigError as error:
        raise DatasetError(f"{where}: {error}") from None
    return classes


def _shown(value: Any) -> str:
    """For messages: not what is in lists, which may refer to each other without an end."""
    return type(value).__name__ if isinstance(value, (list, dict)) else printable(repr(value), 60)
