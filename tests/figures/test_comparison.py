"""The comparison in the manner of Fig. 6: scores, marked errors, colours, the figure itself, and how it is saved."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from agln_fast.data.classes import ClassSet, class_set
from agln_fast.errors import ConfigError, ImageError, MissingPackageError
from agln_fast.figures.comparison import (
    Example,
    Legend,
    class_colours,
    describe_score,
    draw_comparison,
    main_errors,
    panel_height,
)
from agln_fast.figures.saving import save_figure

CLASSES = ClassSet("three", "Three", ("sky", "$\\road$", "tree"), ((112, 168, 220), (92, 92, 98), (28, 110, 52)))


@pytest.fixture
def example():
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    truth = np.zeros((48, 64), np.uint8)
    truth[24:] = 1
    truth[:2] = 255
    wrong = truth.copy()
    wrong[:2] = 0
    good = wrong.copy()
    wrong[4:20, 8:30] = 2
    return Example(image, truth, (good, wrong), r"$\scene$")


def test_score_in_words():
    truth = np.array([[0, 0, 1, 1], [2, 2, 255, 255]], np.uint8)
    labels = np.array([[0, 1, 1, 1], [2, 2, 0, 3]], np.uint8)
    # Intersection over union: 1/2, 2/3, 2/2; class 3 occurs nowhere but under ignored pixels.
    assert describe_score(truth, labels, 4) == "mIoU 72.2%, pixels 83.3%"
    assert describe_score(np.full((2, 2), 255, np.uint8), np.zeros((2, 2), np.uint8), 3) == "nothing is labelled"


def test_main_errors_are_the_thick_ones():
    truth = np.zeros((48, 72), np.uint8)
    labels = truth.copy()
    labels[0:10, 60:72] = 1  # a corner: the border of the image is not an error's edge
    labels[20:22] = 1  # thinner than 3 = 72 // 24
    truth[30:40, 10:20] = 255
    labels[30:40, 10:20] = 2  # ignored
    expected = np.zeros((48, 72), bool)
    expected[0:10, 60:72] = True
    np.testing.assert_array_equal(main_errors(truth, labels), expected)


def test_main_errors_scale_with_the_image():
    truth = np.zeros((480, 600), np.uint8)
    labels = truth.copy()
    labels[100:119, 100:200] = 1  # 19 rows, one less than the square of 480 // 24
    labels[200:220, 100:200] = 1
    found = main_errors(truth, labels)
    assert not found[:200].any()
    assert found.sum() == 20 * 100


def test_class_colours():
    labels = np.array([[0, 2, 255]], np.uint8)
    colours = class_colours(labels, CLASSES)
    np.testing.assert_array_equal(colours[0, :2], [(112, 168, 220), (28, 110, 52)])
    assert colours[0, 2].min() > 230
    image = np.array([[[10, 20, 30]] * 3], np.uint8)
    np.testing.assert_array_equal(class_colours(labels, CLASSES, image, 0.0), image)
    half = class_colours(labels, CLASSES, image, 0.5).astype(int)
    assert abs(half - (image.astype(int) + colours) / 2).max() <= 1


def test_legend_names_what_occurs_largest_first(example):
    assert Legend(CLASSES, [example.truth, example.predictions[1]], 4.0).names == ["$\\road$", "sky", "tree", "ignored"]


def test_long_legends_are_cut():
    names = class_set("ade20k")
    every = np.arange(150, dtype=np.uint8)[None]
    assert len(Legend(names, [every], 6.0).names) == 150
    figure = draw_comparison([Example(np.zeros((1, 150, 3), np.uint8), every, ())], (), names)
    shown = texts(figure)
    rest = next(text for text in shown if text.startswith("+ "))
    assert int(rest.split()[1]) + sum(name in shown for name in names.classes) == 150


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_figure_has_a_row_per_example_and_a_column_per_network(example):
    unknown = Example(example.image[:, :40], None, [labels[:, :40] for labels in example.predictions], "photograph")
    figure = draw_comparison([example, unknown], ["FPN", "AGLN"], CLASSES)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(shown) == 4 + 3
    np.testing.assert_array_equal(shown[0], example.image)
    for picture, labels in zip(shown[1:4], (example.truth, *example.predictions), strict=True):
        np.testing.assert_array_equal(picture, class_colours(labels, CLASSES))
    np.testing.assert_array_equal(shown[4], unknown.image)
    words = texts(figure)
    assert words.count("FPN") == words.count("AGLN") == 2
    assert words.count("ground truth") == words.count("no ground truth") == 1
    assert "mIoU 100.0%, pixels 100.0%" in words
    assert {r"$\scene$", "photograph", "64×48", "40×48", "sky", "$\\road$", "tree", "ignored"} <= set(words)
    # 352 of the 1408 pixels of class 0, of 2944 in all, are taken for class 2: IoU 3/4, 1, 0.
    assert "mIoU 58.3%, pixels 88.0%" in words
    assert sum(text.startswith("mIoU") for text in words) == 2


@pytest.mark.parametrize("contours", [True, False], ids=["marked", "unmarked"])
def test_errors_are_outlined(example, contours):
    figure = draw_comparison([example], ["good", "wrong"], CLASSES, contours=contours)
    outlined = [len(axes.collections) for axes in figure.axes if axes.images]
    assert outlined == [0, 0, 0, 2 if contours else 0]
    if contours:
        x, y = figure.axes[3].collections[-1].get_paths()[0].vertices.T
        assert (x.min(), x.max(), y.min(), y.max()) == (7.5, 29.5, 3.5, 19.5)


def test_nothing_labelled_is_said(example):
    blank = Example(example.image, np.full((48, 64), 255, np.uint8), example.predictions)
    assert texts(draw_comparison([blank], ["a", "b"], CLASSES)).count("nothing is labelled") == 2


def test_alpha_blends(example):
    figure = draw_comparison([example], ["a", "b"], CLASSES, alpha=0)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert all((picture == example.image).all() for picture in shown)


def test_panels_and_captions_are_apart(example):
    wide = Example(np.zeros((30, 400, 3), np.uint8), None, [np.zeros((30, 400), np.uint8)] * 2)
    figure = draw_comparison([example, wide, example], ["FPN", "AGLN"], CLASSES)
    figure.canvas.draw()
    boxes = [axes.get_window_extent() for axes in figure.axes if axes.images]
    captions = [text.get_window_extent() for axes in figure.axes for text in axes.texts if text.get_text()]
    assert len({round(box.width, 3) for box in boxes}) == 1
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    assert not any(one.overlaps(other) for i, one in enumerate(captions) for other in captions[:i])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height for box in captions)


def test_panel_height_is_bounded():
    heights = [panel_height(np.zeros((*size, 3), np.uint8), 2.0) for size in ((50, 100), (1, 100), (100, 1))]
    assert heights == [1.0, 0.6, 5.0]


@pytest.mark.parametrize(
    ("change", "networks", "options", "message"),
    [
        ({}, ["FPN"], {}, "2 predictions for 1 networks"),
        ({}, ["FPN", "AGLN"], {"alpha": 1.5}, "alpha 1.5"),
        ({"truth": np.zeros((48, 63), np.uint8)}, ["FPN", "AGLN"], {}, "sizes must be equal"),
        ({"truth": np.full((48, 64), 3, np.uint8)}, ["FPN", "AGLN"], {}, "class id 3"),
        ({"truth": np.full((48, 64), -1, np.int32)}, ["FPN", "AGLN"], {}, "class id -1"),
    ],
    ids=["names", "alpha", "size", "class id", "negative id"],
)
def test_refused(example, change, networks, options, message):
    values = {"image": example.image, "truth": example.truth, "predictions": example.predictions, **change}
    with pytest.raises(ConfigError, match=message):
        draw_comparison([Example(**values)], networks, CLASSES, **options)


def test_refused_nothing():
    with pytest.raises(ConfigError, match="at least one"):
        draw_comparison([], ["FPN"], CLASSES)


def test_matplotlib_is_optional(example, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="matplotlib"):
        draw_comparison([example], ["a", "b"], CLASSES)


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_saved_bytes_are_deterministic(example, tmp_path, suffix):
    files = [tmp_path / f"{name}{suffix}" for name in "ab"]
    for file in files:
        save_figure(draw_comparison([example], ["FPN", "AGLN"], CLASSES), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert sorted(tmp_path.iterdir()) == files
    if suffix == ".png":
        assert np.asarray(Image.open(files[0]).convert("L")).std() > 20


def test_nothing_is_left_of_a_file_that_could_not_be_written(example, tmp_path, monkeypatch):
    figure = draw_comparison([example], ["a", "b"], CLASSES)
    (tmp_path / "a.png").write_bytes(b"old")

    def full(file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", full)
    with pytest.raises(ImageError, match=r"a\.png: cannot be written \(No space left"):
        save_figure(figure, tmp_path / "a.png")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.png", b"old")]


def test_pyplot_is_not_imported(example):
    sys.modules.pop("matplotlib.pyplot", None)
    draw_comparison([example], ["a", "b"], CLASSES)
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(("name", "message"), [("a.jpg", "suffix '.jpg'"), ("no/a.png", "cannot be written")])
def test_refused_files(example, tmp_path, name, message):
    with pytest.raises(ImageError, match=message):
        save_figure(draw_comparison([example], ["a", "b"], CLASSES), tmp_path / name)
    assert not list(tmp_path.iterdir())
