"""Datasets on disk, in tiny trees of the published layouts: what a pixel becomes, and that every gap is named."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from agln_fast.data.readers import ADE20K, FolderDataset, PascalContext, PascalVOC
from agln_fast.data.registry import DATASETS, open_dataset
from agln_fast.data.scenes import Scenes
from agln_fast.errors import ConfigError, DatasetError

CONTEXT = "SegmentationClassContext"


def write_image(path: Path, size: tuple[int, int] = (4, 3), **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (200, 0, 0)).save(path, **options)


def write_mask(path: Path, values: Sequence[int], size: tuple[int, int] = (4, 3), mode: str = "L") -> None:
    """The first pixels are `values`, the rest repeats the last of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    pixels = [*values, *[values[-1]] * (width * height - len(values))]
    image = Image.fromarray(np.array(pixels, np.uint8).reshape(height, width))
    if mode == "P":
        image.putpalette([number for index in range(256) for number in (255 - index, index, 7)])
    elif mode != "L":
        image = image.convert(mode)
    image.save(path)


def write_list(path: Path, *names: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Images a (train), b (val), c (SBD alone); the list trainaug has a and c, the masks of SBD are of c alone."""
    home = tmp_path / "data" / "VOCdevkit" / "VOC2012"
    for name, lists in {"a": ("train", "trainval", "trainaug"), "b": ("val", "trainval"), "c": ("trainaug",)}.items():
        write_image(home / f"JPEGImages/{name}.jpg")
        for split in lists:
            path = home / f"ImageSets/Segmentation/{split}.txt"
            write_list(path, *(path.read_text().split() if path.exists() else ()), name)
    write_mask(home / "SegmentationClass/a.png", [0, 1, 20, 255], mode="P")
    write_mask(home / "SegmentationClass/b.png", [15], mode="P")
    write_mask(home / "SegmentationClassAug/c.png", [3])
    return home


@pytest.fixture
def context(tmp_path: Path) -> Path:
    home = tmp_path / "data" / "VOCdevkit" / "VOC2010"
    for split, name in (("train", "2008_000002"), ("val", "2008_000003")):
        write_image(home / f"JPEGImages/{name}.jpg")
        write_mask(home / f"{CONTEXT}/{name}.png", [0, 1, 59])
        write_list(home / f"ImageSets/SegmentationContext/{split}.txt", name)
    return home


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    home = tmp_path / "data" / "ADEChallengeData2016"
    for folder, name in (
        ("training", "ADE_train_00000002"),
        ("training", "ADE_train_00000001"),
        ("validation", "ADE_val_00000001"),
    ):
        write_image(home / f"images/{folder}/{name}.jpg")
        write_mask(home / f"annotations/{folder}/{name}.png", [0, 1, 150])
    return home


def first_pixels(dataset: FolderDataset) -> list[int]:
    labels = dataset[0].labels
    assert labels.dtype == np.uint8
    assert labels.shape == (3, 4)
    pixels: list[int] = labels.ravel().tolist()
    return pixels


def test_voc_masks_are_palette_indices_and_255_stays_ignored(voc: Path) -> None:
    dataset = PascalVOC(voc, "train")
    assert first_pixels(dataset)[:4] == [0, 1, 20, 255]
    assert dataset.class_set.name == "pascal_voc"
    image, _, name = dataset[0]
    assert image.dtype == np.uint8
    assert (image.shape, name) == ((3, 4, 3), "a")
    np.testing.assert_allclose(image[0, 0].tolist(), [200, 0, 0], atol=4)


@pytest.mark.parametrize(
    ("split", "names"),
    [
        pytest.param("train", ["a"], id="train"),
        pytest.param("val", ["b"], id="val"),
        pytest.param("trainval", ["a", "b"], id="trainval"),
        pytest.param("trainaug", ["a", "c"], id="trainaug"),
        pytest.param("train_aug", ["a", "c"], id="trainaug-in-another-spelling"),
    ],
)
def test_voc_split_is_the_published_list(voc: Path, split: str, names: list[str]) -> None:
    dataset = PascalVOC(voc, split)
    assert len(dataset) == len(names)
    assert [sample.name for sample in dataset] == names  # type: ignore[attr-defined]  # by __getitem__ and IndexError
    assert dataset.split == split.replace("_", "")


def test_trainaug_takes_masks_of_sbd_and_where_it_has_none_those_of_voc(voc: Path) -> None:
    assert [sample.labels[0, 1] for sample in map(PascalVOC(voc, "trainaug").__getitem__, (0, 1))] == [1, 3]
    write_mask(voc / "SegmentationClassAug/a.png", [7])
    assert PascalVOC(voc, "trainaug")[0].labels[0, 1] == 7
    assert PascalVOC(voc, "train")[0].labels[0, 1] == 1


def test_trainaug_without_its_list_says_where_it_comes_from(voc: Path) -> None:
    (voc / "ImageSets/Segmentation/trainaug.txt").unlink()
    with pytest.raises(DatasetError, match=r"trainaug\.txt   <- missing[\s\S]*SBD .*voc_aug\.py"):
        PascalVOC(voc, "trainaug")


@pytest.mark.parametrize(
    ("num_classes", "labels"),
    [
        pytest.param(59, [255, 0, 58], id="59-ignores-background-and-shifts"),
        pytest.param(60, [0, 1, 59], id="60-takes-the-ids-as-they-are"),
    ],
)
def test_context_labels(context: Path, num_classes: int, labels: list[int]) -> None:
    dataset = PascalContext(context, "val", num_classes)
    assert first_pixels(dataset)[:3] == labels
    assert len(dataset.class_set.classes) == num_classes
    assert dataset[0].name == "2008_000003"
    assert PascalContext(context, "train", num_classes)[0].name == "2008_000002"


def test_context_has_59_or_60_classes(context: Path) -> None:
    with pytest.raises(ConfigError, match="59 classes, or 60 with background; not 459"):
        PascalContext(context, "val", 459)


@pytest.mark.parametrize(("split", "folder"), [("train", "training"), ("val", "validation")])
def test_ade_ignores_0_and_shifts_under_both_names_of_a_split(ade: Path, split: str, folder: str) -> None:
    for dataset in (ADE20K(ade, split), ADE20K(ade, folder)):
        assert dataset.split == split
        assert first_pixels(dataset)[:3] == [255, 0, 149]
        assert dataset[0].name == f"ADE_{split}_00000001"  # sorted, not as the folder happens to list them


def test_files_that_macos_leaves_behind_are_no_samples(ade: Path) -> None:
    (ade / "images/validation/._ADE_val_00000001.jpg").write_bytes(b"\0")
    assert len(ADE20K(ade, "val")) == 1


@pytest.mark.parametrize("up", [0, 1, 2], ids=["folder-itself", "one-above", "two-above"])
def test_root_may_lie_above_the_dataset(voc: Path, context: Path, ade: Path, up: int) -> None:
    assert len(PascalVOC((voc, *voc.parents)[up], "val")) == 1
    assert len(PascalContext(str((context, *context.parents)[up]), "val")) == 1
    assert len(ADE20K((ade, *ade.parents)[min(up, 1)], "val")) == 1


def test_index_counts_from_either_end_and_stops_there(ade: Path) -> None:
    dataset = ADE20K(ade, "train")
    assert dataset[-1].name == dataset[1].name == "ADE_train_00000002"
    for index in (2, -3):
        with pytest.raises(IndexError):
            dataset[index]


def test_length_takes_the_first_samples(ade: Path) -> None:
    assert [sample.name for sample in ADE20K(ade, "train", length=1)] == ["ADE_train_00000001"]  # type: ignore[attr-defined]
    assert len(ADE20K(ade, "train", length=9)) == 2
    with pytest.raises(ConfigError, match="length 0: must be at least 1"):
        ADE20K(ade, "train", length=0)


def test_pickled_dataset_reads_the_same_and_works_in_a_loader(context: Path) -> None:
    dataset = PascalContext(context, "val", 60)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.class_set == dataset.class_set
    np.testing.assert_array_equal(again[0].labels, dataset[0].labels)
    (batch,) = DataLoader(dataset)  # type: ignore[arg-type]
    assert batch.labels.shape == (1, 3, 4)


def test_rotation_noted_in_exif_is_not_applied_because_the_mask_has_none(voc: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    write_image(voc / "JPEGImages/a.jpg", exif=exif)
    assert PascalVOC(voc, "train")[0].image.shape == (3, 4, 3)


def test_grey_image_becomes_rgb(voc: Path) -> None:
    Image.new("L", (4, 3), 90).save(voc / "JPEGImages/a.jpg")
    np.testing.assert_array_equal(PascalVOC(voc, "train")[0].image, np.full((3, 4, 3), 90))


@pytest.mark.parametrize(
    ("kind", "value", "complaint"),
    [
        pytest.param("pascal_voc", 21, "value 21; PASCAL VOC 2012 has 0 to 20 and 255", id="voc-above-the-last-class"),
        pytest.param("pascal_voc", 254, "value 254", id="voc-below-the-ignored"),
        pytest.param("pascal_context_59", 60, "value 60; .* has 1 to 59 and 0", id="context-59-above-the-last-class"),
        pytest.param("pascal_context_60", 60, "value 60; .* has 0 to 59$", id="context-60-above-the-last-class"),
        pytest.param("pascal_context_60", 255, "value 255", id="context-60-shifted-already"),
        pytest.param("ade20k", 151, "value 151; .* has 1 to 150 and 0", id="ade-above-the-last-class"),
        pytest.param("ade20k", 255, "value 255", id="ade-shifted-already"),
    ],
)
def test_mask_value_that_is_no_class_is_named(
    voc: Path, context: Path, ade: Path, kind: str, value: int, complaint: str
) -> None:
    root = {"pascal_voc": voc, "ade20k": ade}.get(kind, context)
    dataset = open_dataset(kind, "val", root)
    (mask,) = root.rglob(f"{dataset[0].name}.png")
    write_mask(mask, [1, value])
    with pytest.raises(DatasetError, match=rf"{mask.name}: holds the {complaint}"):
        dataset[0]


def test_image_and_mask_of_different_size_are_both_named(voc: Path) -> None:
    write_mask(voc / "SegmentationClass/a.png", [0], size=(3, 4))
    with pytest.raises(DatasetError, match=r"JPEGImages/a\.jpg: is 4x3, but .*SegmentationClass/a\.png is 3x4"):
        PascalVOC(voc, "train")[0]


@pytest.mark.parametrize("file", ["JPEGImages/a.jpg", "SegmentationClass/a.png"])
@pytest.mark.parametrize(
    "keep",
    [pytest.param(0, id="empty"), pytest.param(20, id="header-cut"), pytest.param(-25, id="pixels-cut")],
)
def test_truncated_file_is_named(voc: Path, file: str, keep: int) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(voc / "JPEGImages/a.jpg")
    Image.fromarray(rng.integers(0, 21, (64, 64), np.uint8)).save(voc / "SegmentationClass/a.png")
    dataset = PascalVOC(voc, "train")
    assert dataset[0].labels.shape == (64, 64)
    (voc / file).write_bytes((voc / file).read_bytes()[:keep])
    with pytest.raises(DatasetError, match=rf"{file}: cannot be read as (JPEG|PNG) \(.+\); restore it"):
        dataset[0]


@pytest.mark.parametrize("mode", ["RGB", "1", "LA"])
def test_mask_drawn_in_colours_is_no_label_map(voc: Path, mode: str) -> None:
    write_mask(voc / "SegmentationClass/a.png", [1], mode=mode)
    with pytest.raises(DatasetError, match=rf"a\.png: is of mode {mode}; a mask needs palette indices or 8-bit grey"):
        PascalVOC(voc, "train")[0]


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        pytest.param([], "names no image; restore it from PASCAL VOC 2012", id="empty"),
        pytest.param(["", " "], "names no image", id="blank-lines"),
        pytest.param(["a", "zebra"], r"zebra has no .*JPEGImages/zebra\.jpg", id="nothing-of-that-name"),
        pytest.param(["c"], r"c has no .*SegmentationClass/c\.png", id="no-mask"),
        pytest.param(["d"], r"d has no .*JPEGImages/d\.jpg", id="no-image"),
        pytest.param(["a", "b", "a"], "a stands there twice", id="twice"),
        pytest.param(["../JPEGImages/a"], "'../JPEGImages/a' is no image name", id="out-of-the-folder"),
        pytest.param(["../../../../etc/passwd"], "is no image name", id="hostile"),
        pytest.param(["/etc/passwd"], "is no image name", id="absolute"),
        pytest.param([r"..\a"], "is no image name", id="backslash"),
        pytest.param([".."], "is no image name", id="parent"),
        pytest.param(["\x1b[31ma"], r"'\\x1b\[31ma' is no image name", id="terminal-escape-sequence"),
        pytest.param(["a 1"], "'a 1' is no image name", id="list-of-another-task"),
    ],
)
def test_list_that_cannot_be_used(voc: Path, names: list[str], complaint: str) -> None:
    write_mask(voc / "SegmentationClass/d.png", [0])
    write_list(voc / "ImageSets/Segmentation/train.txt", *names)
    with pytest.raises(DatasetError, match=rf"train\.txt: .*{complaint}"):
        PascalVOC(voc, "train")


def test_list_of_bytes_that_are_no_text(voc: Path) -> None:
    (voc / "ImageSets/Segmentation/train.txt").write_bytes(b"\xff\xfe\n")
    with pytest.raises(DatasetError, match="is no image name"):
        PascalVOC(voc, "train")


def test_list_with_carriage_returns(voc: Path) -> None:
    (voc / "ImageSets/Segmentation/train.txt").write_bytes(b"a\r\nb")
    assert len(PascalVOC(voc, "train")) == 2


@pytest.mark.parametrize(
    ("lost", "complaint"),
    [
        pytest.param("annotations", r"has no .*annotations/validation/ADE_val_00000001\.png", id="image-without-mask"),
        pytest.param("images", r"has no .*images/validation/ADE_val_00000001\.jpg", id="mask-without-image"),
        pytest.param("*", "images/validation: names no image; restore it from ADE20K", id="nothing-at-all"),
    ],
)
def test_gap_in_folders_without_a_list(ade: Path, lost: str, complaint: str) -> None:
    for path in list(ade.glob(f"{lost}/validation/*")):
        path.unlink()
    with pytest.raises(DatasetError, match=complaint):
        ADE20K(ade, "val")


def test_missing_folder_is_marked_in_the_tree_of_the_dataset(voc: Path) -> None:
    (voc / "SegmentationClass").rename(voc / "elsewhere")
    with pytest.raises(DatasetError) as raised:
        PascalVOC(voc.parent.parent, "val")
    head, home, *tree, download = str(raised.value).split("\n")
    assert head.startswith(f"{voc.parent.parent}: holds no complete split 'val' of PASCAL VOC 2012; expected")
    assert home == str(voc)
    assert tree == [
        "├── ImageSets/Segmentation/val.txt",
        "├── JPEGImages/*.jpg",
        "└── SegmentationClass/*.png   <- missing",
    ]
    assert download.startswith("from PASCAL VOC 2012: VOCtrainval_11-May-2012.tar from the PASCAL VOC homepage")


@pytest.mark.parametrize("kind", [PascalVOC, PascalContext, ADE20K])
def test_missing_root_marks_everything(kind: type[FolderDataset], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nowhere: holds no complete") as raised:
        kind(tmp_path / "nowhere", "val")
    tree = [line for line in str(raised.value).split("\n") if line[0] in "├└"]
    assert len(tree) >= 2
    assert all(line.endswith("<- missing") for line in tree)


def test_file_in_the_place_of_a_folder_is_missing(voc: Path) -> None:
    (voc / "JPEGImages").rename(voc / "elsewhere")
    (voc / "JPEGImages").touch()
    with pytest.raises(DatasetError, match=r"JPEGImages/\*\.jpg   <- missing"):
        PascalVOC(voc, "val")


@pytest.mark.parametrize(
    ("kind", "split", "complaint"),
    [
        pytest.param(PascalVOC, "trian", "did you mean 'train'.*known: train, val, trainval, trainaug", id="voc"),
        pytest.param(PascalVOC, "test", "unknown split 'test'", id="voc-test-has-no-masks"),
        pytest.param(PascalContext, "trainaug", "PascalContext: unknown split 'trainaug'", id="context"),
        pytest.param(ADE20K, "vals", "did you mean 'val'", id="ade"),
    ],
)
def test_unknown_split(kind: type[FolderDataset], split: str, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=complaint):
        kind(tmp_path, split)


def test_every_registered_dataset_opens_with_the_class_set_of_its_name(voc: Path, context: Path, ade: Path) -> None:
    roots = {"scenes": None, "pascal_voc": voc, "ade20k": ade}
    for name in DATASETS:
        dataset = open_dataset(name, root=roots.get(name, context), length=1)
        assert dataset.class_set.name == name
        assert (dataset.split, len(dataset)) == ("val", 1)


def test_size_length_and_seed_reach_the_scenes() -> None:
    dataset = open_dataset("scenes", "train", size=(64, 96), length=3, seed=7)
    assert isinstance(dataset, Scenes)
    assert (dataset.split, dataset.size, len(dataset), dataset.seed) == ("train", (64, 96), 3, 7)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param({"name": "ade20"}, "unknown dataset 'ade20'; did you mean 'ade20k'", id="unknown-name"),
        pytest.param(
            {"name": "scenes", "root": "x"}, "'scenes' is drawn, not read: .*--data-root", id="scenes-in-a-root"
        ),
        pytest.param(
            {"name": "pascal_voc", "split": "train_aug"},
            r"--data-root .*\nVOCdevkit/VOC2012\n[\s\S]*trainaug\.txt[\s\S]*SegmentationClassAug",
            id="no-root",
        ),
        pytest.param({"name": "ade20k", "split": "tests"}, "unknown split 'tests'", id="unknown-split-without-root"),
        pytest.param({"name": "ade20k", "root": "x", "size": (64, 96)}, "size 64x96: .*'ade20k'", id="size-of-images"),
    ],
)
def test_open_dataset_refuses(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        open_dataset(**arguments)
