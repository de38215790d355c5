"""From image to labels at the image's own size, through every engine and resize policy."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_engine import fake_segmenter
from PIL import Image

import agln_fast
from agln_fast.bundle import Bundle
from agln_fast.contract import IMAGENET_MEAN, IMAGENET_STD
from agln_fast.errors import BackendError, BundleError, ConfigError, ImageError
from agln_fast.runtime.segmenter import runnable_engines

BACKENDS = ["torch", "onnxruntime", pytest.param("openvino", marks=pytest.mark.openvino)]


def _pixels(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _reference(bundle: Bundle, pixels: np.ndarray) -> np.ndarray:
    """Logits (K, H, W) by the plain network, written out here once more."""
    network = agln_fast.load_checkpoint(bundle.path / "weights.safetensors")
    x = (pixels / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    with torch.inference_mode():
        return network(torch.from_numpy(x.transpose(2, 0, 1)[None]).float())[0].numpy()


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_are_those_of_the_network(backend, bundle):
    pixels = _pixels(64, 96)
    with agln_fast.load(bundle.path, backend) as segment:
        result = segment(pixels)
        assert (segment.device, segment.precision, segment.engine.backend) == ("cpu", "fp32", backend)
    assert (result.labels == _reference(bundle, pixels).argmax(0)).mean() >= 0.999
    assert result.labels.dtype == np.uint8
    assert len(result.names) == 5


def test_auto_takes_the_fastest_engine_that_was_measured(bundle):
    fastest = min(bundle.manifest.engines, key=lambda engine: engine.verification.latency_ms)
    with agln_fast.load(bundle) as segment:
        assert segment.engine == fastest
    order = [engine.name for engine, obstacle in runnable_engines(bundle) if obstacle is None]
    assert order[0] == fastest.name


def test_engines_that_cannot_run_are_explained(bundle, monkeypatch):
    engine = bundle.engine("torch-fp32")
    foreign = replace(engine, name="x", backend="tensorrt", target="tensorrt", compute_capabilities=("sm90",))
    elsewhere = replace(bundle, manifest=replace(bundle.manifest, engines=(foreign, replace(foreign, name="y"))))
    with pytest.raises(BackendError, match=r"engine x cannot run here: .*tensorrt.*; engine y cannot run here: .*"):
        agln_fast.load(elsewhere)


def test_unknown_choices_are_corrected(bundle):
    with pytest.raises(ConfigError, match="unknown backend 'onnxrutime'; did you mean 'onnxruntime'"):
        agln_fast.load(bundle, "onnxrutime")
    with pytest.raises(BundleError, match=r"no tensorrt engine.* it has openvino-fp32"):
        agln_fast.load(bundle, "tensorrt")
    with pytest.raises(ConfigError, match="unknown precision 'fp8'"):
        agln_fast.load(bundle, precision="fp8")
    with pytest.raises(BundleError, match="no torch engine in bf16"):
        agln_fast.load(bundle, "torch", precision="bf16")
    with pytest.raises(BackendError, match="cuda"):
        agln_fast.load(bundle, "onnxruntime", device="cuda")
    with pytest.raises(ConfigError, match="unknown device 'warp'"):
        agln_fast.load(bundle, "torch", device="warp")


def test_lists_batches_and_single_images(bundle, tmp_path):
    pixels = _pixels(64, 96)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    chw = torch.from_numpy(pixels.transpose(2, 0, 1).copy())
    with agln_fast.load(bundle, "onnxruntime") as segment:
        single = segment(tmp_path / "x.png")
        several = segment([pixels, Image.fromarray(pixels), str(tmp_path / "x.png"), chw])
        batch = segment(torch.stack([chw, chw]))
        assert segment([]) == []
    assert len(several) == 4
    assert len(batch) == 2
    for result in [*several, *batch]:
        assert np.array_equal(result.labels, single.labels)


def test_timing_adds_up(bundle):
    with agln_fast.load(bundle, "torch") as segment:
        timing = segment(_pixels(70, 90)).timing
    assert min(timing.preprocess, timing.engine, timing.postprocess) > 0
    assert timing.total == pytest.approx(timing.preprocess + timing.engine + timing.postprocess)


def test_a_closed_segmenter_says_so(bundle):
    segment = agln_fast.load(bundle, "torch")
    segment.close()
    segment.close()
    with pytest.raises(BackendError, match="closed"):
        segment(_pixels(64, 96))


def test_bad_images_are_refused_by_name(bundle, tmp_path):
    with (
        agln_fast.load(bundle, "onnxruntime") as segment,
        pytest.raises(ImageError, match=r"missing\.png: no such file"),
    ):
        segment(tmp_path / "missing.png")


def test_threads_share_a_segmenter(bundle):
    images = [_pixels(64, 96, seed) for seed in range(4)]
    with agln_fast.load(bundle, "onnxruntime") as segment:
        expected = [segment(image).labels for image in images]
        got: list[np.ndarray | None] = [None] * 4

        def work(i: int) -> None:
            got[i] = segment(images[i]).labels

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.fixture
def colour_segmenter():
    """Logits are the colour channels: what comes out shows where each pixel went."""
    return partial(fake_segmenter, output="labels")


def _quadrants(height: int, width: int) -> np.ndarray:
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2, 0] = 200
    pixels[: height // 2, width // 2 :, 1] = 200
    pixels[height // 2 :, :, 2] = 200
    return pixels


@pytest.mark.parametrize("output", ["labels", "logits"])
@pytest.mark.parametrize("resize", ["stretch", "pad"])
@pytest.mark.parametrize("size", [(64, 96), (128, 192), (40, 200), (300, 40)], ids=str)
def test_labels_lie_where_the_image_has_them(output, resize, size, colour_segmenter):
    pixels = _quadrants(*size)
    labels = colour_segmenter(output=output, resize=resize)(pixels).labels
    assert labels.shape == size
    same = labels == pixels.argmax(2)
    # Only within one engine pixel of a border between quadrants may the resizing blur.
    blur = max(3, -(-2 * size[0] // 64), -(-2 * size[1] // 96) * (3 if resize == "pad" else 1))
    inside = np.ones(size, bool)
    inside[size[0] // 2 - blur : size[0] // 2 + blur] = False
    inside[: size[0] // 2 + blur, size[1] // 2 - blur : size[1] // 2 + blur] = False
    assert same[inside].all()


@pytest.mark.parametrize("size", [(32, 48), (128, 192), (192, 288), (1, 500)], ids=str)
def test_labels_are_resized_as_pillow_does(size, colour_segmenter):
    labels = np.random.default_rng(0).integers(0, 3, (64, 96), np.uint8)
    segment = colour_segmenter()
    segment._backend.run = lambda image: labels[None]
    expected = Image.fromarray(labels).resize(size[::-1], Image.Resampling.NEAREST)
    assert np.array_equal(segment(_pixels(*size)).labels, np.asarray(expected))


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (200, 300), (20, 300), (200, 30), (10, 10)], ids=str)
@pytest.mark.parametrize("max_batch", [1, 4])
def test_sliding_windows_see_every_pixel_once(size, max_batch, colour_segmenter):
    """The fake engine works pixel by pixel, so averaging over windows must change nothing at all."""
    pixels = _pixels(*size)
    segment = colour_segmenter(output="logits", resize="slide", max_batch=max_batch)
    assert np.array_equal(segment(pixels).labels, pixels.argmax(2))


def test_sliding_windows_are_averaged(colour_segmenter):
    """Windows at 0 and 64 of width 96 over a width of 160; in the overlap the larger sum of logits wins."""
    segment = colour_segmenter(output="logits", resize="slide")
    calls = []

    def run(image):
        calls.append(1)
        logits = np.zeros((1, 3, 64, 96), np.float32)
        logits[:, len(calls) - 1] = (3.0, 4.0)[len(calls) - 1]
        return logits

    segment._backend.run_in_place = run
    labels = segment(_pixels(64, 160)).labels
    assert len(calls) == 2
    assert (labels[:, :64] == 0).all()
    assert (labels[:, 64:] == 1).all()


def test_short_batches_are_filled_up(colour_segmenter):
    segment = colour_segmenter(min_batch=4, max_batch=4)
    images = [_pixels(64, 96, seed) for seed in range(5)]
    results = segment(images)
    assert segment._backend.batches == [4, 4]
    for image, result in zip(images, results, strict=True):
        assert np.array_equal(result.labels, image.argmax(2))


@pytest.fixture(scope="module")
def normalised(small_checkpoint, tmp_path_factory):
    """A bundle whose engines take normalised float images and give logits."""
    path = tmp_path_factory.mktemp("normalised") / "x"
    options = {"size": (64, 96), "precision": "fp32", "plan": agln_fast.Plan(fold_batchnorm=True)}
    return agln_fast.build(small_checkpoint, path, layout="float_nchw", output="logits", **options)


def test_float_engines_get_normalised_images(normalised):
    pixels = _pixels(64, 96)
    with agln_fast.load(normalised, "onnxruntime") as segment:
        labels = segment(pixels).labels
    assert (labels == _reference(normalised, pixels).argmax(0)).mean() >= 0.999


def test_logits_are_resampled_once_to_the_own_size(normalised):
    pixels = _pixels(64, 96)
    large = np.asarray(Image.fromarray(pixels).resize((192, 128), Image.Resampling.NEAREST))
    with agln_fast.load(normalised, "onnxruntime") as segment:
        labels = segment(large).labels
    frame = np.asarray(Image.fromarray(large).resize((96, 64), Image.Resampling.BILINEAR))
    logits = torch.from_numpy(_reference(normalised, frame))[None]
    expected = F.interpolate(logits, (128, 192), mode="bilinear", align_corners=True).argmax(1)[0]
    assert (labels == expected.numpy()).mean() >= 0.999
