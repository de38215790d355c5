"""Masks of ids, of palette indices or of colours become labels: class ids from 0, and IGNORE_INDEX."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from agln_fast.data.class_file import Classes, Colour
from agln_fast.data.dataset import IGNORE_INDEX
from agln_fast.errors import DatasetError

__all__ = ["MaskCode", "MaskFormat"]

MaskFormat: TypeAlias = Literal["auto", "ids", "colors"]

_UNKNOWN = -1
_VALUES = 1 << 16
_BLACK = (0, 0, 0)
_FIRST_FEW = 3
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I", "I;16", "I;16B", "I;16L", "I;16N")
_Labels: TypeAlias = npt.NDArray[np.int16]


@dataclass(frozen=True)
class MaskCode:
    """What pixels of masks mean, for at most 255 classes.

    classes: their names, and the colours and mask values that they have.
    source: where they stand, for messages.
    format: "ids" takes grey values and palette indices, "colors" RGB, "auto" what the picture has: RGB for colours,
        else ids; grey and palettes that are no ids are taken for colours, if all of theirs are classes'.
    ignored: the mask value, or the colour, of pixels that are ignored; None for none.
    zero_is_ignored: 0, or black, is ignored, and class k has the value k + 1.

    Raises:
        DatasetError: what cannot be: too many classes, two with one colour, or one that is ignored, too.
    """

    classes: Classes
    source: str
    format: MaskFormat = "auto"
    ignored: int | Colour | None = IGNORE_INDEX
    zero_is_ignored: bool = False

    def __post_init__(self) -> None:
        count = len(self.classes.names)
        if count > IGNORE_INDEX:
            raise DatasetError(f"{self.source}: {count} classes; there may be {IGNORE_INDEX}, ids are bytes")
        if self.format == "colors" and self.classes.colours is None:
            raise DatasetError(f"{self.source}: has no colours, which masks of format colors need")
        for kind, keys, ignored in (
            ("mask value", self._values, self._ignored_values),
            ("colour", self.classes.colours or (), self._ignored_colours),
        ):
            counts = Counter([*keys, *ignored])
            for name, key in zip(self.classes.names, keys, strict=False):
                if kind == "colour" and self.format == "ids":
                    continue
                if counts[key] > 1:
                    what = "is ignored, too" if key in ignored else "is that of another class, too"
                    raise DatasetError(f"{self.source}: the {kind} {key} of class {name!r} {what}")

    @property
    def _values(self) -> tuple[int, ...]:
        first = int(self.zero_is_ignored)
        return self.classes.values or tuple(range(first, first + len(self.classes.names)))

    @property
    def _ignored_values(self) -> set[int]:
        return {*({self.ignored} if isinstance(self.ignored, int) else ()), *({0} if self.zero_is_ignored else ())}

    @property
    def _ignored_colours(self) -> set[Colour]:
        return {
            *({self.ignored} if isinstance(self.ignored, tuple) else ()),
            *({_BLACK} if self.zero_is_ignored else ()),
        }

    @cached_property
    def _by_value(self) -> _Labels:
        """[value] its label."""
        table = np.full(_VALUES + 1, _UNKNOWN, np.int16)  # the last one stands for all that are out of range
        table[list(self._values)] = np.arange(len(self._values))
        table[[value for value in self._ignored_values if value < _VALUES]] = IGNORE_INDEX
        return table

    @cached_property
    def _by_colour(self) -> tuple[npt.NDArray[np.int32], _Labels]:
        """Colours as numbers, rising, and the label of each."""
        labels = {_number(colour): label for label, colour in enumerate(self.classes.colours or ())}
        labels |= dict.fromkeys(map(_number, self._ignored_colours), IGNORE_INDEX)
        numbers = sorted(labels)
        return np.array(numbers, np.int32), np.array([labels[number] for number in numbers], np.int16)

    def labels(self, picture: Image.Image, name: str) -> npt.NDArray[np.uint8]:
        """Labels (H, W) of a mask that is called `name`.

        Raises:
            DatasetError: a value or colour that is none of the classes', or one that may be two of them.
        """
        if picture.mode not in _MODES:
            raise DatasetError(f"{name}: is of mode {picture.mode}; a mask needs ids, a palette, or RGB")
        is_colour = picture.mode in ("RGB", "RGBA")
        if self.format == "colors" or (self.format == "auto" and is_colour):
            labels = self._read_colours(picture, name)
        else:
            labels = self._read_ids(picture, name)
            if self.format == "auto" and self.classes.colours is not None and picture.mode in ("1", "L", "P"):
                labels = self._without_doubt(labels, picture, name)
        if (labels == _UNKNOWN).any():
            raise DatasetError(self._complaint(picture, labels, name))
        return labels.astype(np.uint8)

    def _read_ids(self, picture: Image.Image, name: str) -> _Labels:
        if picture.mode in ("RGB", "RGBA") and not _is_grey(picture):
            raise DatasetError(f"{name}: is in colours, and mask_format is ids")
        values = _values(picture)
        return self._by_value[np.where((values < 0) | (values >= _VALUES), _VALUES, values)]

    def _read_colours(self, picture: Image.Image, name: str) -> _Labels:
        if self.classes.colours is None:
            raise DatasetError(
                f"{name}: is in colours, and {self.source} has none; give each class its color there, or save masks of "
                "ids (mask_format: ids, if red, green and blue are all the id)"
            )
        numbers, labels = self._by_colour
        found = _colours(picture)
        places = np.minimum(np.searchsorted(numbers, found), len(numbers) - 1)
        return np.where(numbers[places] == found, labels[places], np.int16(_UNKNOWN))

    def _without_doubt(self, by_id: _Labels, picture: Image.Image, name: str) -> _Labels:
        """The labels of a grey or palette mask, whose values may be ids or stand for the classes' own colours."""
        by_colour = self._read_colours(picture, name)
        if (by_colour == _UNKNOWN).any() or (by_colour == by_id).all():
            return by_id
        if (by_id == _UNKNOWN).any():
            return by_colour
        row, column = np.argwhere(by_colour != by_id)[0]
        value = _values(picture)[row, column]
        raise DatasetError(
            f"{name}: the value {int(value)} is the id of {self._name(by_id[row, column])} and has the colour of "
            f"{self._name(by_colour[row, column])}; say which with mask_format: ids or colors"
        )

    def _name(self, label: int) -> str:
        return "what is ignored" if label == IGNORE_INDEX else repr(self.classes.names[label])

    def _complaint(self, picture: Image.Image, labels: _Labels, name: str) -> str:
        is_colour = self.format == "colors" or (self.format == "auto" and picture.mode in ("RGB", "RGBA"))
        keys = _colours(picture)[labels == _UNKNOWN] if is_colour else _values(picture)[labels == _UNKNOWN]
        found, counts = np.unique(keys, return_counts=True)
        largest = np.argsort(-counts, kind="stable")[:_FIRST_FEW]
        few = ", ".join(
            f"{_colour(int(found[i])) if is_colour else int(found[i])} on {counts[i]} pixels" for i in largest
        )
        more = f" and {len(found) - len(largest)} more" if len(found) > len(largest) else ""
        kind = "colours" if is_colour else "values"
        hint = (
            "a mask must be saved without smoothing" if len(found) > 20 else "name what is to be ignored with `ignore`"
        )
        known = f"{self.source} has {len(self.classes.names)} classes"
        if not is_colour and self.classes.values is None:
            known += f", {self._values[0]} to {self._values[-1]}"
        return f"{name}: holds {kind} that are no class: {few}{more}; {known}; {hint}"


def _values(picture: Image.Image) -> npt.NDArray[np.int32]:
    """(H, W): what may be the id of each pixel."""
    if picture.format == "GIF" and _is_grey(picture):  # it has a palette in any case, which writers put in their order
        picture = picture.convert("RGB")
    values = np.asarray(picture).astype(np.int32)
    return values[..., 0] if values.ndim == 3 else values  # without alpha, or of equal channels


def _is_grey(picture: Image.Image) -> bool:
    rgb = np.asarray(picture.convert("RGB"))
    return bool((rgb[..., 1:] == rgb[..., :1]).all())


def _number(colour: Colour) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def _colour(number: int) -> Colour:
    return number >> 16, number >> 8 & 255, number & 255


def _colours(picture: Image.Image) -> npt.NDArray[np.int32]:
    """(H, W): the colour of each pixel as a number."""
    rgb = np.asarray(picture.convert("RGB")).astype(np.int32)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
