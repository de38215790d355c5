"""FCN of torchvision and MMSegmentation: golden outputs, what is inferred of a file, classes, and other networks."""

from __future__ import annotations

import logging
import re
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from released import GOLDEN, normalised_image, stored_shapes, weights

import agln_fast
from agln_fast.data.classes import class_set, default_class_set
from agln_fast.errors import CheckpointError
from agln_fast.models.config import ModelConfig
from agln_fast.runtime.networks import load_network

TORCHVISION, MMSEG = "torchvision_fcn_r50_21c", "mmseg_fcn_r50_19c"
NAMES = [f"class {chr(97 + index)}" for index in range(19)]
COLOURS = [[index, 255 - index, 7] for index in range(19)]


@pytest.fixture(scope="module")
def states():
    """Narrow ones, by name."""
    return {name: weights(stored_shapes(name, narrow=True), "states") for name in (TORCHVISION, MMSEG)}


@pytest.fixture
def load(tmp_path):
    def load(content, config=None, save=torch.save):
        save(content, tmp_path / "fcn.pth")
        return agln_fast.load_checkpoint(tmp_path / "fcn.pth", config)

    return load


@pytest.mark.parametrize(
    ("name", "shape", "salt"), [(TORCHVISION, "1x3x64x96", "wild-1"), (MMSEG, "1x3x75x107", "wild-2")]
)
@torch.inference_mode()
def test_logits_are_those_of_the_library(name, shape, salt, load):
    network = load(weights(stored_shapes(name), salt))
    with np.load(GOLDEN / f"{name}_{shape}_{salt}.npz") as golden:
        expected = torch.from_numpy(golden["logits"])
    logits = network(normalised_image(tuple(map(int, shape.split("x"))), salt))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    channels = {TORCHVISION: "resnet50", MMSEG: "resnet50c"}
    assert network.config == ModelConfig("fcn", channels[name], expected.shape[1], concat_input=name == MMSEG)


def deepened(state):
    """That of a ResNet-101: layer3 has 23 blocks."""
    block = {name: value for name, value in state.items() if name.startswith("backbone.layer3.5.")}
    more = {
        name.replace("layer3.5.", f"layer3.{number}."): value
        for number in range(6, 23)
        for name, value in block.items()
    }
    return state | more


@pytest.mark.parametrize("auxiliary", [True, False], ids=["auxiliary-head", "no-auxiliary-head"])
@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize("name", [TORCHVISION, MMSEG])
def test_config_follows_from_names_and_shapes(name, depth, auxiliary, states, load, caplog):
    state = states[name] if depth == 50 else deepened(states[name])
    if not auxiliary:
        state = {key: value for key, value in state.items() if not key.startswith("aux")}
    config = load(state).config
    encoder = f"resnet{depth}{'c' if name == MMSEG else ''}"
    classes = 19 if name == MMSEG else 21
    assert config == ModelConfig("fcn", encoder, classes, width=1 / 8, channels=32, concat_input=name == MMSEG)
    assert config.align_corners is False
    assert [record.message.partition(": ")[2] for record in caplog.records] == [
        f"8 entries that are no part of it ignored ({'auxiliary_head' if name == MMSEG else 'aux_classifier'})"
    ] * auxiliary


def test_a_plain_stem_below_mmsegs_head(states, load):
    """`fcn_r50b-d8` is of torchvision's ResNet."""
    state = {name: value for name, value in states[MMSEG].items() if not name.startswith("backbone.")}
    state |= {name: value for name, value in states[TORCHVISION].items() if name.startswith("backbone.")}
    assert load(state).config == ModelConfig("fcn", "resnet50", 19, width=1 / 8, channels=32, concat_input=True)


@torch.inference_mode()
def test_mmsegs_head_of_one_convolution_is_torchvisions(states, load):
    """`num_convs=1, concat_input=False`."""
    ours = {"classifier.0.": "decode_head.convs.0.conv.", "classifier.1.": "decode_head.convs.0.bn."}
    ours |= {"classifier.4.": "decode_head.conv_seg."}
    state = states[TORCHVISION]
    renamed = {}
    for name, value in state.items():
        first = next((first for first in ours if name.startswith(first)), None)
        renamed[name if first is None else name.replace(first, ours[first], 1)] = value
    image = normalised_image((1, 3, 40, 50), "one")
    expected, network = load(state), load(renamed)
    assert network.config == expected.config
    assert torch.equal(network(image), expected(image))


@torch.inference_mode()
def test_a_config_with_aligned_corners_is_believed(states, load):
    """Nothing in a file tells: some of MMSegmentation's configurations align them."""
    aligned = ModelConfig("fcn", "resnet50c", 19, width=1 / 8, channels=32, concat_input=True, align_corners=True)
    image = normalised_image((1, 3, 40, 50), "aligned")
    own, other = load(states[MMSEG]), load(states[MMSEG], aligned)
    assert other.config == aligned
    coarse = own.classifier(own.decoder(*own.encoder(image)))
    exact = torch.nn.functional.interpolate(coarse, (40, 50), mode="bilinear", align_corners=True)
    assert torch.equal(other(image), exact)
    assert not torch.allclose(own(image), exact)


METAS = {
    "old": {"mmseg_version": "0.16.0", "CLASSES": tuple(NAMES), "PALETTE": COLOURS},
    "old-lower-case": {"classes": NAMES, "palette": [tuple(colour) for colour in COLOURS]},
    "new": {"dataset_meta": {"classes": tuple(NAMES), "palette": COLOURS}, "mmengine_version": "0.8.4"},
    "new-upper-case": {"dataset_meta": {"CLASSES": NAMES, "PALETTE": COLOURS}, "CLASSES": ["of another time"]},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "pickle"])
@pytest.mark.parametrize("meta", METAS.values(), ids=METAS)
def test_classes_are_those_of_the_meta(meta, legacy, states, tmp_path, caplog):
    content = {"meta": meta, "state_dict": states[MMSEG], "optimizer": {}}
    torch.save(content, tmp_path / "fcn.pth", _use_new_zipfile_serialization=not legacy)
    network = agln_fast.load_checkpoint(tmp_path / "fcn.pth")
    assert network.class_set.classes == tuple(NAMES)
    assert network.class_set.palette == tuple(map(tuple, COLOURS))
    assert "names of classes" not in caplog.text
    agln_fast.save_checkpoint(network, tmp_path / "own.safetensors")
    own = agln_fast.load_checkpoint(tmp_path / "own.safetensors")
    assert own.class_set == network.class_set
    with load_network(own, size=(32, 32), resize="stretch") as segment:
        assert segment.class_set.classes == tuple(NAMES)


DAMAGED = {
    "no-colours": ({"CLASSES": NAMES}, NAMES, ""),
    "colours-of-other-classes": ({"CLASSES": NAMES, "PALETTE": COLOURS[:3]}, NAMES, ""),
    "colours-that-are-none": ({"CLASSES": NAMES, "PALETTE": [[0, 0, 256], *COLOURS[1:]]}, NAMES, ""),
    "of-another-network": ({"CLASSES": NAMES[:3]}, None, "names 3 classes, the network has 19"),
    "a-name-twice": ({"CLASSES": [NAMES[0], *NAMES[:-1]]}, None, "class name 'class a' stands there twice"),
    "names-that-are-none": ({"CLASSES": [*NAMES[:-1], 5]}, None, ""),
    "no-list": ({"CLASSES": "road"}, None, ""),
    "none": ({"CLASSES": None, "PALETTE": None}, None, ""),
    "empty": ({}, None, ""),
}


@pytest.mark.parametrize(("meta", "names", "warning"), DAMAGED.values(), ids=DAMAGED)
def test_classes_that_do_not_fit_are_not_used(meta, names, warning, states, load, caplog):
    caplog.set_level(logging.WARNING)
    found = load({"meta": meta, "state_dict": states[MMSEG]}).class_set
    assert (found is None) == (names is None)
    if found is not None:
        assert (found.classes, found.palette) == (tuple(names), default_class_set(19).palette)
    assert bool(warning) == any(record.levelname == "WARNING" and "name" in record.message for record in caplog.records)
    assert warning in caplog.text


def test_what_mmengine_stores_beside_the_weights_is_no_obstacle(states, load, monkeypatch):
    """Its own objects, which its trainings have written since 1.0; nothing of it is imported to read them."""
    module = ModuleType("mmengine.logging.history_buffer")
    buffer = type("HistoryBuffer", (), {"__module__": module.__name__})
    module.HistoryBuffer = buffer
    hub = buffer()
    hub._log_history = np.array([0.5, 0.25])

    def forget(state, file):
        for name in ("mmengine", "mmengine.logging", module.__name__):
            monkeypatch.setitem(sys.modules, name, module)
        torch.save(state, file)
        for name in ("mmengine", "mmengine.logging", module.__name__):
            monkeypatch.delitem(sys.modules, name)

    meta = {"dataset_meta": {"classes": tuple(NAMES), "palette": COLOURS}}
    network = load({"meta": meta, "state_dict": states[MMSEG], "message_hub": {"log": hub}}, save=forget)
    assert network.class_set.classes == tuple(NAMES)
    assert "mmengine" not in sys.modules


def test_torchvisions_21_classes_are_vocs(states, load):
    with load_network(load(states[TORCHVISION])) as segment:
        assert segment.class_set == class_set("pascal_voc")


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        pytest.param(TORCHVISION, "classifier.0.convs.0.0.weight", id="torchvision-deeplabv3"),
        pytest.param(TORCHVISION, "classifier.cbr.0.weight", id="torchvision-lraspp"),
        pytest.param(MMSEG, "decode_head.psp_modules.0.1.conv.weight", id="mmseg-psp"),
        pytest.param(MMSEG, "decode_head.image_pool.1.conv.weight", id="mmseg-aspp"),
        pytest.param(MMSEG, "neck.conv.weight", id="mmseg-neck"),
    ],
)
def test_another_head_is_named(name, entry, states, load):
    message = rf"fcn\.pth: a network of torchvision or MMSegmentation, but not FCN: '{re.escape(entry)}'"
    with pytest.raises(CheckpointError, match=message):
        load({**states[name], entry: torch.zeros(4, 4, 1, 1)})


def test_another_encoder_is_named(states, load):
    state = {name: value for name, value in states[MMSEG].items() if not name.startswith("backbone.layer4.2.")}
    with pytest.raises(CheckpointError, match=r"the encoder has \(3, 4, 6, 2\) blocks a stage"):
        load(state)
