"""Augmentation: image and labels stay aligned, scales and flips are as the paper says."""

from __future__ import annotations

import numpy as np
import pytest

from agln_fast.data.augment import Augmentation
from agln_fast.data.dataset import IGNORE_INDEX, Sample
from agln_fast.errors import ConfigError


def gradient(height: int, width: int) -> Sample:
    """Red grows to the right, green downwards; labels say in which of 4 x 4 blocks a pixel lies."""
    v, u = np.mgrid[:height, :width]
    image = np.stack([255 * u // (width - 1), 255 * v // (height - 1), np.zeros_like(u)], -1).astype(np.uint8)
    return Sample(image, (4 * (4 * v // height) + 4 * u // width).astype(np.uint8), "gradient")


@pytest.mark.parametrize("shape", [(100, 160), (160, 100), (64, 64)])
def test_image_and_labels_stay_aligned(shape: tuple[int, int]) -> None:
    sample = gradient(*shape)
    augment = Augmentation(crop=96, base_size=128)
    for seed in range(40):
        image, labels, name = augment(sample, np.random.default_rng(seed))
        assert (image.shape, labels.shape, name) == ((96, 96, 3), (96, 96), "gradient")
        inside = labels != IGNORE_INDEX
        assert inside.any()
        assert (image[~inside] == augment.fill).all()
        block = 4 * (image[..., 1].astype(int) * 4 // 256) + image[..., 0].astype(int) * 4 // 256
        assert (block[inside] == labels[inside]).mean() > 0.93  # all but the blocks' borders


def test_scale_one_and_no_flip_is_a_plain_crop() -> None:
    sample = gradient(128, 128)
    image, labels, _ = Augmentation(128, 128, scale=(1.0, 1.0), flip=0.0)(sample, np.random.default_rng(0))
    assert np.array_equal(image, sample.image)
    assert np.array_equal(labels, sample.labels)
    flipped = Augmentation(128, 128, scale=(1.0, 1.0), flip=1.0)(sample, np.random.default_rng(0))
    assert np.array_equal(flipped.image, sample.image[:, ::-1])
    assert np.array_equal(flipped.labels, sample.labels[:, ::-1])


def test_scales_are_uniform_from_half_to_double() -> None:
    """The share of the picture's width that 64 of 128 pixels show is 1 / (2 scale)."""
    sample, augment = gradient(128, 128), Augmentation(64, 128, flip=0.0)
    scales = []
    for seed in range(300):
        red = augment(sample, np.random.default_rng(seed)).image[0, :, 0].astype(float)
        scales.append(255 * 63 / 128 / (red[-1] - red[0]))
    assert min(scales) == pytest.approx(0.5, abs=0.05)
    assert max(scales) == pytest.approx(2.0, abs=0.1)
    assert np.mean(scales) == pytest.approx(1.25, abs=0.08)


def test_crops_reach_every_corner_and_half_are_flipped() -> None:
    sample, augment = gradient(128, 128), Augmentation(64, 128, scale=(2.0, 2.0))
    crops = [augment(sample, np.random.default_rng(seed)) for seed in range(200)]
    assert {int(label) for crop in crops for label in np.unique(crop.labels)} == set(range(16))
    flipped = np.mean([crop.image[0, 0, 0] > crop.image[0, -1, 0] for crop in crops])
    assert 0.38 < flipped < 0.62  # 3.4 standard deviations of a fair coin


def test_ignored_pixels_stay_ignored() -> None:
    sample = gradient(64, 64)
    sample.labels[:] = IGNORE_INDEX
    assert (Augmentation(64, 64)(sample, np.random.default_rng(1)).labels == IGNORE_INDEX).all()


@pytest.mark.parametrize("options", [{"crop": 8}, {"scale": (2.0, 1.0)}, {"scale": (0.0, 1.0)}, {"flip": 2.0}])
def test_nonsense_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        Augmentation(**options)
