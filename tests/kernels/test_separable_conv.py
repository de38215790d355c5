"""separable_conv: reference, kernel under the interpreter, and op against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import poisoned, shipped, tiny
from tolerance import assert_as_exact
from torch import Tensor

from agln_fast.kernels import separable_conv
from agln_fast.kernels.launch import choose
from agln_fast.kernels.registration import OPS
from agln_fast.kernels.separable_conv import kernel

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def plain(x: Tensor, w_depthwise: Tensor, w_pointwise: Tensor, bias: Tensor) -> Tensor:
    """As PyTorch runs it, operation by operation, in the dtype of its arguments."""
    filtered = F.conv2d(x, w_depthwise, padding=1, groups=x.shape[1])
    return F.conv2d(filtered, w_pointwise, bias).relu()


def inputs(shape: tuple[int, ...], outputs: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    x = torch.randn(shape, generator=generator)
    w_depthwise = torch.randn(channels, 1, 3, 3, generator=generator) / 3
    w_pointwise = torch.randn(outputs, channels, 1, 1, generator=generator) / channels**0.5
    return [tensor.to(dtype) for tensor in (x, w_depthwise, w_pointwise, torch.randn(outputs, generator=generator))]


def check(y: Tensor, arguments: list[Tensor]) -> None:
    """Terms may cancel, or ReLU hide them all: then PyTorch's own error, and the ulp of what is left, say little of
    sums as large as that of the terms' magnitudes, which are rounded in float32 at the least."""
    exact = [argument.double() for argument in arguments]
    terms = plain(*(argument.abs() for argument in exact)).max().item()
    assert_as_exact(y, plain(*exact), plain(*arguments), torch.finfo(torch.float32).eps * terms)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("shape", "outputs", "tile"),
    [
        pytest.param((1, 32, 8, 8), 32, {"C": 32, "O": 32, "K": 32}, id="one-tile-of-channels"),
        pytest.param((2, 40, 7, 9), 20, {"K": 40}, id="held-in-slices-the-last-not-full"),
        pytest.param((1, 20, 9, 17), 33, {"K": 32, "P": 64, "processors": 1}, id="tiles-of-several-groups-each-way"),
        pytest.param((1, 20, 5, 5), 20, {"K": 32, "P": 64, "processors": 2}, id="smaller-tile-more-channels"),
        pytest.param((2, 40, 7, 5), 20, {}, id="odd-sizes-several-tiles-each-way"),
        pytest.param((1, 20, 1, 1), 3, {}, id="one-pixel"),
        pytest.param((1, 20, 1, 19), 3, {}, id="one-row"),
        pytest.param((1, 20, 19, 1), 3, {}, id="one-column"),
        pytest.param((1, 1, 5, 5), 2, {}, id="one-channel-in"),
        pytest.param((1, 20, 5, 5), 1, {}, id="one-channel-out"),
        pytest.param((1, 16, 3, 4), 8, {"P": 64}, id="tile-larger-than-the-map"),
    ],
)
def test_kernel(shape, outputs, tile, memory_format, dtype):
    arguments = inputs(shape, outputs, dtype)
    arguments[0] = arguments[0].to(memory_format=memory_format)
    with poisoned():
        y = kernel.separable_conv(*arguments, tiny(dtype, **tile))
    assert y.is_contiguous(memory_format=memory_format)
    check(y, arguments)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("held", [16, 32], ids=["as-they-come", "held"])
def test_kernel_reads_every_layout(held, dtype):
    """And nothing else: what lies around is NaN, which times zero is NaN."""
    arguments = inputs((2, 20, 6, 5), 7, dtype)
    x, w_depthwise, w_pointwise, bias = arguments
    around = partial(torch.full, fill_value=float("nan"), dtype=dtype)  # before, between and behind
    sliced, channels, outputs = around((4, 20, 12, 5)), around((4, 6, 5, 30)), around((22, 9))
    sliced[1:3, :, ::2] = x
    channels[1:3, ..., :20] = x.permute(0, 2, 3, 1)
    outputs[1:21, 1:8] = w_pointwise.flatten(1).t()
    strided = around((14,))
    strided[::2] = bias
    taps_apart = w_depthwise.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    outputs_adjacent = outputs[1:21, 1:8].t()[..., None, None]
    config = tiny(dtype, K=held)
    whole = kernel.separable_conv(*arguments, config)
    check(whole, arguments)
    for layout in (sliced[1:3, :, ::2], channels[1:3].permute(0, 3, 1, 2)[:, :20]):
        y = kernel.separable_conv(layout, taps_apart, outputs_adjacent, strided[::2], config)
        assert torch.equal(y, whole)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@shipped
def test_shipped_configurations(capability, is_regular, dtype):
    """On a device of one processor, where the tile of pixels is as large as it gets."""
    arguments = inputs((1, 70, 5, 9), 260, dtype)
    config = choose(OPS["separable_conv"].configs, arguments[0], is_regular, capability, 1)
    check(kernel.separable_conv(*arguments, config), arguments)


@pytest.mark.interpreter
@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 40),
    st.sampled_from([16, 64]),
    st.integers(0, 2**16),
)
def test_kernel_at_any_size(shape, outputs, held, seed):
    arguments = inputs(shape, outputs, torch.float32, seed)
    check(kernel.separable_conv(*arguments, tiny(torch.float32, K=held)), arguments)


def test_one_pixel_by_hand():
    """Of a single pixel only the centre tap counts: relu(2 · 3 · 5 + 7) and relu(2 · 3 · -5 + 7)."""
    taps = torch.full((1, 1, 3, 3), 100.0)
    taps[..., 1, 1] = 3
    y = separable_conv(
        torch.full((1, 1, 1, 1), 2.0), taps, torch.tensor([5.0, -5.0]).view(2, 1, 1, 1), torch.full((2,), 7.0)
    )
    assert y.flatten().tolist() == [37, 0]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_op(memory_format, dtype):
    arguments = inputs((2, 20, 7, 5), 6, dtype)
    arguments[0] = arguments[0].to(memory_format=memory_format)
    y = separable_conv(*arguments)
    assert y.is_contiguous(memory_format=memory_format)
    check(y, arguments)
    torch.library.opcheck(torch.ops.agln.separable_conv.default, tuple(arguments))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("shape", "outputs"), [((1, 256, 60, 60), 256), ((8, 256, 15, 15), 256), ((2, 70, 33, 17), 300), ((1, 16, 1, 1), 5)]
)
def test_on_the_gpu(shape, outputs, memory_format, dtype):
    arguments = [tensor.cuda() for tensor in inputs(shape, outputs, dtype)]
    arguments[0] = arguments[0].to(memory_format=memory_format)
    y = separable_conv(*arguments)
    assert y.is_contiguous(memory_format=memory_format)
    check(y, arguments)
    assert torch.equal(y, separable_conv(*arguments))


X, TAPS, WEIGHT, BIAS = torch.zeros(1, 4, 3, 3), torch.zeros(4, 1, 3, 3), torch.zeros(2, 4, 1, 1), torch.zeros(2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param((X.numpy(), TAPS, WEIGHT, BIAS), TypeError, "x: needs a tensor, got ndarray", id="no-tensor"),
        pytest.param(
            (X[0], TAPS, WEIGHT, BIAS), ValueError, r"x: needs shape \(B, C, H, W\).*\(4, 3, 3\)", id="no-batch"
        ),
        pytest.param(
            (X[..., :0], TAPS, WEIGHT, BIAS), ValueError, r"x: .*none of them 0.*\(1, 4, 3, 0\)", id="no-pixels"
        ),
        pytest.param(
            (X, TAPS[:3], WEIGHT, BIAS), ValueError, r"w_depthwise: .*\(4, 1, 3, 3\).*\(3, 1, 3, 3\)", id="channels"
        ),
        pytest.param(
            (X, TAPS[..., 0], WEIGHT, BIAS), ValueError, r"w_depthwise: .*\(4, 1, 3, 3\).*\(4, 1, 3\)", id="taps"
        ),
        pytest.param(
            (X, TAPS, WEIGHT[:, 1:], BIAS), ValueError, r"w_pointwise: .*\(O, 4, 1, 1\).*\(2, 3, 1, 1\)", id="inner"
        ),
        pytest.param((X, TAPS, WEIGHT, BIAS[1:]), ValueError, r"bias: needs shape \(2\).*\(1,\)", id="outputs"),
        pytest.param((X, TAPS.half(), WEIGHT, BIAS), TypeError, r"w_depthwise: .*float32.*float16", id="two-dtypes"),
        pytest.param((X, TAPS, WEIGHT, BIAS.to("meta")), ValueError, "bias: needs device cpu.*meta", id="two-devices"),
    ],
)
def test_wrong_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        separable_conv(*arguments)
