"""Class sets against published facts: counts, orders and colours."""

import json
from importlib import resources

import pytest

from agln_fast.data import ClassSet, class_set, default_class_set, list_class_sets
from agln_fast.errors import ConfigError

SIZES = {"ade20k": 150, "pascal_context_59": 59, "pascal_context_60": 60, "pascal_voc": 21, "scenes": 12}

# The ids of Context's 59 classes among its 459, as PyTorch-Encoding lists them.
CONTEXT_IDS = """2 259 260 415 324 9 258 144 18 19 22 23 397 25 284 158 159 416 33 162 420 454 295 296 427 44 45 46 308
    59 440 445 31 232 65 354 424 68 326 72 458 34 207 80 355 85 347 220 349 360 98 187 104 105 366 189 368 113 115"""


def test_every_data_file_is_listed() -> None:
    assert list_class_sets() == sorted(SIZES)


@pytest.mark.parametrize(("name", "count"), SIZES.items(), ids=lambda value: str(value))
def test_class_set_has_its_published_number_of_distinct_names(name: str, count: int) -> None:
    classes = class_set(name)
    assert name.partition("_")[0].upper() in classes.title.upper()
    assert len(classes.classes) == len(classes.palette) == len(set(classes.classes)) == count
    assert all(text == text.strip() for text in classes.classes)


@pytest.mark.parametrize("name", SIZES)
def test_data_file_says_its_name_its_source_and_the_ignored_label(name: str) -> None:
    values = json.loads((resources.files("agln_fast.data") / f"{name}.json").read_text(encoding="utf-8"))
    assert values["name"] == name
    assert values["source"]
    assert values["ignore_index"] == 255


@pytest.mark.parametrize(
    ("name", "index", "text", "colour"),
    [
        pytest.param("pascal_voc", 0, "background", (0, 0, 0), id="voc-background-is-black"),
        pytest.param("pascal_voc", 1, "aeroplane", (128, 0, 0), id="voc-bit-0-is-red"),
        pytest.param("pascal_voc", 8, "cat", (64, 0, 0), id="voc-bit-3-is-half-of-bit-0"),
        pytest.param("pascal_voc", 15, "person", (192, 128, 128), id="voc-person"),
        pytest.param("pascal_voc", 20, "tvmonitor", (0, 64, 128), id="voc-last"),
        pytest.param("pascal_context_59", 0, "aeroplane", (180, 120, 120), id="context-59-starts-without-background"),
        pytest.param("pascal_context_60", 0, "background", (120, 120, 120), id="context-60-starts-with-background"),
        pytest.param("pascal_context_60", 55, "tvmonitor", (0, 0, 255), id="context-60-tvmonitor"),
        pytest.param("pascal_context_60", 59, "wood", (31, 0, 255), id="context-60-last"),
        pytest.param("ade20k", 0, "wall", (120, 120, 120), id="ade-first"),
        pytest.param("ade20k", 2, "sky", (6, 230, 230), id="ade-sky"),
        pytest.param("ade20k", 7, "bed", (204, 5, 255), id="ade-bed-without-the-trailing-blank-of-some-lists"),
        pytest.param("ade20k", 12, "person", (150, 5, 61), id="ade-person"),
        pytest.param("ade20k", 105, "conveyer belt", (133, 0, 255), id="ade-middle"),
        pytest.param("ade20k", 149, "flag", (92, 0, 255), id="ade-last"),
    ],
)
def test_name_and_colour_of_one_class(name: str, index: int, text: str, colour: tuple[int, int, int]) -> None:
    assert class_set(name).classes[index] == text
    assert class_set(name).palette[index] == colour


def test_context_is_in_the_order_of_the_459_ids_which_is_alphabetical() -> None:
    classes = class_set("pascal_context_59").classes
    assert list(classes) == sorted(classes)
    assert len(CONTEXT_IDS.split()) == len(classes)
    by_id = dict(zip(sorted(map(int, CONTEXT_IDS.split())), classes, strict=True))
    known = {2: "aeroplane", 9: "bag", 23: "bicycle", 44: "building", 59: "car", 284: "person", 458: "wood"}
    assert {index: by_id[index] for index in known} == known


def test_context_60_is_background_and_context_59() -> None:
    with_background, without = class_set("pascal_context_60"), class_set("pascal_context_59")
    assert with_background.classes[1:] == without.classes
    assert with_background.palette[1:] == without.palette


@pytest.mark.parametrize(
    ("count", "name"), [(21, "pascal_voc"), (59, "pascal_context_59"), (60, "pascal_context_60"), (150, "ade20k")]
)
def test_default_class_set_knows_the_counts_of_the_datasets(count: int, name: str) -> None:
    assert default_class_set(count) is class_set(name)


@pytest.mark.parametrize("count", [1, 19, 256, 300], ids=["one", "few", "all-8-bit-labels", "more-than-8-bit-labels"])
def test_default_class_set_of_any_other_count_is_generic_and_distinct(count: int) -> None:
    classes = default_class_set(count)
    assert classes.classes[0] == "class 0"
    assert classes.classes[-1] == f"class {count - 1}"
    assert len(set(classes.palette)) == count


def test_generic_colours_are_those_of_voc() -> None:
    assert default_class_set(256).palette[:21] == class_set("pascal_voc").palette
    assert default_class_set(256).palette[255] == (224, 224, 192)


def test_unknown_name_suggests_the_closest_and_lists_all() -> None:
    with pytest.raises(ConfigError, match=r"'ade20'.*did you mean 'ade20k'.*pascal_voc"):
        class_set("ade20")


BLACK = (0, 0, 0)


@pytest.mark.parametrize(
    ("classes", "palette", "complaint"),
    [
        pytest.param((), (), "0 classes", id="no-class"),
        pytest.param(("a", "b"), (BLACK,), "2 classes and 1 colours", id="a-colour-is-missing"),
        pytest.param(("a", "a"), (BLACK, BLACK), "'a' stands there twice", id="shares-are-keyed-by-name"),
        pytest.param(("\x1b[31m",), (BLACK,), "cannot be printed", id="a-terminal-escape-sequence"),
        pytest.param((" ",), (BLACK,), "cannot be printed", id="a-blank-name"),
        pytest.param(("a",), ((0, 0, 256),), "from 0 to 255", id="a-colour-above-255"),
        pytest.param(("a",), ((0, 0),), "three numbers", id="a-colour-of-two-numbers"),
    ],
)
def test_senseless_class_set_is_refused(
    classes: tuple[str, ...], palette: tuple[tuple[int, int, int], ...], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        ClassSet("mine", "Mine", classes, palette)


def test_no_classes_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 classes"):
        default_class_set(0)


def test_a_class_set_as_text_and_back() -> None:
    ours = ClassSet("mine", "Mine", ("Bäume", "b"), ((1, 2, 3), (4, 5, 6)))
    assert ClassSet.from_json(ours.to_json()) == ours


@pytest.mark.parametrize(
    "text",
    [
        "", "7", "{}", '{"name": "a", "title": "a", "classes": ["a"], "palette": [[0, 0]]}',
        '{"name": "a", "title": "a", "classes": [7], "palette": [[0, 0, 0]]}',
        '{"name": "a", "title": "a", "classes": ["a"], "palette": [[0, 0, 0.5]]}',
        '{"name": "a", "title": "a", "classes": ["a", "b"], "palette": [[0, 0, 0]]}', "[" * 200_000,
    ],
    ids=["empty", "number", "no-names", "two-numbers", "a-name-of-a-number", "half", "lengths", "deep"],
)  # fmt: skip
def test_text_that_is_no_class_set(text: str) -> None:
    with pytest.raises(ConfigError, match="class"):
        ClassSet.from_json(text)
