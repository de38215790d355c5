"""Checkpoints: every format loads to the same network, every defect gets one line that names it."""

from __future__ import annotations

import logging
import os
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from released import normalised_image, released_shapes, weights
from safetensors.torch import save_file

import agln_fast
from agln_fast.bench.race.weights import random_network, released_state_dict
from agln_fast.data.classes import ClassSet
from agln_fast.errors import CheckpointError, ConfigError
from agln_fast.models.checkpoint import _width, infer_config, load_weights
from agln_fast.models.config import ModelConfig


@pytest.fixture(scope="module")
def fpn_state():
    return weights(released_shapes("fpn_resnet50", 3), "formats")


@pytest.mark.parametrize("layout", ["bare", "wrapped", "data parallel", "wrapped data parallel", "legacy pickle"])
@torch.inference_mode()
def test_released_layouts_load_alike(layout, fpn_state, tmp_path):
    state = {f"module.{name}" if "data" in layout else name: tensor for name, tensor in fpn_state.items()}
    content = {"state_dict": state, "epoch": 7, "best_pred": np.float64(0.5)} if "wrapped" in layout else state
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=layout != "legacy pickle")
    network = agln_fast.load_checkpoint(path)
    assert not network.training
    assert network.config.architecture == "fpn"
    torch.testing.assert_close(network.encoder.conv1.weight, fpn_state["pretrained.conv1.weight"], rtol=0, atol=0)
    finest = fpn_state["head.fpn_lateral.0.0.weight"]
    torch.testing.assert_close(network.decoder.lateral[2][0].weight, finest, rtol=0, atol=0)
    assert network(normalised_image((1, 3, 33, 40), "x")).shape == (1, 3, 33, 40)


@pytest.mark.parametrize(
    ("network", "encoder"),
    [("agln_resnet50", "resnet50"), ("agln_resnet50s", "resnet50s"), ("fcn_resnet50s", "resnet50s")],
)
def test_released_names_tell_the_config(network, encoder, tmp_path, caplog):
    path = tmp_path / "checkpoint.pth"
    torch.save(weights(released_shapes(network, 13), "config"), path)
    config = agln_fast.load_checkpoint(path).config
    assert (config.encoder, config.num_classes) == (encoder, 13)
    if network.startswith("agln"):
        assert (config.formulation, config.decoder, config.num_descriptors) == ("release", "dense", 64)
    assert not caplog.records


def test_other_depths_are_told_from_the_names():
    state = weights(released_shapes("fcn_resnet50s", 5), "depth")
    for i_block in range(6, 23):
        for name in [name for name in state if name.startswith("pretrained.layer3.5.")]:
            state[name.replace("layer3.5.", f"layer3.{i_block}.")] = state[name]
    ours = {
        name.replace("pretrained.", "encoder.").replace("head.conv5.", "classifier."): t for name, t in state.items()
    }
    assert infer_config(ours)[0].encoder == "resnet101s"
    ours = {name: tensor for name, tensor in ours.items() if not name.startswith("encoder.layer3.22.")}
    with pytest.raises(ConfigError, match=r"\(3, 4, 22, 3\) blocks a stage"):
        infer_config(ours)


INFERABLE = sorted(
    {name.removesuffix("_resnet18") for name in agln_fast.list_models("*_resnet18")}
    - {"agln_minus_cr", "agln_minus_sg", "fcn"}
)  # CR and SG have no weights; fcn has those of fcn8s
_PLAIN = {
    "fcn8s": ModelConfig("fcn8s", "resnet18s", 5, channels=16),
    "fcn_concat": ModelConfig("fcn", "resnet18s", 5, channels=16, concat_input=True),
    "fpn": ModelConfig("fpn", "resnet18s", 5, channels=16),
}


@pytest.mark.parametrize("formulation", ["paper", "release"])
@pytest.mark.parametrize("variant", INFERABLE)
def test_every_variant_is_inferred_from_names_and_shapes(variant, formulation, small_network, caplog):
    network = small_network(f"{variant}_resnet18s", formulation=formulation, width=0.3)
    config, remarks = infer_config(network.state_dict())
    expected = _PLAIN.get(variant, network.config)  # those of `_PLAIN` have no formulation
    rebuilt = agln_fast.models.networks.SegmentationNetwork(config)
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: v.shape for k, v in network.state_dict().items()
    }
    ignored = {"width"} if expected.architecture == "agln" else {"width", "encoder"}
    for field in vars(expected).keys() - ignored:
        assert getattr(config, field) == getattr(expected, field), field
    assert bool(remarks) == (expected.channel_resampling and expected.architecture == "agln")


def test_what_names_cannot_tell_is_said(small_network, tmp_path, caplog):
    network = small_network("agln_minus_cr_resnet18")
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    with caplog.at_level(logging.WARNING, "agln_fast"):
        config = agln_fast.load_checkpoint(tmp_path / "plain.pth").config
    assert config.spatial_gating
    assert "pass a config if not" in caplog.text
    given = agln_fast.load_checkpoint(tmp_path / "plain.pth", network.config)
    assert given.config == network.config


@torch.inference_mode()
def test_own_format_keeps_config_and_weights(small_network, tmp_path):
    network = small_network("agln_minus_sg_resnet18")
    agln_fast.save_checkpoint(network, tmp_path / "own.safetensors")
    loaded = agln_fast.load_checkpoint(tmp_path / "own.safetensors")
    assert loaded.config == network.config
    image = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(loaded(image), network(image), rtol=0, atol=0)
    assert os.listdir(tmp_path) == ["own.safetensors"]
    (tmp_path / "other").touch()
    assert (tmp_path / "own.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode  # as the umask says
    loaded(image.clone())  # and it still trains
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_the_bytes_of_a_file_load_as_the_file_does(small_network, tmp_path):
    network = small_network("agln_minus_sg_resnet18")
    agln_fast.save_checkpoint(network, tmp_path / "own.safetensors")
    data = (tmp_path / "own.safetensors").read_bytes()
    loaded = load_weights(data, "weights of a bundle")
    assert loaded.config == network.config
    assert not loaded.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with pytest.raises(CheckpointError, match=r"^weights of a bundle: truncated"):
        load_weights(data[:-1], "weights of a bundle")


@pytest.mark.parametrize("preset", ["agln_release_resnet18", "fpn_resnet18"])
def test_released_names_are_the_inverse_of_loading(preset, tmp_path):
    network = random_network(preset, 4)
    torch.save(released_state_dict(network), tmp_path / "released.pth")
    loaded = agln_fast.load_checkpoint(tmp_path / "released.pth")
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    names = set(released_state_dict(random_network(preset.replace("18", "50"), 4)))
    assert names == set(released_shapes(preset.replace("_release", "").replace("18", "50"), 4))


@torch.inference_mode()
def test_half_precision_storage_is_widened(small_network, tmp_path):
    network = small_network()
    save_file(
        {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()},
        tmp_path / "h.safetensors",
    )
    loaded = agln_fast.load_checkpoint(tmp_path / "h.safetensors")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_imagenet_weights_load_into_the_encoder(small_network, tmp_path):
    network, other = small_network("fpn_resnet18"), small_network("fpn_resnet18")
    torch.nn.init.normal_(other.encoder.layer4[0].conv1.weight)
    state = {**other.encoder.state_dict(), "fc.weight": torch.zeros(1000, 8), "fc.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "resnet18.pth")
    classifier = network.classifier[4].weight.clone()
    agln_fast.load_backbone(network, tmp_path / "resnet18.pth")
    assert torch.equal(network.encoder.layer4[0].conv1.weight, other.encoder.layer4[0].conv1.weight)
    assert torch.equal(network.classifier[4].weight, classifier)
    with pytest.raises(CheckpointError, match=r"does not fit the encoder resnet34: \d+ missing"):
        agln_fast.load_backbone(small_network("fpn_resnet34"), tmp_path / "resnet18.pth")


def test_a_pickled_module_is_named(small_network, tmp_path):
    """The commonest mistake, `torch.save(model)`: the message says which class, not how to switch protection off."""
    torch.save(small_network(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"of class 'agln_fast\.models\.[\w.]+'") as caught:
        agln_fast.load_checkpoint(tmp_path / "model.pth")
    assert "weights_only" not in str(caught.value)


class _Hostile:
    def __reduce__(self):
        return os.system, ("echo hacked > hacked.txt",)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pickle_that_wants_to_run_code_is_refused(legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _Hostile()}, "evil.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"refused: besides weights it wants to load 'posix.system'"):
        agln_fast.load_checkpoint("evil.pth")
    assert os.listdir() == ["evil.pth"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0.999, 0.5, 0.01, 0])
def test_truncated_files_are_told(suffix, keep, small_network, tmp_path):
    whole, cut = tmp_path / f"whole{suffix}", tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        torch.save(small_network().state_dict(), whole)
    else:
        agln_fast.save_checkpoint(small_network(), whole)
    data = whole.read_bytes()
    cut.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match="truncated") as caught:
        agln_fast.load_checkpoint(cut)
    assert "\n" not in str(caught.value)


def test_flipped_bytes_of_a_zip_are_noticed(small_network, tmp_path):
    torch.save(small_network().state_dict(), tmp_path / "x.pth")
    data = bytearray((tmp_path / "x.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        agln_fast.load_checkpoint(tmp_path / "x.pth")


@given(st.floats(0.02, 4))
def test_widths_are_inferred_from_all_four_stages(width):
    planes = [max(1, round(width * base)) for base in (64, 128, 256, 512)]
    found = _width(planes)
    assert [max(1, round(found * base)) for base in (64, 128, 256, 512)] == planes


def _with(name, value):
    def change(state):
        state[name] = value(state[name]) if callable(value) else value

    return change


def _set(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[3] = value
    return tensor


DEFECTS = {
    "missing": (lambda s: s.pop("encoder.bn1.weight"), r"1 missing \(encoder.bn1.weight\)"),
    "unexpected": (_with("extra", torch.zeros(1)), r"1 unexpected \(extra\)"),
    "misshapen": (
        _with("encoder.bn1.weight", torch.zeros(3)),
        r"1 misshapen \(encoder.bn1.weight: \(3,\) in the file, \(16,\) in the network\)",
    ),
    "many": (lambda s: [s.pop(k) for k in list(s) if ".layer2." in k], r"blocks a stage"),
    "nan": (_with("encoder.conv1.weight", lambda t: _set(t, float("nan"))), r"NaN or Inf in 1 of .*'encoder.conv1"),
    "inf": (_with("classifier.4.bias", lambda t: _set(t, float("inf"))), r"NaN or Inf in 1 of .*'classifier.4.bias'"),
    "no tensor": (_with("epoch", 3), r"entry 'epoch' is no tensor but int"),
    "complex": (_with("encoder.bn1.weight", lambda t: t.to(torch.complex64)), r"not a dense tensor of real numbers"),
    "sparse": (_with("encoder.bn1.weight", lambda t: t.to_sparse()), r"not a dense tensor of real numbers"),
    "absurd size": (
        _with("classifier.0.weight", torch.zeros(1).expand(2**40, 1, 1, 1)),
        r"'classifier.0.weight' claims shape \(1099511627776, 1, 1, 1\), but the file holds less",
    ),
    "whole numbers": (_with("encoder.bn1.weight", lambda t: t.to(torch.int8)), r"not a dense tensor of real numbers"),
    "float8": (_with("encoder.bn1.weight", lambda t: t.to(torch.float8_e4m3fn)), r"not a dense tensor of real numbers"),
    "beyond float32": (_with("encoder.bn1.weight", lambda t: t.double() * 1e300), r"NaN or Inf in 1 of .*'encoder.bn1"),
    "meta": (_with("encoder.bn1.weight", lambda t: t.to("meta")), r"not a dense tensor of real numbers"),
    "other network": (
        lambda s: [s.pop(k) for k in list(s) if k.startswith("classifier")],
        "not a checkpoint of the AGLN family",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_are_named_in_one_line(defect, small_network, tmp_path):
    change, message = DEFECTS[defect]
    state = dict(small_network().state_dict())
    change(state)
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        agln_fast.load_checkpoint(tmp_path / "bad.pth")
    assert str(caught.value).startswith(str(tmp_path / "bad.pth"))
    assert "\n" not in str(caught.value)


def test_long_lists_of_keys_are_cut(small_network, tmp_path):
    state = {k: v for k, v in small_network().state_dict().items() if ".smooth." not in k}
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=r"\d+ missing \(decoder.smooth.0.0.weight, [^,]+, [^,]+, …\)"):
        agln_fast.load_checkpoint(tmp_path / "bad.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not a checkpoint at all", "not a checkpoint"), (b"", "not a checkpoint"), (b"PK\x03\x04rest", "truncated")],
    ids=["text", "empty", "start of a zip"],
)
def test_foreign_files_are_refused(content, message, tmp_path):
    path = tmp_path / "foreign.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        agln_fast.load_checkpoint(path)


def test_foreign_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "foreign.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        agln_fast.load_checkpoint(tmp_path / "foreign.pth")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        agln_fast.load_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(CheckpointError, match="not a file"):
        agln_fast.load_checkpoint(tmp_path)


def test_foreign_metadata_is_refused(small_network, tmp_path):
    save_file(small_network().state_dict(), tmp_path / "x.safetensors", metadata={"agln_fast.config": '{"encoder": 3}'})
    with pytest.raises(CheckpointError, match="metadata holds no usable config"):
        agln_fast.load_checkpoint(tmp_path / "x.safetensors")


CLASSES = ClassSet("street", "Street", tuple("abcde"), tuple((index, 7, 255) for index in range(5)))


@pytest.mark.parametrize("classes", [CLASSES, None], ids=["known", "unknown"])
def test_names_and_colours_of_the_classes_are_kept(small_network, tmp_path, classes):
    network = small_network()
    network.class_set = classes
    agln_fast.save_checkpoint(network, tmp_path / "x.safetensors")
    assert agln_fast.load_checkpoint(tmp_path / "x.safetensors").class_set == classes
    for _ in range(5):  # the library's own order of two changes from call to call
        agln_fast.save_checkpoint(network, tmp_path / "y.safetensors")
        assert (tmp_path / "y.safetensors").read_bytes() == (tmp_path / "x.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (CLASSES.to_json()[:-1], "metadata holds no usable classes"),
        (replace(CLASSES, classes=CLASSES.classes[:4], palette=CLASSES.palette[:4]).to_json(), "names 4 classes, the"),
    ],
    ids=["damaged", "of-another-network"],
)
def test_foreign_classes_are_refused(small_network, tmp_path, text, told):
    network = small_network()
    metadata = {"agln_fast.config": network.config.to_json(), "agln_fast.classes": text}
    save_file(network.state_dict(), tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=told):
        agln_fast.load_checkpoint(tmp_path / "x.safetensors")


def test_save_refuses_other_formats_and_unwritable_places(small_network, tmp_path):
    with pytest.raises(CheckpointError, match=r"written as \.safetensors"):
        agln_fast.save_checkpoint(small_network(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="cannot be written"):
        agln_fast.save_checkpoint(small_network(), tmp_path / "no" / "x.safetensors")
