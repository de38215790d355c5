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
    "weights",
    "state_dict_ema",
    "ema_state_dict",
    "model_ema_state_dict",
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
    assert find_weights(content).state["a"] is content["a"]


def test_a_container_that_holds_nothing_but_itself_holds_nothing():
    loop = {}
    loop["ema"] = loop
    state = {"a.x": torch.zeros(1), "b.x": torch.zeros(1)}
    assert find_weights({"model": loop, "net": state}).state == state


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
        "model._orig_mod.module.",
        "_fsdp_wrapped_module.model._checkpoint_wrapped_module.",
    ],
)
def test_common_prefixes_are_stripped_in_any_order(prefix, state, tmp_path):
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in state.items()}}, tmp_path / "x.pth")
    loaded = agln_fast.load_checkpoint(tmp_path / "x.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_prefixes_of_some_names_stay(state, tmp_path):
    some = {f"wrapped.{name}" if name.startswith("encoder.") else name: tensor for name, tensor in state.items()}
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
    weights = find_weights({"a." * 100 + "b": torch.zeros(1), "a." * 100 + "c": torch.zeros(1)}).state
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
    "an array of NumPy": ({"model": {"a": np.zeros(1)}}, r"holds no tensors but 'a' \(numpy\.\w+\.multiarray"),
    "losses": ({"loss.weight": torch.zeros(1)}, "no state dict but losses and counters"),
    "many other things": (
        {f"\x1b{i}": i for i in range(9)},
        r"no tensors but '\\x1b0' \(int\), .*'\\x1b4' \(int\), …; ",
    ),
    "a number as name": ({7: torch.zeros(1)}, "of type int is no name of a tensor"),
    "a long name": ({"x." * 400: torch.zeros(1)}, "is no name of a tensor"),
    "an optimizer": (
        {"optimizer": {"state": {}}, "epoch": 1},
        r"holds no tensors but 'optimizer' \(dict\), 'epoch' \(int\); weights may be under state_dict, .*, model_ema, ",
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


def test_wrappers_are_taken_out_wherever_they_stand(state, tmp_path):
    """Parts are compiled, or spread over devices, each by itself."""
    wrapped = {
        name.replace("encoder.layer1.", "encoder._orig_mod.layer1.module.").replace(
            "classifier.", "module.classifier."
        ): t
        for name, t in state.items()
    }
    torch.save(wrapped, tmp_path / "x.pth")
    loaded = agln_fast.load_checkpoint(tmp_path / "x.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_two_names_that_become_one_are_refused(state, tmp_path):
    torch.save({**state, "encoder._orig_mod.conv1.weight": state["encoder.conv1.weight"]}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"several of its entries are 'encoder\.conv1\.weight' without wrappers"):
        agln_fast.load_checkpoint(tmp_path / "x.pth")


WANTED = {
    "by name": ({"model": 0, "ema": 1}, "ema"),
    "any average": ({"model": 0, "model_ema": 1}, "ema"),
    "an average by its own name": ({"model": 0, "ema": 0, "model_ema": 1}, "model_ema"),
    "the name is not part of another": ({"model_ema": 0, "model": 1}, "model"),
    "below a container": ({"checkpoint": {"model": 0, "ema": {"module": 1}}}, "ema"),
    "by its path": ({"state_dict": {"model": 0, "ema": 1}}, "state_dict.ema"),
    "a name that nobody knows": ({"student": 0, "teacher": 1}, "teacher"),
    "beside a known one": ({"state_dict": 0, "teacher": 1}, "teacher"),
    "what it has alone": ({"state_dict": 1}, "state_dict"),
}


@pytest.mark.parametrize("case", WANTED)
def test_other_weights_are_taken_when_they_are_asked_for(case, state, tmp_path, caplog):
    def filled(content):
        if isinstance(content, dict):
            return {name: filled(inner) for name, inner in content.items()}
        return state if content else _zeros(state)

    places, wanted = WANTED[case]
    torch.save(filled(places), tmp_path / "x.pth")
    network = agln_fast.load_checkpoint(tmp_path / "x.pth", weights=wanted)
    assert torch.equal(network.classifier[4].bias, state["classifier.4.bias"])
    assert not [record for record in caplog.records if "are taken, others" in record.getMessage()]


@pytest.mark.parametrize("container", [None, "state_dict"])
@pytest.mark.parametrize(("wanted", "first"), [(None, "model"), ("ema", "model_ema"), ("teacher", "teacher")])
def test_weights_under_first_parts_of_names_are_told_apart(wanted, first, container, state, tmp_path, caplog):
    """As Lightning stores them: each network is a member of the module that trains."""
    firsts = ("model", "model_ema", "teacher")
    joined = {f"{f}.{name}": t for f in firsts for name, t in (state if f == first else _zeros(state)).items()}
    joined |= {"mean": torch.zeros(3), "val_iou.matrix": torch.zeros(2, 2)}
    torch.save({container: joined} if container else joined, tmp_path / "x.pth")
    assert torch.equal(
        agln_fast.load_checkpoint(tmp_path / "x.pth", weights=wanted).classifier[4].bias, state["classifier.4.bias"]
    )
    (record,) = caplog.records
    place = f"{container}." if container else ""
    assert f"holds weights under '{place}{first}' and '{place}model" in record.getMessage()
    assert "entries that are no part of it ignored (" in record.getMessage()


UNWANTED = {
    "another name": (
        {"model": 0, "ema": 0},
        "emma",
        "under 'emma': it has them under 'model' and 'ema'; did you mean 'ema'",
    ),
    "part of a name": (
        {"state_dict": 0, "model_ema": 0},
        "model",
        "no weights under 'model': it has them under 'state_",
    ),
    "plain": (0, "ema", "no weights under 'ema': it is one state dict"),
    "two averages": ({"ema": 0, "model_ema": 0}, "average", "no weights under 'average': it has them under"),
    "two averages, and either is meant": (
        {"ema_state_dict": 0, "model_ema": 0},
        "ema",
        "several moving averages, 'ema_st",
    ),
    "an optimizer": ({"model": 0, "optimizer": {"state": {}}}, "optimizer", r"no tensors but 'state' \(dict\)"),
    "nobody knows": (
        {"student": 0, "teacher": 0},
        None,
        "under 'student' and 'teacher': say which with --weights NAME",
    ),
    "many": ({f"fold{i}": 0 for i in range(7)}, None, "under 'fold0' and 'fold1' and 'fold2' and 4 more: say which"),
}


@pytest.mark.parametrize("case", UNWANTED)
def test_what_is_asked_for_and_not_there_is_told(case, state, tmp_path):
    def filled(content):
        return {name: filled(inner) for name, inner in content.items()} if isinstance(content, dict) else state

    places, wanted, message = UNWANTED[case]
    torch.save(filled(places), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        agln_fast.load_checkpoint(tmp_path / "x.pth", weights=wanted)


def test_the_only_weights_are_taken_under_any_name_and_said(state, tmp_path, caplog):
    beside = {"optimizer": {"a.b": torch.zeros(1)}, "rng": {"cpu": torch.zeros(8, dtype=torch.uint8)}}
    torch.save({"student": state, "loss_fn": {"a.b": torch.zeros(1)}, **beside}, tmp_path / "x.pth")
    assert torch.equal(_bias(tmp_path / "x.pth"), state["classifier.4.bias"])
    assert "weights under 'student', the only ones that it holds; not used: loss_fn, optimizer, rng" in caplog.text


def test_all_that_was_done_is_one_line(state, tmp_path, caplog):
    half = {
        f"module.model.{name}": tensor.half() if tensor.ndim > 1 else tensor.bfloat16() if tensor.ndim else tensor
        for name, tensor in state.items()
    }
    counts = [sum(tensor.dtype == kind for tensor in half.values()) for kind in (torch.float16, torch.bfloat16)]
    content = {"model": {**half, "module.loss.weight": torch.ones(5)}, "ema": {"module": state}, "epoch": 3}
    torch.save({**content, "optimizer": {}, "args": 1, "scheduler": {}}, tmp_path / "x.pth")
    network = agln_fast.load_checkpoint(tmp_path / "x.pth")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    (record,) = caplog.records
    said = record.getMessage().removeprefix(f"{tmp_path / 'x.pth'}: ").split("; ")
    assert said == [
        "holds weights under 'model' and 'ema'",
        "those of 'model' are taken, others with --weights NAME, or weights=NAME",
        "names without 'module.' and 'model.'",
        f"{counts[0]} tensors of float16 and {counts[1]} tensors of bfloat16 converted to float32",
        "1 entries of losses or counters ignored (loss.weight)",
        "not used: epoch, optimizer, args, …",
    ]


def test_what_changes_nothing_is_for_information(state, tmp_path, caplog):
    torch.save({"state_dict": {f"net.{name}": t for name, t in state.items()}, "epoch": 3}, tmp_path / "x.pth")
    with caplog.at_level(logging.INFO, "agln_fast.checkpoint"):
        _bias(tmp_path / "x.pth")
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage().endswith("weights under 'state_dict'; names without 'net.'; not used: epoch")


def test_a_plain_file_needs_no_word(state, tmp_path, caplog):
    torch.save(state, tmp_path / "x.pth")
    with caplog.at_level(logging.INFO, "agln_fast.checkpoint"):
        _bias(tmp_path / "x.pth")
    assert not caplog.records


def test_names_in_the_line_are_escaped(state, tmp_path, caplog):
    strange = {"a\x1b[2J": {f"b\u202e.{name}": t for name, t in state.items()}, "c\r\nd": 1}
    torch.save(strange, tmp_path / "x.pth")
    _bias(tmp_path / "x.pth")
    (record,) = caplog.records
    assert record.getMessage().isprintable()
    assert r"under 'a\x1b[2J'" in record.getMessage()


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
