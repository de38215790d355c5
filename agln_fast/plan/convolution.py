"""Convolution, bias, residual and ReLU as one layer, and the choice of who computes it on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agln_fast.kernels.bias_relu import bias_relu

__all__ = ["WAYS", "FusedConv2d", "Race", "Way", "choose_convolutions"]

Way = Literal["in_steps", "in_two_kernels", "in_one_call"]
WAYS: tuple[Way, ...] = get_args(Way)
"""Methods of `FusedConv2d` that compute the same."""

Race = Callable[[Sequence[Callable[[], Tensor]]], Sequence[float]]

_CALLS, _ROUNDS = 10, 15


class FusedConv2d(nn.Module):
    """y = relu(conv(x) + bias + residual), all but the convolution where there are any.

    x (B, in, H, W), residual (B, out, H', W') -> (B, out, H', W'); all of the weight's dtype, best in channels_last.

    `way`: who computes it on CUDA, of `WAYS`. PyTorch takes three kernels or four (convolution, bias, residual, ReLU),
    `bias_relu` makes two of them, and cuDNN has one call for all, whose convolution may be the slower one:
    `choose_convolutions` sets it by timing. Without effect where there is no CUDA; `in_steps` where there is no ReLU.

    Whether float32 products are rounded to TF32 is `torch.backends.cudnn.allow_tf32`'s to say, in every way.
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
        self.way: Way = "in_steps"

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        compute: Callable[..., Tensor] = getattr(self, self.way if x.is_cuda else "in_steps")
        return compute(x, residual)

    def in_steps(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """One kernel after the other, on any device."""
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if residual is not None:
            y = y.add_(residual)
        return y.relu_() if self.relu else y

    def in_two_kernels(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The convolution, then the rest, ReLU included, as one op: a map less to read and write for each step."""
        assert self.bias is not None
        y = F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)
        return bias_relu(y, self.bias, residual)

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
def choose_convolutions(
    network: nn.Module, x: Tensor, race: Race | None = None, known: dict[str, str] | None = None
) -> None:
    """Set `way` of every `FusedConv2d` with a ReLU in `network` to what is fastest for the input `x`, in place.

    Runs the network once to see what reaches each layer, then times all ways on random data. Layers that do the same
    work on the same shapes are timed once, so they get the same answer. What cuDNN refuses to do in one call does not
    take part. cuDNN's `benchmark` and `allow_tf32` hold for the race: the caller sets them as they will be later.

    Args:
        network: takes `x`.
        race: takes calls that ran before, and returns their times; None to time them on CUDA if `x` is there. On other
            devices there is nothing to choose then, and nothing is done.
        known: what was chosen before for some jobs on such a device, by such versions: looked into, and filled.

    Raises:
        RuntimeError: a layer cannot be computed at all.
    """
    if race is None:
        if not x.is_cuda:
            return
        race = _race
    known = {} if known is None else known
    for layer, (features, residual) in _traffic(network, x).items():
        geometry = tuple(layer.weight.shape), layer.stride, layer.padding, layer.dilation, layer.groups
        job = f"{features}, {residual}, {geometry}"
        if known.get(job) not in WAYS:
            known[job] = _fastest(layer, features, residual, race)
        layer.way = cast(Way, known[job])


# Shape, strides and dtype of a tensor.
_Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


def _layout(x: Tensor) -> _Layout:
    return tuple(x.shape), x.stride(), x.dtype


def _traffic(network: nn.Module, x: Tensor) -> dict[FusedConv2d, tuple[_Layout, _Layout | None]]:
    """Input and residual of each layer with a ReLU; of its last call, if there are several.

    cuDNN looks for no fast algorithms in this run, whose convolutions may not be the chosen ones.
    """
    seen: dict[FusedConv2d, tuple[_Layout, _Layout | None]] = {}

    def note(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        features, *residual = map(_layout, arguments)
        seen[cast(FusedConv2d, layer)] = features, residual[0] if residual else None

    layers = [module for module in network.modules() if isinstance(module, FusedConv2d) and module.relu]
    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    searches = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        network(x)
    finally:
        torch.backends.cudnn.benchmark = searches
        for hook in hooks:
            hook.remove()
    return seen


def _fastest(layer: FusedConv2d, features: _Layout, residual: _Layout | None, race: Race) -> Way:
    device = layer.weight.device
    generator = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay as they would have been

    def draw(layout: _Layout) -> Tensor:
        return torch.empty_strided(layout[0], layout[1], dtype=layout[2], device=device).normal_(generator=generator)

    x, z = draw(features), None if residual is None else draw(residual)
    calls: dict[Way, Callable[[], Tensor]] = {}
    for way in WAYS:
        call = partial(getattr(layer, way), x, z)
        try:
            call()
        except RuntimeError as error:
            if way != "in_one_call" or isinstance(error, torch.OutOfMemoryError):
                raise
        else:
            calls[way] = call
    times = dict(zip(calls, race(list(calls.values())), strict=True))
    return min(times, key=times.__getitem__)


def _race(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Median milliseconds of each, as CUDA graphs: the time to launch a kernel, which they hide, shall not count.

    They take turns, so that a clock that drifts is the same for all.
    """
    graphs = [_captured(call) for call in calls]
    times: list[list[float]] = [[] for _ in graphs]
    for _ in range(_ROUNDS):
        for graph, results in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            results.append(start.elapsed_time(end) / _CALLS)
    return [median(results) for results in times]


def _captured(call: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    """Several calls in a row as a graph; the first one of all, which chose the algorithm, was before."""
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
