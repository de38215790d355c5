"""safetensors of others: without our metadata, and cut in shards."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import agln_fast
from agln_fast.errors import CheckpointError

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def state(small_network):
    return dict(small_network("fpn_resnet18").state_dict())


def _cut(state, folder: Path, shards: int = 3, prefix: str = "") -> Path:
    """`state` in shards of alternating tensors, as transformers and accelerate name them, with their index."""
    names = list(state)
    places = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {f"{prefix}{name}": state[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in state.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}, indent=2))
    return folder / INDEX


def _change(index: Path, change) -> None:
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


def test_without_our_metadata_the_config_is_inferred(small_network, tmp_path):
    network = small_network("agln_resnet18", num_descriptors=24)
    half = {f"model.{k}": v.bfloat16() if v.is_floating_point() else v for k, v in network.state_dict().items()}
    save_file(half, tmp_path / "x.safetensors", metadata={"format": "pt"})
    loaded = agln_fast.load_checkpoint(tmp_path / "x.safetensors")
    assert loaded.config == network.config
    assert torch.equal(loaded.classifier[4].weight, network.classifier[4].weight.bfloat16().float())


@pytest.mark.parametrize("prefix", ["", "model.module."])
@pytest.mark.parametrize("shards", [1, 3])
def test_shards_are_read_as_one_file(shards, prefix, state, tmp_path, caplog):
    index = _cut(state, tmp_path, shards, prefix)
    with caplog.at_level(logging.INFO, "agln_fast.checkpoint"):
        loaded = agln_fast.load_checkpoint(index).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert len(caplog.records) == bool(prefix)


def test_our_metadata_in_a_shard_counts(small_network, tmp_path):
    """What names cannot tell: this network has resampling only."""
    network = small_network("agln_minus_cr_resnet18")
    agln_fast.save_checkpoint(network, tmp_path / "a.safetensors")
    places = dict.fromkeys(network.state_dict(), "a.safetensors")
    (tmp_path / "a.index.json").write_text(json.dumps({"weight_map": places}))
    assert agln_fast.load_checkpoint(tmp_path / "a.index.json").config == network.config


def test_a_shard_alone_is_told(state, tmp_path):
    _cut(state, tmp_path)
    with pytest.raises(CheckpointError, match=r"shard of several, give their index, model\.safetensors\.index\.json"):
        agln_fast.load_checkpoint(tmp_path / "model-00002-of-00003.safetensors")
    assert _cut(state, tmp_path, 1)
    agln_fast.load_checkpoint(tmp_path / "model-00001-of-00001.safetensors")


FIRST = "model-00001-of-00003.safetensors"
WRONG = {
    "missing": (lambda p: (p / FIRST).unlink(), rf"its shard '{FIRST}' is missing: fetch it"),
    "a folder": (
        lambda p: ((p / FIRST).unlink(), (p / FIRST).mkdir()),
        rf"its shard '{FIRST}' is missing",
    ),
    "truncated": (
        lambda p: (p / FIRST).write_bytes((p / FIRST).read_bytes()[:-9]),
        rf"its shard '{FIRST}': truncated, damaged",
    ),
    "more": (
        lambda p: _change(p / INDEX, lambda places: places.pop("classifier.4.bias")),
        r"do not belong together: the latter holds 'classifier\.4\.bias'",
    ),
    "less": (
        lambda p: _change(p / INDEX, lambda places: places.update({"a\x1b": FIRST})),
        r"do not belong together: the latter does not hold 'a\\x1b'",
    ),
    "elsewhere": (
        lambda p: _change(p / INDEX, lambda places: places.update({"a": "../x.safetensors"})),
        r"names the file '\.\./x\.safetensors', which is not one beside it",
    ),
    "absolute": (
        lambda p: _change(p / INDEX, lambda places: places.update({"a": "/x\x07"})),
        r"names the file '/x\\x07', which is not one beside it",
    ),
    "upwards": (
        lambda p: _change(p / INDEX, lambda places: places.update({"a": ".."})),
        r"its shard '\.\.' is missing",
    ),
    "a backslash": (lambda p: _change(p / INDEX, lambda places: places.update({"a": "x\\y"})), "names the file"),
    "no name": (lambda p: _change(p / INDEX, lambda places: places.update({"a": ""})), "read as the index of shards"),
    "a number": (lambda p: _change(p / INDEX, lambda places: places.update({"a": 3})), "read as the index of shards"),
    "empty": (lambda p: _change(p / INDEX, lambda places: places.clear()), "read as the index of shards"),
    "a list": (lambda p: (p / INDEX).write_text('{"weight_map": ["a"]}'), "read as the index of shards"),
    "other JSON": (lambda p: (p / INDEX).write_text('{"architecture": "agln"}'), "read as the index of shards"),
    "no JSON": (lambda p: (p / INDEX).write_text('{"weight_map": '), "read as the index of shards"),
    "nested": (lambda p: (p / INDEX).write_text('{"a": ' + "[" * 100_000), "read as the index of shards"),
    "no text": (lambda p: (p / INDEX).write_bytes(b'{"\xff": 1}'), "read as the index of shards"),
    "long": (lambda p: (p / INDEX).write_text("{" + " " * (9 << 20) + "}"), "an index of more than 8 MiB"),
    "many": (
        lambda p: (p / INDEX).write_text(json.dumps({"weight_map": {str(i): str(i) for i in range(1001)}})),
        "names 1,001 files",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_shards_that_are_not_as_the_index_says_are_told(case, state, tmp_path):
    index = _cut(state, tmp_path)
    change, message = WRONG[case]
    change(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        agln_fast.load_checkpoint(index)
    assert str(caught.value).startswith(str(index))
    assert str(caught.value).isprintable()


def test_a_shard_that_cannot_be_read_is_told(state, tmp_path, monkeypatch):
    index = _cut(state, tmp_path)
    read = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.suffix == ".safetensors":
            raise PermissionError(13, "Permission denied")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(CheckpointError, match=r"shard 'model-00001-of-00003\.safetensors' cannot be read \(Permission"):
        agln_fast.load_checkpoint(index)
