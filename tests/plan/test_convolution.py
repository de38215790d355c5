"""FusedConv2d: both ways to compute it, and the choice between them."""

from __future__ import annotations

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from tolerance import assert_as_exact
from torch import nn

from agln_fast.plan.convolution import FusedConv2d, _captured, _race, choose_convolutions


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
        return {name: module.cudnn for name, module in self.named_children()}


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
    fused.cudnn = True  # without effect: there is no CUDA
    y = fused(x, z)
    expected = expected if z is None else expected + z
    torch.testing.assert_close(y, expected.relu() if relu else expected)
    assert z is None or torch.equal(z, kept)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_the_faster_way_is_chosen_and_equal_layers_are_timed_once():
    network = Small()
    races = []

    def race(steps, one_call):
        y = steps()
        races.append(tuple(y.shape))
        return (2.0, 1.0) if y.shape[1] == 8 else (1.0, 2.0)

    choose_convolutions(network, image(), race)
    assert races == [(1, 8, 6, 6), (1, 8, 6, 6), (1, 16, 3, 3)]  # without a residual, with one, strided
    expected = {"first": True, "twin": True, "residual": True, "strided": False, "linear": False}
    assert network.choices() == expected
    choose_convolutions(network, image(), lambda steps, one_call: (1.0, 1.0))
    assert not any(network.choices().values())


def test_where_cudnn_refuses_the_steps_stay():
    network = Small()
    network.first.cudnn = True
    choose_convolutions(network, image(), _race)  # there is no cuDNN on a CPU
    assert not any(network.choices().values())


def test_the_cpu_has_no_choice():
    network = Small()
    network.forward = pytest.fail
    choose_convolutions(network, image())
    assert not any(network.choices().values())


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


@pytest.mark.parametrize("error", [RuntimeError, None], ids=["failed-run", "run"])
def test_no_hook_stays(error):
    network = Small()
    if error:
        network.linear.forward = lambda x: (_ for _ in ()).throw(error)
        with pytest.raises(error):
            choose_convolutions(network, image(), lambda steps, one_call: (1.0, 2.0))
    else:
        choose_convolutions(network, image(), lambda steps, one_call: (1.0, 2.0))
    assert not any(module._forward_pre_hooks for module in network.modules())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@torch.inference_mode()
def test_both_ways_agree_on_the_gpu(dtype):
    """With float64, to twice what PyTorch's own steps are away from it."""
    network = Small().to("cuda", dtype)
    x = torch.randn(2, 8, 33, 31, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        steps, exact = network(x), copy.deepcopy(network).double()(x.double())
        choose_convolutions(network, x)  # either answer is right
        assert_as_exact(network(x), exact, steps)
        for module in (network.first, network.twin, network.residual, network.strided):
            module.cudnn = True
        assert_as_exact(network(x), exact, steps)
