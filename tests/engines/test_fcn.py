"""Engines built from checkpoints as torchvision and MMSegmentation save them, against the network in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from released import stored_shapes, weights

import agln_fast
from agln_fast.deployment import DeployedNetwork
from agln_fast.engines import open_engine
from agln_fast.runtime.augmentation import TestTimeAugmentation
from agln_fast.runtime.images import pack
from agln_fast.runtime.networks import load_network

NAMES = {"torchvision": "torchvision_fcn_r50_21c", "mmseg": "mmseg_fcn_r50_19c"}
LAST = {"torchvision": "classifier.4", "mmseg": "decode_head.conv_seg"}
CLASSES = [f"class {chr(97 + index)}" for index in range(19)]
PLANS = {
    "no-plan": "none",
    "low-resolution-labels": agln_fast.Plan(fold_batchnorm=True, low_resolution_labels=True),
    "winograd": agln_fast.Plan(fold_batchnorm=True, winograd=3),
}
SIZE = 64, 96


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Narrow ones; the last layer is scaled, so that each class wins somewhere."""
    folder = tmp_path_factory.mktemp("fcn")
    for source, name in NAMES.items():
        state, path = weights(stored_shapes(name, narrow=True), "engines"), folder / f"{source}.pth"
        torch.save(state, path)
        with torch.inference_mode():
            image = torch.randn(1, 3, *SIZE, generator=torch.Generator().manual_seed(0))
            logits = agln_fast.load_checkpoint(path)(image)[0].flatten(1)
        bias, weight = f"{LAST[source]}.bias", f"{LAST[source]}.weight"
        state[bias] = (state[bias] - logits.mean(1)) / logits.std(1)
        state[weight] = state[weight] / logits.std(1)[:, None, None, None]
        torch.save({"state_dict": state, "meta": {"CLASSES": CLASSES}} if source == "mmseg" else state, path)
    return folder


@pytest.mark.parametrize(
    ("source", "plan", "output"),
    [
        ("mmseg", "low-resolution-labels", "labels"),
        pytest.param("torchvision", "low-resolution-labels", "labels", marks=pytest.mark.slow),
        pytest.param("mmseg", "winograd", "logits", marks=pytest.mark.slow),
        pytest.param("torchvision", "no-plan", "labels", marks=pytest.mark.slow),
        pytest.param("torchvision", "winograd", "logits", marks=pytest.mark.slow),
        pytest.param("mmseg", "no-plan", "logits", marks=pytest.mark.slow),
    ],
)
def test_engines_agree_with_the_network_in_float64(source, plan, output, checkpoints, tmp_path):
    checkpoint = checkpoints / f"{source}.pth"
    bundle = agln_fast.build(
        checkpoint, tmp_path / "fcn", size=SIZE, precision="fp32", plan=PLANS[plan], output=output, strict=True
    )
    assert bundle.manifest.classes == (tuple(CLASSES) if source == "mmseg" else bundle.manifest.classes)
    assert bundle.manifest.model.align_corners is False
    names = {engine.name for engine in bundle.manifest.engines}
    assert names == {"torch-fp32", "fused-fp32", "onnxruntime-fp32", "openvino-fp32"}

    image = np.random.default_rng(1).integers(0, 256, (1, *SIZE, 3), np.uint8)
    network = agln_fast.load_checkpoint(checkpoint)
    deployed = DeployedNetwork(network, bundle.manifest.contract, network.config.num_classes)
    with torch.inference_mode():
        exact = network.double()(deployed.normalise(torch.from_numpy(image)).double()).numpy()
    first, second = -np.sort(-exact, 1)[:, :2].swapaxes(0, 1)
    tolerance = 1e-4 * np.abs(exact).max()  # Winograd's sums are five times as inexact as plain ones
    clear = first - second > 2 * tolerance
    assert clear.mean() > 0.98
    assert len(np.unique(exact.argmax(1))) > 5
    for name in names:
        with open_engine(bundle.artefact(name)) as engine:
            found = engine.run(image)
        if output == "labels":
            assert (found == exact.argmax(1))[clear].all(), name
        else:
            assert np.abs(found - exact).max() < tolerance, name


@torch.inference_mode()
def test_the_own_size_is_reached_as_the_network_resizes(checkpoints, tmp_path):
    """Logits of 64x96 of a picture of 100x150, as they are, by test-time augmentation, and by a bundle."""
    network = agln_fast.load_checkpoint(checkpoints / "mmseg.pth")
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (26, 39, 3), np.uint8))
    pixels = np.array(noise.resize((150, 100), Image.Resampling.BICUBIC))
    frame = np.array(Image.fromarray(pixels).resize((96, 64), Image.Resampling.BILINEAR))
    with load_network(network, size=SIZE, resize="stretch") as segment:
        whole = segment(pixels, margin=True)
        one_window = segment(pixels, TestTimeAugmentation((1.0,), flip=False, base_size=96))
        logits = network(torch.from_numpy(pack([frame], replace(segment.contract, layout="float_nchw"))))
    own, aligned = (
        torch.nn.functional.interpolate(logits, (100, 150), mode="bilinear", align_corners=align_corners)[0].numpy()
        for align_corners in (False, True)
    )
    second, first = np.sort(own, 0)[-2:]
    np.testing.assert_allclose(whole.margin, first - second, atol=1e-3)
    clear = first - second > 1e-3
    settings = {"size": SIZE, "precision": "fp32", "targets": "cuda", "output": "logits"}  # PyTorch's engines alone
    bundle = agln_fast.build(checkpoints / "mmseg.pth", tmp_path / "fcn", **settings)
    with agln_fast.load(bundle, "torch") as segment:
        of_bundle = segment(pixels)
    for result in (whole, one_window, of_bundle):
        assert (result.labels == own.argmax(0))[clear].all()
    assert (aligned.argmax(0) != own.argmax(0))[clear].mean() > 0.01
