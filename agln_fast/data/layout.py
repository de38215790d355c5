"""What a folder of images and masks holds, by itself or by its `data.yaml`: pairs, splits, classes, the masks' code."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from agln_fast.data.class_file import Classes, Colour, parse_classes, parse_colour, read_classes
from agln_fast.data.dataset import IGNORE_INDEX, SPLIT_NAMES
from agln_fast.data.document import SUFFIXES, read_document
from agln_fast.data.masks import MaskCode, MaskFormat
from agln_fast.data.partners import Partners, first_few, from_csv, from_patterns
from agln_fast.errors import DatasetError, choose, printable

__all__ = ["ALL", "Layout", "is_described", "read_layout"]

ALL = "all"
"""The one split of a folder that has none."""

_SETTINGS = [f"data{suffix}" for suffix in (".yaml", ".yml", ".json")]
_CLASSES = [f"classes{suffix}" for suffix in (*SUFFIXES, ".txt")]
_KEYS = ("images", "masks", "pairs", "classes", "mask_format", "ignore", "zero_is_ignored", "splits")
_USUAL = ("train", "val", "test")


@dataclass(frozen=True)
class Layout:
    """A dataset on disk, found but not opened.

    home: its folder; name: what it is called.
    splits: the names of the samples in each, in order; one that is called ALL where it is not divided.
    """

    home: Path
    name: str
    partners: Partners
    splits: Mapping[str, list[str]]
    classes: Classes
    code: MaskCode

    def pairs(self, split: str) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
        """The image and the mask of each name in a split, and a line for each name that lacks one of them."""
        images, masks = self.partners.images, self.partners.masks
        pairs, gaps = {}, []
        for name in self.splits[split]:
            image, mask = images.get(name), masks.get(name)
            if image is None or not image.is_file():
                gaps.append(f"{mask if image is None else image}: {'is no file' if image else 'has no image'}")
            elif mask is None or not mask.is_file():
                gaps.append(f"{image if mask is None else mask}: {'is no file' if mask else 'has no mask'}")
            else:
                pairs[name] = image, mask
        return pairs, gaps


def read_layout(path: str | os.PathLike[str]) -> Layout:
    """Find out what a folder, or the file that describes one, says.

    Raises:
        DatasetError: it is not there, or says nothing that makes sense.
        MissingPackageError: YAML without PyYAML.
    """
    given = Path(path)
    if not given.exists():
        raise DatasetError(f"{printable(given)}: no such folder; needs one with images/, masks/ and classes.txt")
    home = given if given.is_dir() else given.parent
    file = _only(home, _SETTINGS) if given.is_dir() else given
    if file is not None and file.suffix.lower() not in SUFFIXES:
        raise DatasetError(f"{file}: is no dataset; give its folder, or a data.yaml")
    settings = {} if file is None else _read_settings(file)
    where = str(home if file is None else file)
    classes, source = _find_classes(settings.get("classes"), home, where)
    code = _code(settings, classes, source, where)
    partners = _find_partners(settings, home, where)
    name = home.resolve().name if file is None or file.stem == "data" else file.stem
    return Layout(home, printable(name), partners, _splits(settings, partners, home, where), classes, code)


def is_described(path: str | os.PathLike[str]) -> bool:
    """Whether it is a dataset, well or badly made, and not images alone.

    That is a file that describes one, or a folder with such a file, a class file, `images/` or `pairs.csv`.
    """
    given = Path(path)
    if given.is_dir():
        return (given / "images").is_dir() or any(
            (given / name).is_file() for name in (*_SETTINGS, *_CLASSES, "pairs.csv")
        )
    return given.suffix.lower() in SUFFIXES


def _read_settings(file: Path) -> dict[str, Any]:
    values = read_document(file, DatasetError)
    if not isinstance(values, dict):
        raise DatasetError(f"{file}: needs `key: value` lines of {', '.join(_KEYS)}; got {type(values).__name__}")
    for key in values:
        choose("key", key, _KEYS, where=str(file), error=DatasetError)
    for key in ("images", "masks", "pairs"):
        if not isinstance(values.get(key, ""), str):
            raise DatasetError(
                f"{file}: {key} must be a text: a {'CSV file' if key == 'pairs' else 'folder or pattern'}"
            )
    if "pairs" in values and ("images" in values or "masks" in values):
        raise DatasetError(f"{file}: `pairs` names images and masks already; leave out `images` and `masks`")
    return values


def _find_classes(given: Any, home: Path, where: str) -> tuple[Classes, str]:
    """The classes, and where they stand."""
    if isinstance(given, str) and (home / given).is_file():
        return read_classes(home / given), str(home / given)
    if given is not None:
        return parse_classes(given, f"{where}: classes"), where
    file = _only(home, _CLASSES)
    if file is None:
        raise DatasetError(
            f"{home}: has no classes.txt; write the names of the classes there, one a line, or with colours in "
            "classes.json (or name a file in data.yaml: classes)"
        )
    return read_classes(file), str(file)


def _code(settings: Mapping[str, Any], classes: Classes, source: str, where: str) -> MaskCode:
    mask_format: MaskFormat = choose(
        "mask_format", settings.get("mask_format", "auto"), get_args(MaskFormat), where=where, error=DatasetError
    )
    zero = settings.get("zero_is_ignored", False)
    if not isinstance(zero, bool):
        raise DatasetError(f"{where}: zero_is_ignored must be true or false")
    if zero and classes.values is not None:
        raise DatasetError(f"{where}: zero_is_ignored, and {source} gives ids: leave one of them out")
    ignored: int | Colour | None
    value = settings.get("ignore", IGNORE_INDEX)
    if value is None or value == "none":
        ignored = None
    elif type(value) is int:
        ignored = value
    else:
        ignored = parse_colour(value, f"{where}: ignore")
    if "ignore" not in settings and ignored in (classes.values or ()):
        ignored = None
    return MaskCode(classes, source, mask_format, ignored, zero)


def _find_partners(settings: Mapping[str, Any], home: Path, where: str) -> Partners:
    images = settings.get("images", "images")
    pairs = settings.get("pairs")
    if pairs is None and "images" not in settings and not (home / images).is_dir() and (home / "pairs.csv").is_file():
        pairs = "pairs.csv"
    if pairs is not None:
        return from_csv(home / pairs)
    masks = settings.get("masks", "labels" if not (home / "masks").exists() and (home / "labels").is_dir() else "masks")
    partners = from_patterns(home, images, masks)
    if not partners.images.keys() & partners.masks.keys():
        image, mask = next(iter(partners.images.values())), next(iter(partners.masks.values()))
        raise DatasetError(
            f"{where}: no image has the name of a mask ({image.name} and {mask.name}, for example); say in data.yaml "
            "which belong together, such as images: images/*.jpg and masks: masks/*_mask.png"
        )
    return partners


def _splits(settings: Mapping[str, Any], partners: Partners, home: Path, where: str) -> dict[str, list[str]]:
    given = settings.get("splits")
    if given is not None:
        if not isinstance(given, dict) or not all(isinstance(text, str) for item in given.items() for text in item):
            raise DatasetError(f"{where}: splits needs lines such as `train: train.txt`, or the name of a sub-folder")
        return {name: _members(text, name, partners, home, where) for name, text in given.items()}
    if lists := _usual((file.stem for file in home.glob("*.txt")), where):
        return {name: partners.names_in(home / f"{stem}.txt", home) for name, stem in lists.items()}
    if partners.splits:
        others = {name: name for name in partners.splits if SPLIT_NAMES.get(name, name) not in _USUAL}
        return {name: partners.splits[text] for name, text in {**_usual(partners.splits, where), **others}.items()}
    names = sorted({*partners.images, *partners.masks})
    if folders := _usual({name.partition("/")[0] for name in names if "/" in name}, where):
        return {name: _below(folder, names) for name, folder in folders.items()}
    return {ALL: names}


def _usual(texts: Iterable[str], where: str) -> dict[str, str]:
    """The usual splits among some names: ours -> what it is called there."""
    found: dict[str, str] = {}
    for text in sorted(texts):
        name = SPLIT_NAMES.get(text, text)
        if name in found:
            raise DatasetError(
                f"{where}: {found[name]} and {text} are both the split {name!r}; keep one, or say `splits`"
            )
        if name in _USUAL:
            found[name] = text
    return {name: found[name] for name in _USUAL if name in found}


def _members(text: str, split: str, partners: Partners, home: Path, where: str) -> list[str]:
    if (home / text).is_file():
        return partners.names_in(home / text, home)
    if text in partners.splits:
        return partners.splits[text]
    found = _below(text.strip("/"), sorted({*partners.images, *partners.masks}))
    if not found:
        raise DatasetError(f"{where}: split {split!r}: {text!r} is neither a list nor a sub-folder with images")
    return found


def _below(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(f"{folder}/")]


def _only(home: Path, names: list[str]) -> Path | None:
    """The one of these files that is there."""
    there = [home / name for name in names if (home / name).is_file()]
    if len(there) > 1:
        raise DatasetError(f"{home}: holds {first_few(file.name for file in there)}; keep one of them")
    return there[0] if there else None
