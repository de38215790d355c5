"""A network without a bundle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import agln_fast
from agln_fast.contract import IMAGENET_MEAN, IMAGENET_STD
from agln_fast.data.classes import class_set
from agln_fast.errors import CheckpointError, ConfigError
from agln_fast.runtime.networks import load_network


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


def _logits(network, pixels: np.ndarray) -> np.ndarray:
    x = (pixels / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    with torch.inference_mode():
        return network(torch.from_numpy(x.transpose(2, 0, 1)[None]).float())[0].numpy()


def test_a_checkpoint_and_its_network_give_what_the_plain_network_gives(small_checkpoint, pixels):
    network = agln_fast.load_checkpoint(small_checkpoint)
    expected = _logits(network, pixels)
    for source in (small_checkpoint, str(small_checkpoint), network.train()):
        with load_network(source, size=(64, 96)) as segment:
            result = segment(pixels, margin=True)
            assert (segment.engine.name, segment.device, segment.precision) == ("torch-fp32", "cpu", "fp32")
        assert (result.labels == expected.argmax(0)).mean() >= 0.999
        top = np.sort(expected, 0)
        np.testing.assert_allclose(result.margin, top[-1] - top[-2], atol=1e-4)
    assert not network.training


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_to_fp32_but_not_equal(precision, small_checkpoint, pixels):
    """bf16 keeps 8 bits of a number: margins move, and labels only where two classes are all but tied."""
    exact = load_network(small_checkpoint, size=(64, 96))(pixels, margin=True)
    with load_network(small_checkpoint, size=(64, 96), precision=precision) as segment:
        rounded = segment(pixels, margin=True)
        assert (segment.engine.name, segment.precision) == (f"torch-{precision}", precision)
    assert not np.array_equal(exact.margin, rounded.margin)
    assert exact.margin[exact.labels == rounded.labels].sum() >= 0.99 * exact.margin.sum()


def test_images_slide_and_classes_have_names(small_network, pixels):
    network = small_network(num_classes=12)
    with load_network(network, size=(32, 64), class_set=class_set("scenes"), max_batch=3) as segment:
        assert segment(pixels).class_set.classes[0] == "sky"
        assert (segment.contract.resize, segment.contract.max_batch) == ("slide", 3)
    with load_network(network, size=(32, 64), resize="stretch") as segment:
        assert segment(pixels).labels.shape == (64, 96)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "int8"}, ConfigError, "unknown precision 'int8'; known: fp32, fp16, bf16"),
        ({"device": "warp"}, ConfigError, "unknown device 'warp'; give cpu, cuda, or a GPU by its number"),
        ({"threads": 0}, ConfigError, "threads 0: must be from 1"),
        ({"size": (16, 16)}, ConfigError, "size 16x16: each side"),
        ({"class_set": class_set("ade20k")}, ConfigError, "class set 'ade20k' has 150 classes, the network 5"),
    ],
    ids=["precision", "device", "threads", "size", "classes"],
)
def test_impossible_options(options, error, message, small_checkpoint):
    with pytest.raises(error, match=message):
        load_network(small_checkpoint, **options)


def test_a_missing_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth"):
        load_network(tmp_path / "none.pth")
