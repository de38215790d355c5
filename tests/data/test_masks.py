"""Masks of every kind become labels: each by what its pixels were written to mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agln_fast.data.class_file import Classes, parse_classes, parse_colour, read_classes
from agln_fast.data.dataset import IGNORE_INDEX
from agln_fast.data.masks import MaskCode
from agln_fast.errors import DatasetError

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)
NAMED = Classes(("sky", "road", "tree"))
COLOURED = Classes(("sky", "road", "tree"), (RED, GREEN, BLUE))


def grey(*values: int, dtype: type = np.uint8) -> Image.Image:
    return Image.fromarray(np.array([values], dtype))


def coloured(*colours: tuple[int, ...]) -> Image.Image:
    return Image.fromarray(np.array([colours], np.uint8))


def palette(indices: tuple[int, ...], *colours: tuple[int, int, int]) -> Image.Image:
    picture = grey(*indices)
    picture.putpalette([number for colour in colours for number in colour])
    return picture


def labels(code: MaskCode, picture: Image.Image) -> list[int]:
    found = code.labels(picture, "m.png")
    assert found.dtype == np.uint8
    assert found.shape == picture.size[::-1]
    values: list[int] = found.ravel().tolist()
    return values


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(grey(0, 2, 1, 255), id="grey-of-8-bits"),
        pytest.param(grey(0, 2, 1, 255, dtype=np.uint16), id="grey-of-16-bits"),
        pytest.param(grey(0, 2, 1, 255, dtype=np.int32), id="grey-of-32-bits"),
        pytest.param(palette((0, 2, 1, 255), *[(9, 9, 9)] * 256), id="palette-whose-colours-say-nothing"),
        pytest.param(Image.merge("LA", (grey(0, 2, 1, 255), grey(0, 9, 255, 1))), id="grey-with-alpha"),
    ],
)
def test_ids_are_the_values(picture: Image.Image) -> None:
    for mask_format in ("auto", "ids"):
        assert labels(MaskCode(NAMED, "c", mask_format), picture) == [0, 2, 1, IGNORE_INDEX]


def test_a_picture_of_one_bit_has_the_ids_0_and_1() -> None:
    assert labels(MaskCode(NAMED, "c"), Image.fromarray(np.array([[False, True]]))) == [0, 1]


def test_equal_red_green_and_blue_are_ids_if_that_is_said() -> None:
    picture = coloured((0, 0, 0), (2, 2, 2))
    assert labels(MaskCode(NAMED, "c", "ids"), picture) == [0, 2]
    with pytest.raises(DatasetError, match="in colours, and mask_format is ids"):
        MaskCode(NAMED, "c", "ids").labels(coloured((0, 0, 1)), "m.png")


@pytest.mark.parametrize("alpha", [(), (7,)], ids=["RGB", "RGBA"])
def test_colours_are_those_of_the_classes(alpha: tuple[int, ...]) -> None:
    picture = coloured((*BLUE, *alpha), (*RED, *alpha), (*GREEN, *alpha))
    for mask_format in ("auto", "colors"):
        assert labels(MaskCode(COLOURED, "c", mask_format), picture) == [2, 0, 1]


def test_a_palette_is_indices_unless_its_colours_are_asked_for() -> None:
    picture = palette((0, 1), BLUE, RED)
    assert labels(MaskCode(COLOURED, "c", "ids"), picture) == [0, 1]
    assert labels(MaskCode(COLOURED, "c", "colors"), picture) == [2, 0]


def test_a_palette_that_says_two_things_is_refused() -> None:
    """Index 0 is sky, and looks like a tree."""
    with pytest.raises(DatasetError, match=r"m\.png: the value 0 is the id of 'sky' and has the colour of 'tree'"):
        MaskCode(COLOURED, "c").labels(palette((0, 1), BLUE, RED), "m.png")
    assert labels(MaskCode(COLOURED, "c"), palette((0, 1), RED, GREEN)) == [0, 1]  # both say the same


def test_values_that_are_no_ids_are_taken_for_colours() -> None:
    """A palette that a program has sorted its own way, and black and white as 0 and 255."""
    assert labels(MaskCode(COLOURED, "c"), palette((0, 7), RED, *[GREEN] * 7)) == [0, 1]
    binary = Classes(("nothing", "road"), ((0, 0, 0), (255, 255, 255)))
    assert labels(MaskCode(binary, "c", ignored=None), grey(0, 255)) == [0, 1]
    with pytest.raises(DatasetError, match="255 is the id of what is ignored and has the colour of 'road'"):
        MaskCode(binary, "c").labels(grey(0, 255), "m.png")


def test_ids_of_the_classes_own() -> None:
    code = MaskCode(Classes(("a", "b"), values=(7, 4000)), "c")
    assert labels(code, grey(4000, 7, 255, dtype=np.uint16)) == [1, 0, IGNORE_INDEX]
    with pytest.raises(DatasetError, match="0 on 1 pixels"):
        code.labels(grey(0, 7), "m.png")


def test_zero_that_is_ignored_shifts_the_classes() -> None:
    assert labels(MaskCode(NAMED, "c", zero_is_ignored=True), grey(0, 1, 3, 255)) == [255, 0, 2, 255]
    assert labels(MaskCode(COLOURED, "c", zero_is_ignored=True), coloured((0, 0, 0), BLUE)) == [255, 2]


def test_what_is_ignored_can_be_said() -> None:
    assert labels(MaskCode(NAMED, "c", ignored=9), grey(9, 0)) == [255, 0]
    assert labels(MaskCode(COLOURED, "c", ignored=(1, 2, 3)), coloured((1, 2, 3), GREEN)) == [255, 1]
    with pytest.raises(DatasetError, match="255 on 1 pixels"):
        MaskCode(NAMED, "c", ignored=None).labels(grey(255), "m.png")


@pytest.mark.parametrize(
    ("picture", "told"),
    [
        pytest.param(
            grey(3, 3, 9, 0), r"values that are no class: 3 on 2 pixels, 9 on 1 pixels; c has 3 classes, 0 to 2"
        ),
        pytest.param(grey(3, 4, 5, 6, 7), r"3 on 1 pixels, 4 on 1 pixels, 5 on 1 pixels and 2 more"),
        pytest.param(grey(70000, -1, dtype=np.int32), r"-1 on 1 pixels, 70000 on 1 pixels"),
        pytest.param(coloured((1, 2, 3), RED), r"colours that are no class: \(1, 2, 3\) on 1 pixels; c has 3 classes"),
        pytest.param(coloured(*[(i, 9, 9) for i in range(30)]), "27 more.*saved without smoothing"),
        pytest.param(Image.new("CMYK", (1, 1)), "is of mode CMYK"),
    ],
    ids=["values", "first-few-values", "out-of-16-bits", "colours", "smoothed", "another-mode"],
)
def test_what_is_no_class_is_named_with_its_number(picture: Image.Image, told: str) -> None:
    with pytest.raises(DatasetError, match=rf"m\.png: .*{told}"):
        MaskCode(COLOURED, "c").labels(picture, "m.png")


def test_colours_need_colours_of_the_classes() -> None:
    with pytest.raises(DatasetError, match="is in colours, and c has none"):
        MaskCode(NAMED, "c").labels(coloured(RED), "m.png")
    with pytest.raises(DatasetError, match="c: has no colours"):
        MaskCode(NAMED, "c", "colors")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        pytest.param((Classes(("a", "b"), (RED, RED)), "c"), "colour .* of class 'a' is that of", id="one-colour"),
        pytest.param((NAMED, "c", "auto", 1), "mask value 1 of class 'road' is ignored, too", id="a-class-is-ignored"),
        pytest.param((COLOURED, "c", "auto", GREEN), "colour .* of class 'road' is ignored", id="a-colour-is-ignored"),
        pytest.param((Classes(tuple(map(str, range(256)))), "c"), "256 classes; there may be 255", id="too-many"),
    ],
)  # fmt: skip
def test_senseless_codes_are_refused(code: tuple[Any, ...], told: str) -> None:
    with pytest.raises(DatasetError, match=f"c: .*{told}"):
        MaskCode(*code)


def test_255_classes_are_the_most() -> None:
    code = MaskCode(Classes(tuple(map(str, range(255)))), "c")
    assert labels(code, grey(0, 254, 255)) == [0, 254, 255]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("c.txt", "\ufeffsky\r\nroad side\r\nB\u00e4ume\r\n\r\n", Classes(("sky", "road side", "B\u00e4ume"))),
        ("c.json", '["sky", "road"]', Classes(("sky", "road"))),
        ("c.json", '{"sky": [1, 2, 3], "road": "#0a0B0c"}', Classes(("sky", "road"), ((1, 2, 3), (10, 11, 12)))),
        ("c.json", '{"name": "x", "classes": ["a"], "palette": [[1, 2, 3]]}', Classes(("a",), ((1, 2, 3),))),
        ("c.yaml", "- {name: sky, color: [1, 2, 3], id: 7}\n", Classes(("sky",), ((1, 2, 3),), (7,))),
        ("c.yml", "- {name: sky, colour: '#010203'}\n", Classes(("sky",), ((1, 2, 3),))),
        ("c.yaml", "ade20k", None),
    ],
    ids=["text", "names", "name-color", "ours", "objects", "british", "a-class-set"],
)  # fmt: skip
def test_class_files(tmp_path: Path, name: str, text: str, expected: Classes | None) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    found = read_classes(tmp_path / name)
    if expected is None:
        assert (len(found.names), len(found.colours or ())) == (150, 150)
    else:
        assert found == expected
        made = found.class_set("mine")
        assert made.classes == expected.names
        assert expected.colours is None or made.palette == expected.colours
        assert len(set(made.palette)) == len(expected.names)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("c.txt", "", "names no class"),
        ("c.txt", "a\n\nb\n", "cannot be printed"),
        ("c.txt", "a\na\n", "'a' stands there twice"),
        ("c.txt", "\x1b[31m\n", "cannot be printed"),
        ("c.json", "[1]", "1 is no class name"),
        ("c.json", "{", "not JSON"),
        ("c.json", "7", "7 is no list of classes"),
        ("c.json", "[" * 200_000, "too deep"),
        ("c.json", '{"sky": [1, 2]}', "list is no colour; give"),
        ("c.json", '{"sky": [1, 2, 256]}', "is no colour"),
        ("c.json", '{"sky": "red"}', "'red' is no colour"),
        ("c.json", '{"classes": ["a"], "palette": []}', "1 classes and 0 colours"),
        ("c.json", '{"classes": 7}', "must be lists"),
        ("c.json", '[{"name": "a", "id": 1}, {"name": "b", "id": 1}]', "id 1 stands there twice"),
        ("c.json", '[{"name": "a", "id": -1}]', "id -1 is no mask value"),
        ("c.json", '[{"name": "a", "id": 1}, {"name": "b"}]', "number 1 has no 'id'"),
        ("c.json", '[{"name": "a"}, {"name": "b", "id": 1}]', "number 1 has no 'id', or is the first"),
        ("c.json", '[{"nmae": "a"}]', "did you mean 'name'"),
        ("c.yaml", BOMB, "list is no colour"),
        ("c.yaml", "a: [", "not YAML"),
        ("c.yaml", "2026-99-99", "is no list of classes|not YAML"),
    ],
)  # fmt: skip
def test_what_is_no_class_file(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DatasetError, match=rf"c\.\w+: .*({told})") as error:
        read_classes(tmp_path / name)
    assert len(str(error.value)) < 800


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("B\u00e4ume".encode("latin-1"))
    (tmp_path / "large.txt").write_bytes(b"a" * (5 << 20))
    (tmp_path / "folder.txt").mkdir()
    for name, told in (
        ("latin", "UTF-8"),
        ("large", "larger than 4 MiB"),
        ("folder", "not a file"),
        ("none", "No such"),
    ):
        with pytest.raises(DatasetError, match=told):
            read_classes(tmp_path / f"{name}.txt")


def test_a_colour_of_true_is_none() -> None:
    with pytest.raises(DatasetError):
        parse_colour([True, 0, 0], "c")
    assert parse_classes({"a": [0, 0, 0]}, "c").colours == ((0, 0, 0),)
