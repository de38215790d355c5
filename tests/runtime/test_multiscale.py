"""Scales, flips and windows: what mathematics says that they do, and a second implementation of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_engine import colours, fake_segmenter
from PIL import Image

from agln_fast.contract import IOContract
from agln_fast.errors import ConfigError
from agln_fast.runtime.augmentation import TestTimeAugmentation
from agln_fast.runtime.multiscale import multiscale
from agln_fast.runtime.sliding import slide


def _pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _smooth(height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(_pixels(6, 7)).resize((width, height), Image.Resampling.BICUBIC))


def _spatial(frame: np.ndarray) -> np.ndarray:
    """Logits (4, h, w) that depend on neighbours and on the place in the window, and have no symmetry."""
    x = torch.from_numpy(np.ascontiguousarray(frame)).double().permute(2, 0, 1) / 64
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 3, 3, 3)) / 4)
    logits = F.conv2d(x[None], weight, padding=1)[0]
    logits[0] += torch.linspace(0, 1, frame.shape[1], dtype=torch.float64)
    return logits.numpy()


def _engine(function, contract):
    return lambda frames: np.stack([function(frame) for frame in frames]).astype(np.float32)


def test_scaled_sizes_are_those_of_the_paper():
    """Base 520: ceil(520 s) for the longer side; 375/500 of it, rounded half up, for the shorter."""
    contract = IOContract(480, 480, output="logits")
    longer, shorter = [260, 390, 520, 650, 780, 910], [195, 293, 390, 488, 585, 683]
    tta = TestTimeAugmentation()
    assert tta.sizes(375, 500, contract) == list(zip(shorter, longer, strict=True))
    assert tta.sizes(500, 375, contract) == list(zip(longer, shorter, strict=True))
    assert tta.sizes(300, 300, contract) == list(zip(longer, longer, strict=True))


def test_base_size_follows_the_longer_side_of_the_window():
    """128 * 520 / 480 = 138.7; a scale rounds up, and no side vanishes."""
    tta = TestTimeAugmentation(scales=(1.0, 0.99))
    assert tta.sizes(10, 10, IOContract(64, 128, output="logits")) == [(139, 139), (138, 138)]
    assert TestTimeAugmentation((0.75,), base_size=33).sizes(1, 2000, IOContract(64, 64)) == [(1, 25)]


@pytest.mark.parametrize("scales", [(), (0.0,), (1.0, -1.0), (float("inf"),), (float("nan"),)], ids=str)
def test_impossible_scales(scales):
    with pytest.raises(ConfigError, match=r"scales .*: needs numbers above 0"):
        TestTimeAugmentation(scales)


def test_impossible_base():
    with pytest.raises(ConfigError, match="base size 0: must be at least 1 pixel"):
        TestTimeAugmentation(base_size=0)


@pytest.mark.parametrize("size", [(64, 96), (20, 30), (100, 250), (200, 33)], ids=str)
def test_its_own_scale_without_flip_is_policy_slide(size):
    """At scale 1 of its own longer side nothing is resized, and softmax keeps the order of logits."""
    pixels = _smooth(*size)
    segment = fake_segmenter(_spatial, resize="slide", max_batch=3)
    segment.class_set = segment.class_set.__class__("four", "four", tuple("abcd"), ((0, 0, 0),) * 4)
    same = TestTimeAugmentation((1.0,), flip=False, base_size=max(size))
    assert np.array_equal(segment(pixels, same).labels, segment(pixels).labels)


@pytest.mark.parametrize("size", [(64, 96), (100, 250)], ids=str)
def test_flips_change_nothing_for_a_function_of_the_pixel(size):
    """Mirrored, seen pixel by pixel, and mirrored back: equal logits; and (p + p) / 2 is p exactly."""
    contract = IOContract(64, 96, output="logits", max_batch=4)
    run = _engine(lambda frame: colours(frame) / 50, contract)
    with_flip, without = (
        multiscale(run, _smooth(*size), contract, TestTimeAugmentation((0.8,), flip, base_size=220))
        for flip in (True, False)
    )
    assert np.array_equal(with_flip, without)


def test_a_mirrored_window_is_mirrored_back():
    """Class 0 gets the column as its logit: c from the left, and 95 - c from the mirrored window."""
    contract = IOContract(64, 96, output="logits")
    column = np.arange(96) / 96
    run = _engine(lambda _: np.stack([np.broadcast_to(column, (64, 96)), np.zeros((64, 96))]), contract)
    tta = TestTimeAugmentation((1.0,), flip=True, base_size=96)
    got = multiscale(run, _pixels(64, 96), contract, tta)[0, 0].astype(np.float64)
    sigmoid = 1 / (1 + np.exp(-column))
    np.testing.assert_allclose(got, (sigmoid + sigmoid[::-1]) / 2, atol=1e-6)  # a few roundings of float32


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [(90, 130), (200, 70)], ids=str)
def test_against_a_second_implementation(size, flip):
    """Window by window, pixel by pixel, in float64, without batches or bands."""
    height, width = size
    pixels = _smooth(height, width)
    contract = IOContract(64, 96, output="logits", max_batch=5)
    tta = TestTimeAugmentation((0.5, 1.0, 1.4), flip, base_size=150)
    got = torch.from_numpy(multiscale(_engine(_spatial, contract), pixels, contract, tta)).double()

    expected = torch.zeros(4, height, width, dtype=torch.float64)
    for scale in (0.5, 1.0, 1.4):
        longer = int(np.ceil(150 * scale))
        h = longer if height > width else int(longer * height / width + 0.5)
        w = longer if height <= width else int(longer * width / height + 0.5)
        frame = np.empty((max(h, 64), max(w, 96), 3), np.uint8)
        frame[:] = [124, 116, 104]  # 255 times the mean of ImageNet
        frame[:h, :w] = np.asarray(Image.fromarray(pixels).resize((w, h), Image.Resampling.BILINEAR))
        tops, lefts = (
            [*range(0, n - k, 2 * k // 3 + (2 * k % 3 > 0)), n - k] for n, k in zip(frame.shape, (64, 96), strict=False)
        )
        for mirrored in (False, True)[: 1 + flip]:
            total, count = np.zeros((4, *frame.shape[:2])), np.zeros(frame.shape[:2])
            for top in tops:
                for left in lefts:
                    crop = frame[top : top + 64, left : left + 96]
                    logits = _spatial(crop[:, ::-1])[..., ::-1] if mirrored else _spatial(crop)
                    total[:, top : top + 64, left : left + 96] += logits
                    count[top : top + 64, left : left + 96] += 1
            mean = torch.from_numpy(total / count)[None, :, :h, :w]
            own = F.interpolate(mean, size, mode="bilinear", align_corners=True)
            expected += own.softmax(1)[0] / (3 * (1 + flip))
    # Logits up to 16 in float32 have an error of 1e-6 each, interpolation positions up to 200 one of 1e-5 of a pixel.
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)
    assert expected.amax(0).std() > 0.05  # and there was something to see


@pytest.mark.parametrize("tta", [False, TestTimeAugmentation((0.7, 1.3), base_size=180)], ids=["slide", "tta"])
@pytest.mark.parametrize(("smallest", "largest"), [(1, 5), (4, 4), (1, 100)])
def test_batches_give_what_single_windows_give(tta, smallest, largest):
    pixels = [_smooth(120, 200), _smooth(70, 90)]
    alone = fake_segmenter(resize="slide")(pixels, tta, margin=True)
    batched = fake_segmenter(resize="slide", min_batch=smallest, max_batch=largest)(pixels, tta, margin=True)
    for a, b in zip(alone, batched, strict=True):
        assert np.array_equal(a.labels, b.labels)
        assert np.array_equal(a.margin, b.margin)


def test_windows_and_flips_share_batches():
    """64x200: 3 windows at 0, 64 and 104, each twice."""
    segment = fake_segmenter(resize="slide", max_batch=4)
    segment(_pixels(64, 200), TestTimeAugmentation((1.0,), base_size=200))
    assert segment._backend.batches == [4, 2]
    segment._backend.batches.clear()
    segment(_pixels(64, 200))
    assert segment._backend.batches == [3]


def test_every_policy_slides_under_augmentation():
    pixels, tta = _smooth(120, 200), TestTimeAugmentation(base_size=200)
    expected = fake_segmenter(resize="slide")(pixels, tta)
    for resize in ("stretch", "pad"):
        assert np.array_equal(fake_segmenter(resize=resize)(pixels, tta).labels, expected.labels)


def test_true_means_the_settings_of_the_paper():
    pixels = _smooth(40, 60)
    segment = fake_segmenter(resize="slide", max_batch=8)
    expected = segment(pixels, TestTimeAugmentation(), margin=True)
    assert np.array_equal(segment(pixels, tta=True, margin=True).margin, expected.margin)


def test_engines_that_return_labels_are_refused():
    segment = fake_segmenter(output="labels", name="openvino-fp32")
    with pytest.raises(ConfigError, match=r"engine openvino-fp32 returns labels.*--output logits"):
        segment(_pixels(64, 96), tta=True)


def test_bands_are_the_rows_of_the_image():
    contract = IOContract(64, 96, output="logits")
    bands = list(slide(_engine(colours, contract), pixels := _pixels(150, 100), contract))
    # Windows at rows 0, 43 and 86; 100 columns, two windows.
    assert [band.shape for band in bands] == [(1, 3, 43, 100), (1, 3, 43, 100), (1, 3, 64, 100)]
    # The mean of up to 6 equal numbers, whose sum is exact.
    assert np.array_equal(np.concatenate(bands, 2)[0], colours(pixels).astype(np.float32))


@pytest.mark.parametrize("resize", ["stretch", "slide"])
def test_margin_is_the_lead_of_the_first_class(resize):
    pixels = _pixels(64, 96)
    result = fake_segmenter(resize=resize)(pixels, margin=True)
    ordered = np.sort(pixels.astype(np.float32), 2)
    assert np.array_equal(result.margin, ordered[..., 2] - ordered[..., 1])
    assert result.margin.dtype == np.float32


def test_margin_lies_at_the_images_own_size():
    result = fake_segmenter(resize="pad")(_smooth(100, 60), margin=True)
    assert result.margin.shape == result.labels.shape == (100, 60)


def test_margin_of_probabilities():
    result = fake_segmenter(lambda frame: colours(frame) / 100)(_smooth(64, 96), tta=True, margin=True)
    assert result.margin.min() >= 0
    assert 0.05 < result.margin.max() < 1


def test_margin_is_none_if_not_asked_for_or_unknown():
    assert fake_segmenter()(_pixels(64, 96)).margin is None
    assert fake_segmenter(resize="slide")(_pixels(64, 96)).margin is None
    assert fake_segmenter(output="labels")(_pixels(64, 96), margin=True).margin is None


@pytest.mark.parametrize("tta", [False, TestTimeAugmentation((0.5, 1.0), base_size=150)], ids=["slide", "tta"])
def test_logits_that_an_engine_leaves_on_its_device_stay_there(tta, monkeypatch):
    """Only labels and margins come to the host: nothing of K channels does."""
    pixels, contract = _smooth(90, 130), {"resize": "slide", "max_batch": 3}
    expected = fake_segmenter(**contract)(pixels, tta, margin=True)
    segment = fake_segmenter(**contract)
    run, moved = segment._backend.run_graph, []
    monkeypatch.setattr(segment._backend, "run_in_place", lambda image: torch.from_numpy(run(image)))
    monkeypatch.setattr(segment._backend, "run", None)
    monkeypatch.setattr("agln_fast.runtime.scores.on_host", lambda x: moved.append(tuple(x.shape)) or x.numpy())
    monkeypatch.setattr("agln_fast.runtime.segmenter.on_host", lambda x: moved.append(tuple(x.shape)) or x.numpy())
    got = segment(pixels, tta, margin=True)
    assert np.array_equal(got.labels, expected.labels)
    np.testing.assert_allclose(got.margin, expected.margin, atol=1e-6)
    assert {len(shape) for shape in moved} == {2}
    assert sum(rows for rows, _ in moved) == 2 * 90
