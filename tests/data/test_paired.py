"""Folders of the user's own, as people have them: which files belong together, their splits, what is wrong."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agln_fast.data.dataset import SoundSamples
from agln_fast.data.paired import PairedDataset
from agln_fast.data.registry import open_dataset
from agln_fast.errors import ConfigError, DatasetError

CLASSES = ("sky", "road", "tree")


def write(path: Path, value: int = 0, size: tuple[int, int] = (4, 3), mode: str = "", **options: Any) -> None:
    """A picture all of one value: a mask if the value is one of a few, and it is PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = mode or ("L" if path.suffix == ".png" else "RGB")
    Image.new(kind, size, value if kind == "L" else (value,) * 3).save(path, **options)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Images a to d, whose masks are all of the class number of their place; c and d are val."""
    home = tmp_path / "street"
    for index, name in enumerate("abcd"):
        write(home / f"images/{name}.jpg", 10 * index)
        write(home / f"masks/{name}.png", index % 3)
    (home / "classes.txt").write_text("\n".join(CLASSES))
    (home / "train.txt").write_text("a\nb\n")
    (home / "val.txt").write_text("c\nd\n")
    return home


def names(path: Path, split: str | None = "val", **options: Any) -> list[str]:
    return [sample.name for sample in PairedDataset(path, split, **options)]


def settings(home: Path, **values: Any) -> None:
    (home / "data.json").write_text(json.dumps(values))


def test_a_folder_that_speaks_for_itself(home: Path) -> None:
    dataset = open_dataset(home, "val")
    assert [(sample.name, int(sample.labels[0, 0])) for sample in dataset] == [("c", 2), ("d", 0)]
    image, labels, _ = dataset[-1]
    assert (image.shape, labels.shape, image.dtype, labels.dtype) == ((3, 4, 3), (3, 4), np.uint8, np.uint8)
    assert abs(int(image[0, 0, 0]) - 30) < 4
    assert (dataset.class_set.name, dataset.class_set.classes, dataset.split) == ("street", CLASSES, "val")
    assert [sample.name for sample in open_dataset(home, "train", length=1)] == ["a"]
    assert open_dataset(home, None).split == "val"
    with pytest.raises(IndexError):
        dataset[2]


@pytest.mark.parametrize(
    "line",
    [
        "c",
        "c.jpg",
        "images/c.jpg",
        "images/c",
        "./c",
        "masks/c.png",
        "  c  ",
        "{home}/images/c.jpg",
        "x/../images/c.jpg",
    ],
)
def test_lines_of_a_list_may_be_names_or_paths(home: Path, line: str) -> None:
    (home / "val.txt").write_text(line.format(home=home) + "\r\n\n")
    assert names(home) == ["c"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("c\nnone\nnix\n", "2 lines name no image here: none, nix"),
        ("c\nimages/c.jpg\n", "c stands there twice"),
        ("\n\n", "names no image"),
    ],
)
def test_lists_that_cannot_be_used(home: Path, text: str, told: str) -> None:
    (home / "val.txt").write_text(text)
    with pytest.raises(DatasetError, match=rf"val\.txt: {told}"):
        PairedDataset(home)


def test_a_line_that_may_be_two_images(home: Path) -> None:
    for folder in "xy":
        write(home / f"images/{folder}/e.jpg")
        write(home / f"masks/{folder}/e.png")
    (home / "val.txt").write_text("e")
    with pytest.raises(DatasetError, match="'e' may be any of x/e, y/e; give paths"):
        PairedDataset(home)
    (home / "val.txt").write_text("x/e")
    assert names(home) == ["x/e"]
    write(home / "images/e.jpg")  # whose own name it is
    write(home / "masks/e.png")
    (home / "val.txt").write_text("e")
    assert names(home) == ["e"]


def test_names_of_any_alphabet_with_spaces_and_any_suffix(tmp_path: Path) -> None:
    """Also where a list was written on a Mac, which takes letters apart."""
    home = tmp_path / "my data"
    apart = unicodedata.normalize("NFD", "Straße é")
    write(home / "images/Straße é.JPEG")
    write(home / "images/路 1.2.tif")
    write(home / "images/x.webp")
    write(home / f"masks/{apart}.png", 1)
    write(home / "masks/路 1.2.bmp", 2, mode="L")
    write(home / "masks/x.gif", 1, mode="L")
    (home / "classes.txt").write_text("a\nb\nc")
    (home / "val.txt").write_text(f"{apart}.JPEG\n路 1.2\nx\n", encoding="utf-8")
    found = {sample.name: int(sample.labels[0, 0]) for sample in PairedDataset(home)}
    assert found == {"Straße é": 1, "路 1.2": 2, "x": 1}


@pytest.mark.parametrize("train", ["train", "training"])
@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_splits_are_sub_folders(tmp_path: Path, train: str, val: str) -> None:
    for folder, name in ((train, "a"), (val, "a"), (val, "b"), ("extra", "c")):
        write(tmp_path / f"images/{folder}/{name}.png", mode="RGB")
        write(tmp_path / f"masks/{folder}/{name}.png")
    (tmp_path / "classes.txt").write_text("sky")
    assert names(tmp_path, "train") == [f"{train}/a"]
    assert names(tmp_path, "val") == names(tmp_path, val) == [f"{val}/a", f"{val}/b"]
    with pytest.raises(ConfigError, match=r"unknown split 'test'; known: train, val"):
        PairedDataset(tmp_path, "test")


def test_two_names_of_one_split_are_refused(home: Path) -> None:
    (home / "valid.txt").write_text("a")
    with pytest.raises(DatasetError, match="val and valid are both the split 'val'"):
        PairedDataset(home)


def test_a_gap_in_one_split_is_none_in_another(tmp_path: Path) -> None:
    for name in ("train/a", "val/b"):
        write(tmp_path / f"images/{name}.jpg")
    write(tmp_path / "masks/val/b.png")
    write(tmp_path / "masks/val/c.png")
    (tmp_path / "classes.txt").write_text("sky")
    with pytest.raises(
        DatasetError, match=r"1 of 1 in split 'train' have no partner: .*images/train/a\.jpg: has no mask"
    ):
        PairedDataset(tmp_path, "train")
    with pytest.raises(DatasetError, match=r"1 of 2 in split 'val' have no partner: .*masks/val/c\.png: has no image"):
        PairedDataset(tmp_path, "val")
    dataset = PairedDataset(tmp_path, "val", skip_gaps=True)
    assert ([sample.name for sample in dataset], len(dataset.skipped)) == (["val/b"], 1)


def test_many_gaps_are_counted_and_the_first_are_named(home: Path) -> None:
    for name in "vwxyz":
        write(home / f"images/{name}.jpg")
    (home / "val.txt").write_text("\n".join("cvwxyz"))
    with pytest.raises(DatasetError, match=r"5 of 6 in split 'val' .*v\.jpg.*w\.jpg.*x\.jpg: has no mask and 2 more"):
        PairedDataset(home)


def test_a_folder_that_is_not_divided(home: Path) -> None:
    for file in ("train.txt", "val.txt"):
        (home / file).unlink()
    assert names(home, "all") == names(home, None) == list("abcd")
    with pytest.raises(ConfigError, match="not divided into splits, so there is no 'val': give split 'all'"):
        PairedDataset(home, "val")


def test_patterns_belong_together_by_what_their_wildcards_stand_for(tmp_path: Path) -> None:
    for city, shot in (("train/ulm", "ulm_1"), ("val/bonn", "bonn_1"), ("val/bonn", "bonn_2")):
        write(tmp_path / f"left/{city}/{shot}_left.png", mode="RGB")
        write(tmp_path / f"fine/{city}/{shot}_ids.png", 1)
        write(tmp_path / f"fine/{city}/{shot}_color.png", 200)
    settings(tmp_path, images="left/**/*_left.png", masks="fine/**/*_ids.png", classes=["a", "b"])
    assert names(tmp_path, "val") == ["val/bonn/bonn_1", "val/bonn/bonn_2"]
    assert int(PairedDataset(tmp_path, "train")[0].labels[0, 0]) == 1
    settings(tmp_path, images="left/val/*/*_left.png", masks="fine/val/*/*_ids.png", classes=["a", "b"])
    assert names(tmp_path, None) == ["bonn/bonn_1", "bonn/bonn_2"]
    settings(tmp_path, images="left/train/ulm/*", masks="fine/train/ulm/*_ids.png", classes=["a", "b"])
    with pytest.raises(DatasetError, match=r"no image has the name of a mask \(ulm_1_left\.png and ulm_1_ids\.png"):
        PairedDataset(tmp_path, None)


@pytest.mark.parametrize(
    "rows",
    [
        "image,mask,split\nin put/x.jpg,out/x1.png,val\n\nin put/y.jpg,out/y1.png,train\n",
        "in put/x.jpg;out/x1.png;val\nin put/y.jpg;out/y1.png;train\n",
        "mask\tsplit\timage\nout/x1.png\tval\tin put/x.jpg\nout/y1.png\ttrain\tin put/y.jpg\n",
        '\ufeff"in put/x.jpg","out/x1.png",validation\r\n"in put/y.jpg","out/y1.png",training\r\n',
    ],
    ids=["header", "semicolons", "tabs-and-another-order", "quotes-and-mark"],
)
def test_a_csv_file_of_pairs(tmp_path: Path, rows: str) -> None:
    for index, name in enumerate("xy"):
        write(tmp_path / f"in put/{name}.jpg")
        write(tmp_path / f"out/{name}1.png", index)
    (tmp_path / "pairs.csv").write_text(rows, encoding="utf-8", newline="")
    (tmp_path / "classes.txt").write_text("a\nb")
    assert names(tmp_path, "val") == ["in put/x.jpg"]
    assert int(PairedDataset(tmp_path, "train")[0].labels[0, 0]) == 1


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("", "is empty"),
        ("image,mask\na.jpg\n", "row 1 has not the columns image, mask, but 1 cells"),
        ("a.jpg,b.png\na.jpg,b.png\n", "a.jpg stands there twice"),
        ("a.jpg,\n", "row 1 has not"),
        ("a.jpg,b.png\n", "1 of 1 in split 'all' have no partner: .*a.jpg: is no file"),
    ],
)
def test_csv_files_that_cannot_be_used(tmp_path: Path, rows: str, told: str) -> None:
    (tmp_path / "pairs.csv").write_text(rows)
    (tmp_path / "classes.txt").write_text("a")
    with pytest.raises(DatasetError, match=told):
        PairedDataset(tmp_path, None)


def test_what_data_json_says(home: Path) -> None:
    write(home / "masks/c.png", 2)
    (home / "list one.txt").write_text("c")
    settings(home, zero_is_ignored=True, classes=["road", "tree"], splits={"one": "list one.txt"})
    assert int(PairedDataset(home, "one")[0].labels[0, 0]) == 1
    settings(home, ignore=2, classes="pascal_voc")
    with pytest.raises(DatasetError, match="mask value 2 of class 'bicycle' is ignored, too"):
        PairedDataset(home)
    settings(home, ignore="none", mask_format="ids", classes="classes.txt")
    assert int(PairedDataset(home)[0].labels[0, 0]) == 2


def test_a_file_elsewhere_describes_the_folder(home: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "images: street/images\nmasks: street/masks\nclasses: street/classes.txt\nsplits: {val: street/val.txt}\n"
    )
    dataset = PairedDataset(tmp_path / "mine.yaml")
    assert [sample.name for sample in dataset] == ["c", "d"]
    assert dataset.class_set.name == "mine"


def test_binary_masks_with_ids_of_their_own(home: Path) -> None:
    for name, value in zip("cd", (0, 255), strict=True):
        write(home / f"masks/{name}.png", value)
    settings(home, classes=[{"name": "nothing", "id": 0}, {"name": "road", "id": 255}])
    assert [int(sample.labels[0, 0]) for sample in PairedDataset(home)] == [0, 1]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"imges": "x"}, "unknown key 'imges'; did you mean 'images'"),
        ({"images": 7}, "images must be a text"),
        ({"images": "nowhere"}, "nowhere: no such folder; put images there"),
        ({"masks": "nowhere/*.png"}, "nowhere: no such folder; put masks there"),
        ({"masks": "masks/*.bmp"}, "holds no masks"),
        ({"pairs": "pairs.csv", "images": "images"}, "leave out `images` and `masks`"),
        ({"pairs": "none.csv"}, "none.csv: cannot be read"),
        ({"mask_format": "colours"}, "did you mean 'colors'"),
        ({"mask_format": ["ids"]}, "unknown mask_format"),
        ({"mask_format": "colors"}, "has no colours"),
        ({"ignore": [1, 2]}, "ignore: list is no colour"),
        ({"ignore": 1.5}, "ignore: 1.5 is no colour"),
        ({"zero_is_ignored": 1}, "true or false"),
        ({"zero_is_ignored": True, "classes": [{"name": "a", "id": 1}]}, "leave one of them out"),
        ({"splits": ["train"]}, "splits needs lines"),
        ({"splits": {"val": 7}}, "splits needs lines"),
        ({"splits": {"val": "nowhere"}}, "'nowhere' is neither a list nor a sub-folder"),
        ({"classes": "none.txt"}, "'none.txt' is no list of classes"),
    ],
)
def test_senseless_settings_are_named(home: Path, values: dict[str, Any], told: str) -> None:
    settings(home, **values)
    with pytest.raises(DatasetError, match=told):
        PairedDataset(home)


def test_folders_that_say_too_little_or_too_much(home: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no such folder; needs one with images/, masks/ and classes\.txt"):
        PairedDataset(tmp_path / "none")
    with pytest.raises(DatasetError, match="is no dataset; give its folder"):
        PairedDataset(home / "images/a.jpg")
    (home / "classes.json").write_text("[]")
    with pytest.raises(DatasetError, match=r"holds classes\.json, classes\.txt; keep one"):
        PairedDataset(home)
    (home / "classes.json").unlink()
    (home / "classes.txt").unlink()
    with pytest.raises(DatasetError, match=r"has no classes\.txt; write the names"):
        PairedDataset(home)
    write(home / "images/a.png", mode="RGB")
    (home / "classes.txt").write_text("a")
    with pytest.raises(DatasetError, match="has the name of"):
        PairedDataset(home)


def animated(path: Path) -> None:
    first, second = Image.new("L", (4, 3)), Image.new("L", (4, 3), 9)
    first.save(path, "GIF", save_all=True, append_images=[second])


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:300])


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        ("masks/c.png", lambda path: write(path, 0, (3, 4)), r"c\.jpg: is 4x3, but .*c\.png is 3x4"),
        ("masks/c.png", lambda path: write(path, 7), r"c\.png: holds values that are no class: 7 on 12 pixels"),
        ("masks/c.png", lambda path: path.write_bytes(b"no picture"), r"c\.png: cannot be read as BMP"),
        ("images/c.jpg", truncated, r"c\.jpg: cannot be read"),
        ("images/c.jpg", lambda path: Image.new("I;16", (4, 3)).save(path, "PNG"), "grey of more than 8 bits"),
        ("masks/c.png", animated, "several pictures"),
    ],
    ids=["another-size", "unknown-id", "no-picture", "truncated", "16-bits", "animated"],
)
def test_damaged_samples_are_named_or_left_out(
    home: Path, file: str, damage: Callable[[Path], object], told: str
) -> None:
    damage(home / file)
    with pytest.raises(DatasetError, match=told):
        PairedDataset(home)[0]
    sound = open_dataset(home, "val", skip_bad=True)
    assert ([sample.name for sample in sound], len(sound.skipped)) == (["d"], 1)
    (home / "masks/d.png").write_bytes(b"")
    with pytest.raises(DatasetError, match="none of the 2 samples can be used; the first: "):
        SoundSamples(PairedDataset(home))


def test_a_jpeg_is_no_mask(home: Path) -> None:
    (home / "masks/c.png").unlink()
    write(home / "masks/c.jpg")
    with pytest.raises(DatasetError, match=r"masks/c\.jpg: JPEG changes values"):
        PairedDataset(home)[0]


def test_what_is_too_large_is_not_decoded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGLN_FAST_MAX_PIXELS", "11")
    with pytest.raises(DatasetError, match=r"c\.png: 4x3 pixels, above the limit of 11; .*AGLN_FAST_MAX_PIXELS"):
        PairedDataset(home)[0]
    monkeypatch.setenv("AGLN_FAST_MAX_PIXELS", "12")
    PairedDataset(home)[0]


def rotated(path: Path, orientation: int) -> None:
    """4 columns of grey that rises to the right, as stored, with a note on how to turn them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.tile(np.array([0, 80, 160, 240], np.uint8)[:, None], (3, 1, 3))).save(
        path.with_suffix(".png"), exif=exif
    )
    path.unlink()


def test_a_rotation_in_exif_is_applied_unless_the_mask_fits_the_stored_pixels(home: Path) -> None:
    rotated(home / "images/c.jpg", 6)  # upright it is 3 wide and 4 high
    image = PairedDataset(home)[0].image
    assert image[:, :, 0].tolist() == [[0, 80, 160, 240]] * 3
    write(home / "masks/c.png", size=(3, 4))
    image = PairedDataset(home)[0].image
    assert image[:, :, 0].tolist() == [[0] * 3, [80] * 3, [160] * 3, [240] * 3]
    rotated(home / "images/d.jpg", 3)  # upside down, of the same size
    assert PairedDataset(home)[1].image[0, :, 0].tolist() == [240, 160, 80, 0]


def test_links_are_followed_and_circles_are_no_trap(home: Path, tmp_path: Path) -> None:
    (home / "images").rename(tmp_path / "elsewhere")
    (home / "images").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "elsewhere/pipe.png")
    write(tmp_path / "elsewhere/.hidden.png")
    (home / "masks/._c.png").write_bytes(b"of a Mac")
    for file in ("train.txt", "val.txt"):
        (home / file).unlink()
    assert names(home, "all") == list("abcd")


def test_scenes_that_were_written_are_a_dataset(tmp_path: Path) -> None:
    from agln_fast.data.scenes import Scenes, write_scenes

    scenes = Scenes("val", size=(32, 48), length=2)
    write_scenes(scenes, tmp_path)
    for drawn, read in zip(scenes, PairedDataset(tmp_path, None), strict=True):
        np.testing.assert_array_equal(drawn.image, read.image)
        np.testing.assert_array_equal(drawn.labels, read.labels)


def test_a_name_that_is_none_and_options_that_do_not_belong(home: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"unknown dataset 'ade20'; did you mean 'ade20k'.* and the folder of your own"
    ):
        open_dataset("ade20")
    with pytest.raises(DatasetError, match="no such folder"):
        open_dataset("./ade20")
    with pytest.raises(ConfigError, match="is the folder itself"):
        open_dataset(home, root=home)
    with pytest.raises(ConfigError, match="sizes of their own"):
        open_dataset(home, size=(64, 64))
    with pytest.raises(ConfigError, match="length 0"):
        open_dataset(home, length=0)
