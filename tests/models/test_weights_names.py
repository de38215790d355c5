"""The weights are found where trainings put them, under the names that they had in the network."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch

import agln_fast
from agln_fast.errors import CheckpointError
from agln_fast.models.weights_names import find_weights

CONTAINERS = [
    "state_dict",
    "model_state_dict",
    "model",
    "network",
    "net",
    "state_dict_ema",
    "model_ema",
    "ema",
    "module",
]


@pytest.fixture(scope="module")
def state(small_network):
    return dict(small_network("fpn_resnet18").state_dict())


def _zeros(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def _bias(path):
    return agln_fast.load_checkpoint(path).classifier[4].bias


@pytest.mark.parametrize("container", CONTAINERS)
def test_weights_are_found_in_their_container(container, state, tmp_path, caplog):
    torch.save({"epoch": 3, container: state, "optimizer": {"state": {0: torch.zeros(2)}}}, tmp_path / "x.pth")
    assert torch.equal(_bias(tmp_path / "x.pth"), state["classifier.4.bias"])
    assert not caplog.records


@pytest.mark.parametrize(("first", "second"), list(itertools.pairwise(CONTAINERS)))
def test_of_several_containers_one_is_preferred_and_said(first, second, state, tmp_path, caplog):
    torch.save({second: _zeros(state), first: state}, tmp_path / "x.pth")
    assert torch.equal(_bias(tmp_path / "x.pth"), state["classifier.4.bias"])
    (record,) = caplog.records
    assert f"under '{first}' and '{second}'; those of '{first}' are taken" in record.getMessage()
    assert record.name == "agln_fast.checkpoint"
    assert record.levelno == logging.WARNING


def test_containers_without_weights_are_passed_over(state, tmp_path, caplog):
    settings = {"architecture": "fpn", "width": 0.25}
    torch.save({"model": settings, "state_dict": {}, "ema": {"module": state, "updates": 7}}, tmp_path / "x.pth")
    assert torch.equal(_bias(tmp_path / "x.pth"), state["classifier.4.bias"])
    assert not caplog.records


def test_a_container_that_holds_itself_ends():
    content = {"a": torch.zeros(1)}
    content["model"] = content
    assert find_weights(content, "x")["a"] is content["a"]


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "model.",
        "_orig_mod.",
        "net.",
        "network.",
        "module.model.",
        "model.module.",
        "_orig_mod.module.",
        "module._orig_mod.net.model.",
        "module.module.",
        "segmenter.",
    ],
)
def test_common_prefixes_are_stripped_in_any_order(prefix, state, tmp_path):
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in state.items()}}, tmp_path / "x.pth")
    loaded = agln_fast.load_checkpoint(tmp_path / "x.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_prefixes_of_some_names_stay(state, tmp_path):
    some = {f"module.{name}" if name.startswith("encoder.") else name: tensor for name, tensor in state.items()}
    torch.save(some, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="blocks a stage"):
        agln_fast.load_checkpoint(tmp_path / "x.pth")


def test_prefixes_of_encoders_are_stripped(small_network, state, tmp_path):
    encoder = {f"backbone.{k.removeprefix('encoder.')}": t for k, t in state.items() if k.startswith("encoder.")}
    torch.save({"state_dict": encoder}, tmp_path / "x.pth")
    network = small_network("fpn_resnet18")
    torch.nn.init.zeros_(network.encoder.conv1.weight)
    agln_fast.load_backbone(network, tmp_path / "x.pth")
    assert torch.equal(network.encoder.conv1.weight, state["encoder.conv1.weight"])


@pytest.mark.parametrize("container", [None, "model_ema"])
def test_the_average_that_pytorch_makes_is_read(container, small_network, state, tmp_path, caplog):
    averaged = torch.optim.swa_utils.AveragedModel(small_network("fpn_resnet18")).state_dict()
    torch.save({container: averaged} if container else averaged, tmp_path / "x.pth")
    loaded = agln_fast.load_checkpoint(tmp_path / "x.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert "1 entries of losses or counters ignored (n_averaged)" in caplog.text


FOREIGN = {
    "criterion.weight": torch.ones(5),
    "loss.weight": torch.ones(5),
    "loss_fn.pos_weight": torch.ones(5),
    "aux_loss.0.weight": torch.ones(5, dtype=torch.int64),
    "criterion.center.embedding": torch.ones(2, 2, dtype=torch.complex64),
    "total_ops": torch.zeros(1, dtype=torch.float64),
    "model.total_params": torch.zeros(1, dtype=torch.float64),
    "model.encoder.conv1.total_ops": torch.zeros(1, dtype=torch.float64),
}


def test_losses_and_counters_are_ignored_with_one_line(state, tmp_path, caplog):
    named = {f"model.{name}": tensor for name, tensor in state.items()}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in (named | FOREIGN).items()}}, tmp_path / "x")
    loaded = agln_fast.load_checkpoint(tmp_path / "x").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    (record,) = caplog.records
    assert "8 entries of losses or counters ignored" in record.getMessage()
    assert record.getMessage().isprintable()


def test_of_prefixes_without_end_some_are_stripped():
    weights = find_weights({"a." * 100 + "b": torch.zeros(1), "a." * 100 + "c": torch.zeros(1)}, "x")
    assert list(weights) == ["a." * 84 + "b", "a." * 84 + "c"]


@pytest.mark.parametrize("name", ["lossless.weight", "loss", "encoder.loss.weight", "closs.weight"])
def test_what_only_looks_like_a_loss_is_not_ignored(name, state, tmp_path):
    torch.save({**state, name: torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"1 unexpected \({name}\)"):
        agln_fast.load_checkpoint(tmp_path / "x.pth")


REFUSED = {
    "a list": ([torch.zeros(1)], "no state dict but list"),
    "a tensor": (torch.zeros(1), "no state dict but tensor"),
    "empty": ({}, "no state dict but an empty one"),
    "empty inside": ({"model": {}}, "no state dict but an empty one"),
    "an array of NumPy": ({"model": {"a": np.zeros(1)}}, r"entry 'a' is no tensor but numpy\.\w+\.multiarray"),
    "losses": ({"loss.weight": torch.zeros(1)}, "no state dict but losses and counters"),
    "a number as name": ({7: torch.zeros(1)}, "of type int is no name of a tensor"),
    "a long name": ({"x." * 400: torch.zeros(1)}, "is no name of a tensor"),
    "an optimizer": (
        {"optimizer": {"state": {}}, "epoch": 1},
        r"entry 'optimizer' is no tensor but dict \(weights may be under state_dict, .*, model_ema, ",
    ),
    "many names": ({str(i): 0 for i in range(20_001)}, "its state dict has 20,001 entries, which no network has"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_holds_no_weights_is_refused(case, tmp_path):
    content, message = REFUSED[case]
    path = tmp_path / "x.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        agln_fast.load_checkpoint(path)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantised_weights_are_told(tmp_path):
    torch.save({"a": torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"'a' is not a dense tensor of real numbers \(quantised tensor\)"):
        agln_fast.load_checkpoint(tmp_path / "x.pth")


def test_a_negative_variance_is_named_by_its_tensor(state, tmp_path):
    variance = state["encoder.layer2.0.bn1.running_var"].clone()
    variance[3] = -0.25
    torch.save({**state, "encoder.layer2.0.bn1.running_var": variance}, tmp_path / "x.pth")
    with pytest.raises(
        CheckpointError, match=r"'encoder.layer2.0.bn1.running_var' holds a negative variance \(-0.25\)"
    ):
        agln_fast.load_checkpoint(tmp_path / "x.pth")
