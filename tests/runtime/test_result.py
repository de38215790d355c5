"""Results: shares, pictures and files."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agln_fast.data import class_set, default_class_set
from agln_fast.errors import ConfigError, ImageError
from agln_fast.runtime.result import Kind, Result, Timing

TIMING = Timing(preprocess=1.0, engine=20.0, postprocess=0.5)
AEROPLANE, PERSON = (128, 0, 0), (192, 128, 128)  # of VOC


def make(labels: Any, num_classes: int = 21, dtype: type = np.uint8) -> Result:
    labels = np.asarray(labels, dtype)
    return Result(labels, np.full((*labels.shape, 3), 100, np.uint8), default_class_set(num_classes), TIMING)


@pytest.fixture
def voc() -> Result:
    """96 x 128: three quarters person, a quarter less one pixel background, one pixel aeroplane."""
    labels = np.full((96, 128), 15, np.uint8)
    labels[:24] = 0
    labels[0, 0] = 1
    return make(labels)


def test_timing_total_is_the_sum() -> None:
    assert TIMING.total == 21.5


def test_shares_are_of_the_area_and_the_largest_comes_first(voc: Result) -> None:
    assert voc.shares == {"person": 0.75, "background": 0.25 - 1 / 12288, "aeroplane": 1 / 12288}
    assert voc.names == ["person", "background", "aeroplane"]


def test_equal_shares_come_in_the_order_of_the_classes() -> None:
    assert make([[20, 3], [3, 20]]).names == ["bird", "tvmonitor"]


def test_repr_is_one_short_line(voc: Result) -> None:
    text = "<Result 128x96, 3 classes: person 75.0%, background 25.0%, aeroplane <0.1%; 21.5 ms>"
    assert repr(voc) == text


@pytest.mark.parametrize(
    ("alpha", "pixel"),
    [
        pytest.param(0.0, (100, 100, 100), id="image-alone"),
        pytest.param(0.5, (146, 114, 114), id="half-way-to-person"),
        pytest.param(1.0, PERSON, id="colours-alone"),
    ],
)
def test_overlay_blends_the_palette(alpha: float, pixel: tuple[int, int, int], voc: Result) -> None:
    overlay = voc.overlay(alpha, legend=False)
    assert overlay.mode == "RGB"
    assert overlay.size == (128, 96)
    assert overlay.getpixel((64, 80)) == pixel


def test_legend_stands_beside_an_unchanged_picture(voc: Result) -> None:
    plain, page = voc.overlay(legend=False), voc.overlay()
    assert page.height == plain.height
    assert page.crop((0, 0, *plain.size)).tobytes() == plain.tobytes()
    assert {PERSON, AEROPLANE, (0, 0, 0)} <= panel_colours(voc, page)


def panel_colours(result: Result, page: Image.Image) -> set[Any]:
    panel = page.crop((result.labels.shape[1], 0, *page.size))
    return {colour for _, colour in panel.getcolors(panel.width * panel.height) or []}


def test_legend_shows_the_twelve_largest_classes() -> None:
    labels = np.repeat(np.arange(20), np.arange(20, 0, -1) * 20).reshape(1, -1).repeat(300, 0)
    result = make(labels)  # class 0 is the largest, 19 the smallest
    shown = panel_colours(result, result.overlay()) & set(result.class_set.palette)
    assert shown == set(class_set("pascal_voc").palette[:12])


@pytest.mark.parametrize("size", [(1, 1), (100, 100), (40, 1000), (1000, 40)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_legend_of_twelve_rows_is_never_cut(size: tuple[int, int]) -> None:
    labels = np.arange(size[0] * size[1]).reshape(size) % 12
    result = make(labels)
    page = np.asarray(result.overlay())[:, size[1] :]
    margin = 3  # pixels, below the smallest font's
    for border in (page[:margin], page[-margin:], page[:, :margin], page[:, -margin:]):
        assert (border == page[0, 0]).all()


def test_legend_grows_with_the_picture() -> None:
    small, large = (make(np.zeros((side, side))).overlay().width - side for side in (512, 2048))
    # Margins, box, name and share are each rounded to a pixel, which is four in the large picture.
    assert large == pytest.approx(4 * small, abs=4 * 5 / 2)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_senseless_alpha_is_refused(alpha: float, voc: Result) -> None:
    with pytest.raises(ConfigError, match=r"alpha .* from 0 to 1"):
        voc.overlay(alpha)


def test_label_image_is_the_ids_with_the_palette(voc: Result) -> None:
    image = voc.label_image()
    assert image.mode == "P"
    np.testing.assert_array_equal(np.asarray(image), voc.labels)
    assert image.convert("RGB").getpixel((0, 0)) == AEROPLANE


def test_label_image_of_more_than_256_classes_has_16_bits() -> None:
    image = make([[0, 299]], num_classes=300, dtype=np.int32).label_image()
    assert image.mode == "I;16"
    assert np.asarray(image).tolist() == [[0, 299]]


@pytest.mark.parametrize("suffix", ["png", "PNG", "tif", "tiff", "bmp", "jpg", "jpeg", "webp"])
def test_save_writes_the_overlay_by_default(suffix: str, voc: Result, tmp_path: Path) -> None:
    voc.save(tmp_path / f"street.{suffix}")
    assert os.listdir(tmp_path) == [f"street.{suffix}"]
    with Image.open(tmp_path / f"street.{suffix}") as image:
        assert image.size == voc.overlay().size
        if suffix not in ("jpg", "jpeg", "webp"):
            assert image.tobytes() == voc.overlay().tobytes()


@pytest.mark.parametrize("suffix", ["png", "tif", "tiff"])
@pytest.mark.parametrize(("count", "dtype"), [(21, np.uint8), (300, np.int32)], ids=["8-bit", "16-bit"])
def test_saved_labels_are_exact(suffix: str, count: int, dtype: type, tmp_path: Path) -> None:
    result = make(np.arange(21 * 20).reshape(21, 20) % count, count, dtype)
    result.save(str(tmp_path / f"labels.{suffix}"), kind="labels")
    with Image.open(tmp_path / f"labels.{suffix}") as image:
        np.testing.assert_array_equal(np.asarray(image), result.labels)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        pytest.param("street.xyz", "overlay", r"suffix '\.xyz' is none for overlay: use \.png, ", id="unknown-suffix"),
        pytest.param("street", "overlay", "suffix '' is none for overlay", id="no-suffix"),
        pytest.param("labels.jpg", "labels", r"suffix '\.jpg' is none for labels: use \.png, ", id="lossy-labels"),
        pytest.param("nowhere/street.png", "overlay", r"cannot be written \(No such file", id="missing-folder"),
        pytest.param("taken.png", "overlay", r"cannot be written \(Is a directory", id="a-folder-has-that-name"),
    ],
)
def test_unwritable_path_is_one_clear_error(name: str, kind: Kind, message: str, voc: Result, tmp_path: Path) -> None:
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(ImageError, match=message):
        voc.save(tmp_path / name, kind)
    assert os.listdir(tmp_path) == ["taken.png"]


def test_full_disk_leaves_the_old_file_alone(voc: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(self: Image.Image, file: Path, format: str, **options: Any) -> None:  # noqa: A002  # Pillow's own name
        file.write_bytes(b"half a picture")
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "street.png"
    path.write_text("old")
    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(
        ImageError, match=r"street\.png: cannot be written \(No space left on device\); free some space"
    ):
        voc.save(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["street.png"]


def test_picture_too_large_for_its_format_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"wide\.webp: cannot be written \(.*16383"):
        make(np.zeros((1, 17_000))).save(tmp_path / "wide.webp")  # WebP ends at 16383
    assert os.listdir(tmp_path) == []


def test_unknown_kind_is_refused(voc: Result, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown kind 'label'; did you mean 'labels'.* known: overlay, labels"):
        voc.save(tmp_path / "street.png", "label")  # type: ignore[arg-type]
