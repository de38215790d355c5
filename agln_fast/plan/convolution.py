"""Convolution, bias, residual and ReLU as one layer, and the choice of who computes it on CUDA."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FusedConv2d", "Race", "choose_convolutions"]

Race = Callable[[Callable[[], Tensor], Callable[[], Tensor]], tuple[float, float]]

_CALLS, _ROUNDS = 10, 15


class FusedConv2d(nn.Module):
    """y = relu(conv(x) + bias + residual), all but the convolution where there are any.

    x (B, in, H, W), residual (B, out, H', W') -> (B, out, H', W'); all of the weight's dtype, best in channels_last.

    `cudnn`: on CUDA, let cuDNN do it in one call. PyTorch takes three kernels or four (convolution, bias, residual,
    ReLU), whose convolution may be the faster one; `choose_convolutions` sets it by timing. Without effect where there
    is no ReLU, or no CUDA.

    Whether float32 products are rounded to TF32 is `torch.backends.cudnn.allow_tf32`'s to say, on both paths.
    """

    def __init__(self, convolution: nn.Conv2d, *, relu: bool) -> None:
        """Takes over the weight, in channels_last, and the bias of `convolution`, which has zero padding.

        `relu` needs a bias.
        """
        super().__init__()
        assert convolution.bias is not None or not relu
        assert convolution.padding_mode == "zeros"
        weight = convolution.weight.detach().contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        bias = convolution.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.stride = convolution.stride
        self.padding = cast(tuple[int, int], convolution.padding)
        self.dilation = convolution.dilation
        self.groups = convolution.groups
        self.relu = relu
        self.cudnn = False

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.in_one_call(x, residual) if self.cudnn and x.is_cuda else self.in_steps(x, residual)

    def in_steps(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """One kernel after the other, on any device."""
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if self.relu else y

    def in_one_call(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """By cuDNN, ReLU included.

        Raises:
            RuntimeError: cuDNN has no such kernel, or is not there.
        """
        geometry = self.stride, self.padding, self.dilation, self.groups
        if residual is None:
            return torch.cudnn_convolution_relu(x, self.weight, self.bias, *geometry)
        return torch.cudnn_convolution_add_relu(x, self.weight, residual, 1.0, self.bias, *geometry)

    def extra_repr(self) -> str:
        out, features = self.weight.shape[:2]
        kernel_size = tuple(self.weight.shape[2:])
        return f"{features * self.groups}, {out}, {kernel_size}, stride={self.stride}, relu={self.relu}"


@torch.no_grad()
def choose_convolutions(network: nn.Module, x: Tensor, race: Race | None = None) -> None:
    """Set `cudnn` of every `FusedConv2d` with a ReLU in `network` to what is faster for the input `x`, in place.

    Runs the network once to see what reaches each layer, then times both paths on random data. Layers that do the same
    work on the same shapes are timed once, so they get the same answer. Where cuDNN refuses, the steps stay. cuDNN's
    `benchmark` and `allow_tf32` hold for the race too: the caller sets them as they will be later.

    Args:
        network: takes `x`.
        race: takes two calls, in steps and in one, and returns their times, infinite for one that fails; None to time
            them on CUDA if `x` is there. On other devices there is nothing to choose then, and nothing is done.
    """
    if race is None:
        if not x.is_cuda:
            return
        race = _race
    faster: dict[tuple[Any, ...], bool] = {}
    for layer, (features, residual) in _traffic(network, x).items():
        job = features, residual, layer.weight.shape, layer.stride, layer.padding, layer.dilation, layer.groups
        if job not in faster:
            faster[job] = _one_call_is_faster(layer, features, residual, race)
        layer.cudnn = faster[job]


# Shape, strides and dtype of a tensor.
_Layout = tuple[torch.Size, tuple[int, ...], torch.dtype]


def _layout(x: Tensor) -> _Layout:
    return x.shape, x.stride(), x.dtype


def _traffic(network: nn.Module, x: Tensor) -> dict[FusedConv2d, tuple[_Layout, _Layout | None]]:
    """Input and residual of each layer with a ReLU; of its last call, if there are several."""
    seen: dict[FusedConv2d, tuple[_Layout, _Layout | None]] = {}

    def note(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        features, *residual = map(_layout, arguments)
        seen[cast(FusedConv2d, layer)] = features, residual[0] if residual else None

    layers = [module for module in network.modules() if isinstance(module, FusedConv2d) and module.relu]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    try:
        network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _one_call_is_faster(layer: FusedConv2d, features: _Layout, residual: _Layout | None, race: Race) -> bool:
    device = layer.weight.device
    generator = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay as they would have been

    def draw(layout: _Layout) -> Tensor:
        return torch.empty_strided(layout[0], layout[1], dtype=layout[2], device=device).normal_(generator=generator)

    x, z = draw(features), None if residual is None else draw(residual)
    steps, one_call = race(lambda: layer.in_steps(x, z), lambda: layer.in_one_call(x, z))
    return one_call < steps


def _race(steps: Callable[[], Tensor], one_call: Callable[[], Tensor]) -> tuple[float, float]:
    """Median milliseconds of both, as CUDA graphs: the time to launch a kernel, which they hide, shall not count.

    They take turns, so that a clock that drifts is the same for both.
    """
    try:
        one_call()
    except RuntimeError:  # cuDNN has no such kernel
        return 0.0, math.inf
    graphs = [_captured(call) for call in (steps, one_call)]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_ROUNDS):
        for graph, results in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            results.append(start.elapsed_time(end) / _CALLS)
    return median(times[0]), median(times[1])


def _captured(call: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    """Several calls in a row as a graph, after a first one that chose the algorithm, or failed."""
    call()
    graph = torch.cuda.CUDAGraph()
    # The caller's stream. PyTorch hands out 32 in rotation, and a new one might be another backend's, which replays on
    # it; the default stream alone cannot be captured. The outer context: a capture that fails leaves its stream the
    # current one.
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with (
        torch.cuda.stream(torch.cuda.current_stream()),
        torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
    ):
        for _ in range(_CALLS):
            call()
    return graph
