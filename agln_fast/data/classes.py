"""Named class sets: which name and which colour belong to a class id."""

from __future__ import annotations

import functools
import json
from collections import Counter
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import PurePath

from agln_fast.errors import ConfigError, choose

__all__ = ["ClassSet", "class_set", "default_class_set", "list_class_sets"]

_FOLDER = resources.files("agln_fast.data")
_BY_COUNT = {12: "scenes", 21: "pascal_voc", 59: "pascal_context_59", 60: "pascal_context_60", 150: "ade20k"}


@dataclass(frozen=True)
class ClassSet:
    """Names and colours of K classes; class id k is `classes[k]`, drawn in `palette[k]`, RGB 0..255.

    Raises:
        ConfigError: lengths that differ, a name twice, a name that cannot be printed, or a colour that is none.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    def __post_init__(self) -> None:
        if not len(self.classes) == len(self.palette) >= 1:
            raise ConfigError(f"class set {self.name!r}: {len(self.classes)} classes and {len(self.palette)} colours")
        for name in self.classes:
            if not (name.strip() and name.isprintable()):
                raise ConfigError(f"class set {self.name!r}: class name {name!r} cannot be printed")
        if len(set(self.classes)) < len(self.classes):
            twice = Counter(self.classes).most_common(1)[0][0]
            raise ConfigError(f"class set {self.name!r}: class name {twice!r} stands there twice")
        for colour in self.palette:
            if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
                raise ConfigError(f"class set {self.name!r}: colour {colour!r} is not three numbers from 0 to 255")

    def to_json(self) -> str:
        """The form of the JSON files in this folder, in one line."""
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> ClassSet:
        """The inverse of `to_json`; anything else in the text is left aside.

        Raises:
            ConfigError: it is none.
        """
        try:
            values = json.loads(text)
            name, title, classes = values["name"], values["title"], tuple(values["classes"])
            palette = tuple((red, green, blue) for red, green, blue in values["palette"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError(f"no class set ({type(error).__name__})") from None
        if not all(isinstance(word, str) for word in (name, title, *classes)):
            raise ConfigError("no class set (a name is no text)")
        if not all(type(value) is int for colour in palette for value in colour):
            raise ConfigError("no class set (a colour is no numbers)")
        return cls(name, title, classes, palette)


def list_class_sets() -> list[str]:
    """Names that `class_set` knows, sorted."""
    files = [PurePath(file.name) for file in _FOLDER.iterdir()]
    return sorted(file.stem for file in files if file.suffixes == [".json"])  # schemas are NAME.schema.json


@functools.cache
def class_set(name: str) -> ClassSet:
    """The class set called `name`, e.g. "ade20k"; where it comes from stands in its JSON file.

    Raises:
        ConfigError: there is no class set of that name.
    """
    choose("class set", name, list_class_sets())
    return ClassSet.from_json((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def default_class_set(num_classes: int) -> ClassSet:
    """The class set that a network with `num_classes` outputs was most likely trained on.

    12 is Scenes, 21 PASCAL VOC, 59 and 60 PASCAL Context, 150 ADE20K. Any other number gets "class 0", "class 1", ...
    in the colours of VOC's colour map, which are distinct for up to 2^24 classes.

    Raises:
        ConfigError: `num_classes` is below 1.
    """
    if num_classes in _BY_COUNT:
        return class_set(_BY_COUNT[num_classes])
    names = tuple(f"class {index}" for index in range(num_classes))
    palette = tuple(_voc_colour(index) for index in range(num_classes))
    return ClassSet(f"generic_{num_classes}", f"{num_classes} unnamed classes", names, palette)


def _voc_colour(index: int) -> tuple[int, int, int]:
    """VOClabelcolormap of the VOC devkit: bits 0, 3, 6, ... of `index` make red from the top bit down, and so on."""
    red, green, blue = (sum((index >> 3 * i + channel & 1) << 7 - i for i in range(8)) for channel in range(3))
    return red, green, blue
