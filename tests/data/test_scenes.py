"""Scenes: reproducible, geometrically true, and hard in the ways they are meant to be."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from agln_fast.data.canvas import Camera, Canvas, Part, noise
from agln_fast.data.dataset import CachedDataset
from agln_fast.data.scenes import _SPLITS, BUILDING, ROAD, SKY, WALL, WATER, Scenes, write_scenes
from agln_fast.errors import ConfigError, DatasetError


def test_a_scene_depends_on_seed_split_number_and_nothing_else() -> None:
    first, again = Scenes("train")[3], pickle.loads(pickle.dumps(Scenes("train", length=5)))[3]
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.labels, again.labels)
    others = [Scenes("val")[3], Scenes("train")[4], Scenes("train", seed=1)[3]]
    assert not any(np.array_equal(first.labels, other.labels) for other in others)
    assert len({sample.name for sample in [first, *others[:2]]}) == 3


@pytest.mark.parametrize("size", [(128, 128), (64, 96), (33, 200)])
def test_any_size(size: tuple[int, int]) -> None:
    image, labels, _ = Scenes("val", size=size)[0]
    assert (image.shape, image.dtype) == ((*size, 3), np.uint8)
    assert (labels.shape, labels.dtype) == (size, np.uint8)
    assert image.flags.c_contiguous
    assert labels.flags.c_contiguous


def test_the_layout_is_the_same_at_every_size() -> None:
    small, large = (Scenes("val", size=(side, side)) for side in (64, 128))
    equal = [np.mean(small[i].labels == large[i].labels[::2, ::2]) for i in range(8)]
    assert min(equal) > 0.8  # thin things are one pixel wide at any size
    assert np.mean(equal) > 0.93


def test_every_class_is_common_and_sizes_differ_by_far() -> None:
    scenes = Scenes("train", size=(64, 64), length=120)
    present = np.array([np.bincount(scenes[i].labels.ravel(), minlength=12) for i in range(120)])
    in_share_of_scenes = (present > 0).mean(0)
    assert in_share_of_scenes.min() > 0.2
    pixels = present.sum(0) / present.sum()
    assert pixels.max() < 0.4
    thin = pixels[-3:]  # person, pole, fence
    assert 0.002 < thin.min() < thin.max() < 0.05


def test_some_regions_cannot_be_told_by_their_colour() -> None:
    """Somewhere water has the colour of the sky, and walls that of the road; elsewhere they differ."""
    scenes = Scenes("train", length=150)
    differences: dict[tuple[int, int], list[float]] = {(SKY, WATER): [], (ROAD, WALL): []}
    for index in range(150):
        image, labels, _ = scenes[index]
        for (a, b), found in differences.items():
            if min(np.sum(labels == a), np.sum(labels == b)) > 300:
                found.append(float(np.abs(image[labels == a].mean(0) - image[labels == b].mean(0)).max()))
    for found in differences.values():
        assert len(found) > 10
        assert np.quantile(found, 0.25) < 20
        assert max(found) > 50


def test_sky_is_above_water_and_road_behind_nothing() -> None:
    """In a scene the lowest sky lies at the horizon or behind something that stands on the ground."""
    seen = {WATER: 0, ROAD: 0}
    for index in range(30):
        labels = Scenes("val")[index].labels
        rows = np.arange(128)[:, None] * np.ones(128, int)
        for ground in seen:
            if (labels == ground).sum() > 50 and (labels == SKY).sum() > 50:
                seen[ground] += 1
                assert rows[labels == SKY].max() < rows[labels == ground].min() + 3
    assert min(seen.values()) > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "tset"}, "did you mean 'test'"),
        ({"size": (16, 64)}, "must be from 32 to 8192"),
        ({"size": (64, 10**6)}, "must be from 32 to 8192"),
        ({"length": 0}, "at least 1"),
        ({"seed": -1}, "at least 0"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Scenes(**options)


def test_lengths_and_indices() -> None:
    assert {split: len(Scenes(split)) for split in _SPLITS} == {"train": 2000, "val": 250, "test": 250}
    scenes = Scenes("test", size=(32, 32), length=3)
    assert [sample.name for sample in scenes] == ["test_000000", "test_000001", "test_000002"]
    assert scenes[-1].name == "test_000002"
    with pytest.raises(IndexError):
        scenes[3]


def test_written_scenes_read_back(tmp_path: Path) -> None:
    scenes = Scenes("test", size=(48, 64), length=2)
    paths = write_scenes(scenes, tmp_path / "out")
    assert [path.name for path in paths] == ["test_000000.png", "test_000001.png"]
    for path, sample in zip(paths, scenes, strict=True):
        assert np.array_equal(np.array(Image.open(path)), sample.image)
        with Image.open(tmp_path / "out" / "labels" / path.name) as labels:
            assert labels.mode == "P"
            assert np.array_equal(np.array(labels), sample.labels)
            assert labels.getpalette()[:3] == list(scenes.class_set.palette[0])
    assert (tmp_path / "out" / "classes.txt").read_text().split() == list(scenes.class_set.classes)
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="cannot be written"):
        write_scenes(scenes, tmp_path / "file")


def test_cached_reads_once() -> None:
    read = []

    class Spy(Scenes):
        def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
            read.append(index)
            return super().__getitem__(index)

    cached = CachedDataset(Spy("val", size=(32, 32), length=2))
    first, again = cached[1], cached[1]
    assert again is first
    assert (len(cached), cached.split, cached.class_set.name) == (2, "val", "scenes")
    assert read == [1]


CAMERA = Camera(horizon=0.5, focal=1.0, x=0.0, eye=2.0, yaw=0.0)


def test_the_camera_is_a_pinhole() -> None:
    """Image height 100, so focal length 100 pixels, horizon in row 50, centre in column 75."""
    canvas = Canvas(100, 150, CAMERA)
    assert canvas.project(0, 2, 10) == pytest.approx((75, 50, 10))
    assert canvas.project(3, 0, 10) == pytest.approx((75 + 30, 50 + 20, 10))
    ground = canvas.ground()
    rows, columns = np.nonzero(ground.mask)
    assert ground.depth == pytest.approx(2 * 100 / (rows + 0.5 - 50), rel=1e-5)
    assert ground.first == pytest.approx((columns + 0.5 - 75) / 100 * ground.depth, rel=1e-4, abs=1e-4)
    assert rows.min() == 50


def test_turning_the_camera_turns_the_world() -> None:
    canvas = Canvas(100, 100, Camera(0.5, 1.0, 0.0, 2.0, yaw=np.pi / 4))
    assert canvas.project(10, 2, 10) == pytest.approx((50, 50, np.hypot(10, 10)))
    for surface, fixed in ((canvas.side(4.0, (0, 50), (0, 9)), "x"), (canvas.front(20.0, (0, 50), (0, 9)), "z")):
        rows, columns = np.nonzero(surface.mask)
        assert len(rows) > 100
        for k in range(0, len(rows), 97):
            x, z = (4.0, surface.first[k]) if fixed == "x" else (surface.first[k], 20.0)
            u, v, depth = canvas.project(x, surface.second[k], z)
            assert (u, v, depth) == pytest.approx(
                (columns[k] + 0.5, rows[k] + 0.5, surface.depth[k]), rel=1e-3, abs=1e-2
            )


def test_what_is_nearer_hides_what_is_farther_in_any_order() -> None:
    parts = [Part("polygon", [(-1, 0), (1, 0), (1, 4), (-1, 4)], (1, 0, 0))]
    pictures = []
    for order in ([(5, 1), (10, 2)], [(10, 2), (5, 1)]):
        canvas = Canvas(100, 100, CAMERA)
        for z, label in order:
            canvas.sprite(0, z, parts, label)
        pictures.append(canvas.labels.copy())
        assert canvas.labels[50, 50] == 1
        assert canvas.depth[50, 50] == pytest.approx(5)
    assert np.array_equal(*pictures)
    hidden = Canvas(100, 100, CAMERA)
    hidden.paint(hidden.front(4.0, (-9, 9), (0, 9)), (0, 0, 0), BUILDING)
    for farther in (hidden.front(5.0, (-9, 9), (0, 4)), hidden.side(3.0, (5, 50), (0, 4))):
        hidden.paint(farther, (0, 0, 0), WALL)
    hidden.sprite(0, 5, parts, 1)
    assert not np.isin(hidden.labels, (1, WALL)).any()


def test_nothing_thinner_than_a_pixel_and_nothing_behind_the_camera() -> None:
    canvas = Canvas(100, 100, CAMERA)
    canvas.polyline([(-50, 5, 60), (50, 5, 60)], 0.001, (0, 0, 0), 7)
    assert (canvas.labels[:, 20:80] == 7).any(0).all()
    canvas.sprite(0, -5, [Part("ellipse", [(-1, 0), (1, 2)], (0, 0, 0))], 9)
    canvas.polyline([(0, 1, -5), (0, 1, 5)], 1.0, (0, 0, 0), 9)
    assert not (canvas.labels == 9).any()


def test_noise_is_standardised_periodic_and_continuous() -> None:
    y, x = np.mgrid[:256, :256].astype(np.float32)
    values = noise(y, x)
    assert values.mean() == pytest.approx(0, abs=1e-5)
    assert values.std() == pytest.approx(1, rel=1e-5)
    assert np.array_equal(values, noise(y + 256, x - 512))
    assert noise(y, x, smooth=True) == pytest.approx(values)
    halfway = noise(y, x + np.float32(0.5), smooth=True)
    assert halfway == pytest.approx((values + np.roll(values, -1, 1)) / 2, abs=1e-5)
