"""FusedConv2d: the ways to compute it, and the choice between them."""

from __future__ import annotations

import copy
import json
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tolerance import assert_as_exact
from torch import nn

from agln_fast.plan.convolution import WAYS, FusedConv2d, _captured, choose_convolutions


def layer(*arguments, relu=True, **keywords):
    torch.manual_seed(0)
    return FusedConv2d(nn.Conv2d(*arguments, **keywords), relu=relu)


def image():
    return torch.randn(1, 8, 6, 6).to(memory_format=torch.channels_last)


class Small(nn.Module):
    """Two equal layers, one with a residual, one of another shape, one without ReLU."""

    def __init__(self):
        super().__init__()
        self.first, self.twin = (layer(8, 8, 3, padding=1) for _ in range(2))
        self.residual = layer(8, 8, 3, padding=1)
        self.strided = layer(8, 16, 1, stride=2)
        self.linear = layer(16, 4, 1, relu=False)

    def forward(self, x):
        x = self.twin(self.first(x))
        return self.linear(self.strided(self.residual(x, x)))

    def choices(self):
        return {name: module.way for name, module in self.named_children()}


UNCHANGED = dict.fromkeys(["first", "twin", "residual", "strided", "linear"], "in_steps")


@pytest.fixture
def cudnn(monkeypatch):
    """One that refuses nothing, on CPUs."""
    monkeypatch.setattr(FusedConv2d, "in_one_call", FusedConv2d.in_steps)


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize(
    "keywords",
    [
        pytest.param({"kernel_size": 3, "padding": 1}, id="3x3"),
        pytest.param({"kernel_size": 1}, id="1x1"),
        pytest.param({"kernel_size": 7, "stride": 2, "padding": 3}, id="stem"),
        pytest.param({"kernel_size": 3, "padding": 4, "dilation": 4}, id="dilated"),
        pytest.param({"kernel_size": 3, "padding": 1, "groups": 2}, id="grouped"),
    ],
)
@torch.inference_mode()
def test_is_a_convolution_with_an_epilogue(keywords, residual, relu):
    convolution = nn.Conv2d(6, 10, **keywords).double()
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64).to(memory_format=torch.channels_last)
    expected = convolution(x)
    z = torch.randn_like(expected) if residual else None
    kept = None if z is None else z.clone()
    fused = FusedConv2d(convolution, relu=relu)
    fused.way = "in_one_call"  # without effect: there is no CUDA
    expected = expected if z is None else expected + z
    for compute in [fused, fused.in_two_kernels] if relu else [fused]:
        y = compute(x, z)
        torch.testing.assert_close(y, expected.relu() if relu else expected)
        assert z is None or torch.equal(z, kept)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_the_fastest_way_is_chosen_and_equal_layers_are_timed_once(cudnn):
    network = Small()
    races = []

    def race(calls):
        assert len(calls) == len(WAYS)
        races.append(tuple(calls[0]().shape))
        return [(3.0, 2.0, 1.0), (3.0, 1.0, 2.0), (1.0, 2.0, 3.0)][len(races) - 1]

    choose_convolutions(network, image(), race)
    assert races == [(1, 8, 6, 6), (1, 8, 6, 6), (1, 16, 3, 3)]  # without a residual, with one, strided
    assert network.choices() == {**UNCHANGED, "first": WAYS[2], "twin": WAYS[2], "residual": WAYS[1]}
    choose_convolutions(network, image(), lambda calls: [1.0] * len(calls))
    assert network.choices() == UNCHANGED


def test_what_is_known_does_not_race(cudnn):
    """What a race chose is known to the next one, as plain text; another shape, and nonsense, is not."""
    known = {}
    choose_convolutions(Small(), image(), lambda calls: [3.0, 2.0, 1.0], known)
    assert json.loads(json.dumps(known)) == known
    assert list(known.values()) == 3 * [WAYS[2]]
    network = Small()
    choose_convolutions(network, image(), lambda calls: pytest.fail("it is known"), known)
    assert network.choices() == {**dict.fromkeys(UNCHANGED, WAYS[2]), "linear": "in_steps"}
    races = []

    def race(calls):
        races.append(calls)
        return [1.0, 2.0, 3.0]

    choose_convolutions(Small(), image(), race, {**known, next(iter(known)): "by hand"})
    assert len(races) == 1
    choose_convolutions(Small(), image()[..., :5], race, known)
    assert len(races) > 3


def test_all_ways_that_race_compute_the_same(cudnn):
    def race(calls):
        results = [call() for call in calls]
        for y in results[1:]:
            torch.testing.assert_close(y, results[0])
        return [0.0] * len(calls)

    choose_convolutions(Small(), image(), race)


def test_what_cudnn_refuses_does_not_take_part():
    network = Small()
    network.first.way = "in_one_call"

    def race(calls):
        assert [call.func.__name__ for call in calls] == ["in_steps", "in_two_kernels"]  # no cuDNN on a CPU
        return 2.0, 1.0

    choose_convolutions(network, image(), race)
    assert set(network.choices().values()) == {"in_steps", "in_two_kernels"}
    assert network.linear.way == "in_steps"


def test_an_error_of_any_other_way_is_one(monkeypatch):
    def fail(self, x, residual):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FusedConv2d, "in_two_kernels", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        choose_convolutions(Small(), image(), lambda calls: [1.0] * len(calls))


def test_the_cpu_has_no_choice():
    network = Small()
    network.forward = pytest.fail
    choose_convolutions(network, image())
    assert network.choices() == UNCHANGED


@pytest.mark.parametrize(("current", "made"), [("the backend's", 0), ("default", 1)])
def test_races_on_the_stream_of_whoever_asks(current, made, monkeypatch):
    """A new stream might be one that another backend replays on: PyTorch has 32 of them."""
    streams, used = [], []

    @contextmanager
    def capture(graph, stream, capture_error_mode):
        used.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "default")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: streams.append("new") or "new")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    _captured(lambda: None)
    assert len(streams) == made
    assert used == (["new"] if made else [current])


@pytest.mark.parametrize("searches", [True, False])
def test_algorithms_are_searched_for_in_the_race_alone(searches, cudnn, monkeypatch):
    """Looking at the layers runs none of the chosen ways: a search there would be for nothing, at each start."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", searches)
    network, seen = Small(), []
    network.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))

    def race(calls):
        seen.append(torch.backends.cudnn.benchmark)
        return [1.0] * len(calls)

    choose_convolutions(network, image(), race)
    assert seen == [False, searches, searches, searches]
    assert torch.backends.cudnn.benchmark == searches


@pytest.mark.parametrize("error", [RuntimeError, None], ids=["failed-run", "run"])
def test_no_hook_stays(error):
    network = Small()
    if error:
        network.linear.forward = lambda x: (_ for _ in ()).throw(error)
        with pytest.raises(error):
            choose_convolutions(network, image(), lambda calls: [1.0] * len(calls))
    else:
        choose_convolutions(network, image(), lambda calls: [1.0] * len(calls))
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@torch.inference_mode()
def test_all_ways_agree_on_the_gpu(dtype):
    """With float64, to twice what PyTorch's own steps are away from it."""
    network = Small().to("cuda", dtype)
    x = torch.randn(2, 8, 33, 31, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        steps, exact = network(x), copy.deepcopy(network).double()(x.double())
        choose_convolutions(network, x)  # any answer is right
        assert_as_exact(network(x), exact, steps)
        for way in WAYS:
            for module in (network.first, network.twin, network.residual, network.strided):
                module.way = way
            poison = [torch.full_like(x, torch.nan) for _ in range(16)]
            del poison  # what is allocated next was NaN
            assert_as_exact(network(x), exact, steps)
