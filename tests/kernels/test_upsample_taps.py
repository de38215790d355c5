"""upsample_taps: the convolution it is part of, reference, kernel under the interpreter, and op against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import poisoned, shipped, tiny
from tolerance import assert_as_exact
from torch import Tensor

from agln_fast.kernels import upsample_taps
from agln_fast.kernels.launch import choose
from agln_fast.kernels.registration import OPS
from agln_fast.kernels.upsample_taps import kernel

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
HALVES = [pytest.param(dtype, marks=pytest.mark.slow) for dtype in DTYPES[:2]]
LAYOUTS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)

Arguments = tuple[Tensor, list[Tensor], Tensor]
Sides = list[tuple[int, int]]


def resize(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=True)


def plain(base: Tensor, taps: list[Tensor], bias: Tensor) -> Tensor:
    """As PyTorch runs it, in the dtype of its arguments; the shifts are a convolution with nine times one 1."""
    count, size = base.shape[1], tuple(base.shape[2:])
    shifts = torch.eye(9, dtype=base.dtype, device=base.device).view(1, 9, 3, 3).expand(count, -1, -1, -1)
    y = base + bias.view(-1, 1, 1)
    for coarse in taps:
        resized = resize(coarse, size).unflatten(1, (9, count)).transpose(1, 2).flatten(1, 2)
        y = y + F.conv2d(resized, shifts, padding=1, groups=count)
    return y.relu()


def inputs(shape: tuple[int, ...], sides: Sides, dtype: torch.dtype, seed: int = 0) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    batch, count = shape[:2]
    base, bias = torch.randn(shape, generator=generator), torch.randn(count, generator=generator)
    bias[0] += 4  # terms that cancel everywhere would leave a result, and a tolerance in its ulp, smaller than they are
    taps = [torch.randn(batch, 9 * count, *side, generator=generator) / 3 for side in sides]
    return base.to(dtype), [coarse.to(dtype) for coarse in taps], bias.to(dtype)


def laid_out(arguments: Arguments, memory_format: torch.memory_format) -> Arguments:
    base, taps, bias = arguments
    return base.to(memory_format=memory_format), [x.to(memory_format=memory_format) for x in taps], bias


def check(y: Tensor, arguments: Arguments) -> None:
    base, taps, bias = arguments
    exact = plain(base.double(), [coarse.double() for coarse in taps], bias.double())
    assert_as_exact(y, exact, plain(*arguments))


SIZES = pytest.mark.parametrize(
    ("shape", "sides", "tile"),
    [
        pytest.param((1, 32, 8, 8), [(4, 4), (2, 2), (1, 1)], {"C": 32}, id="one-tile-of-channels"),
        pytest.param((2, 20, 7, 9), [(5, 4), (3, 2)], {}, id="odd-sizes-several-tiles-each-way-and-a-batch"),
        pytest.param((1, 3, 1, 1), [(1, 1)], {}, id="one-pixel"),
        pytest.param((1, 3, 1, 9), [(1, 4), (2, 3)], {}, id="one-row"),
        pytest.param((1, 3, 9, 1), [(4, 1), (3, 2)], {}, id="one-column"),
        pytest.param((1, 3, 6, 5), [(1, 3)], {}, id="one-source-row"),
        pytest.param((1, 3, 6, 5), [(3, 1)], {}, id="one-source-column"),
        pytest.param((2, 1, 6, 5), [(3, 3), (3, 3)], {}, id="one-channel-two-maps-of-one-size"),
        pytest.param((1, 3, 5, 6), [(5, 6), (9, 13)], {}, id="same-size-and-smaller-than-the-source"),
        pytest.param((1, 5, 3, 6), [(2, 3)] * 4, {"H": 8, "W": 16, "C": 64}, id="four-maps-tile-larger-than-the-map"),
    ],
)


@SIZES
def test_is_the_rest_of_a_convolution_of_resized_maps(shape, sides, tile):
    """Of 3 channels, and 1, 2, ... from each coarse map: mixing commutes with the resize to float64 rounding."""
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    batch, count, *size = shape
    finest, bias = noise(batch, 3, *size), noise(count)
    coarse = [noise(batch, i, *side) for i, side in enumerate(sides, 1)]
    weights = [noise(count, x.shape[1], 3, 3) for x in (finest, *coarse)]
    whole = torch.cat([finest, *(resize(x, tuple(size)) for x in coarse)], 1)
    exact = F.conv2d(whole, torch.cat(weights, 1), bias, padding=1).relu()

    base = F.conv2d(finest, weights[0], padding=1)
    mixers = [weight.permute(2, 3, 0, 1).reshape(9 * count, -1, 1, 1) for weight in weights[1:]]
    taps = [F.conv2d(x, mixer) for x, mixer in zip(coarse, mixers, strict=True)]
    assert (upsample_taps(base, taps, bias) - exact).abs().max() < 1e-10


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@LAYOUTS
@SIZES
def test_kernel(shape, sides, tile, memory_format, dtype):
    arguments = laid_out(inputs(shape, sides, dtype), memory_format)
    with poisoned():
        y = kernel.upsample_taps(*arguments, tiny(dtype, **tile))
    assert y.is_contiguous(memory_format=memory_format)
    check(y, arguments)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_kernel_reads_every_layout_and_nothing_beside_it(dtype):
    """Maps are every other row, or some channels, of larger ones that are NaN before, between and after them."""
    base, taps, bias = inputs((2, 20, 6, 5), [(3, 4), (2, 2)], dtype)

    def rows_apart(x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        return torch.full((batch + 2, channels, 2 * height, width), torch.nan, dtype=dtype)[1:-1, :, ::2].copy_(x)

    def some_channels(x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        larger = torch.full((batch + 2, height, width, channels + 13), torch.nan, dtype=dtype)
        return larger[1:-1, ..., 7:-6].permute(0, 3, 1, 2).copy_(x)

    strided = torch.full((40,), torch.nan, dtype=dtype)[::2].copy_(bias)
    whole = kernel.upsample_taps(base, taps, bias, tiny(dtype))
    for layout in (rows_apart, some_channels):
        y = kernel.upsample_taps(layout(base), [layout(coarse) for coarse in taps], strided, tiny(dtype))
        assert torch.equal(y, whole)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@shipped
def test_shipped_configurations(capability, is_regular, dtype):
    arguments = inputs((1, 70, 5, 9), [(3, 5), (2, 3), (1, 2)], dtype)
    config = choose(OPS["upsample_taps"].configs, arguments[0], is_regular, capability, 132)
    check(kernel.upsample_taps(*arguments, config), arguments)


@pytest.mark.interpreter
@pytest.mark.parametrize(("processors", "rows"), [(1, 16), (9, 8), (1000, 4)], ids=["one-walk", "two", "four"])
def test_walks_are_shorter_where_the_device_would_be_idle(processors, rows, monkeypatch):
    arguments = inputs((1, 20, 16, 16), [(8, 7)], torch.float32)
    seen, run = [], kernel._upsample_kernel.run

    def spy(*values, **keywords):
        seen.append(keywords["BH"])
        return run(*values, **keywords)

    monkeypatch.setattr(kernel._upsample_kernel, "run", spy)
    y = kernel.upsample_taps(*arguments, tiny(torch.float32, processors=processors, H=16))
    check(y, arguments)
    assert seen == [rows]


@pytest.mark.interpreter
@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 20), st.integers(1, 6), st.integers(1, 6)),
    st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3),
    st.integers(0, 2**16),
)
def test_kernel_at_any_size(shape, sides, seed):
    arguments = inputs(shape, sides, torch.float32, seed)
    check(kernel.upsample_taps(*arguments, tiny(torch.float32)), arguments)


def by_hand(run):
    """One source pixel, every tap 1 there: a target pixel counts the taps inside the target, and 2 + 3 - 10 more."""
    base, taps, bias = torch.full((1, 1, 3, 4), 2.0), torch.ones(1, 9, 1, 1), torch.tensor([3.0])
    taps[:, 4] -= 10
    assert run(base, [taps], bias).tolist() == [[[[0, 1, 1, 0], [1, 4, 4, 1], [0, 1, 1, 0]]]]


def test_by_hand():
    by_hand(upsample_taps)


@pytest.mark.interpreter
def test_kernel_by_hand():
    by_hand(lambda *arguments: kernel.upsample_taps(*arguments, tiny(torch.float32)))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@LAYOUTS
def test_op(memory_format, dtype):
    arguments = laid_out(inputs((2, 6, 7, 5), [(4, 3), (2, 2)], dtype), memory_format)
    given_base = arguments[0].clone()
    y = upsample_taps(*arguments)
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(arguments[0], given_base)
    check(y, arguments)
    torch.library.opcheck(torch.ops.agln.upsample_taps.default, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@LAYOUTS
@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((1, 512, 60, 60), [(30, 30), (15, 15), (8, 8)]),
        ((2, 70, 33, 17), [(17, 9), (5, 3)]),
        ((8, 64, 16, 16), [(8, 8)]),
        ((1, 5, 1, 1), [(1, 1)]),
    ],
)
def test_on_the_gpu(shape, sides, memory_format, dtype):
    base, taps, bias = laid_out(inputs(shape, sides, dtype), memory_format)
    arguments = base.cuda(), [coarse.cuda() for coarse in taps], bias.cuda()
    y = upsample_taps(*arguments)
    assert y.is_contiguous(memory_format=memory_format)
    check(y, arguments)
    assert torch.equal(y, upsample_taps(*arguments))


BASE, TAPS, BIAS = torch.zeros(2, 4, 3, 3), torch.zeros(2, 36, 2, 2), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param((BASE.numpy(), [TAPS], BIAS), TypeError, "base: needs a tensor, got ndarray", id="no-tensor"),
        pytest.param((BASE[0], [TAPS], BIAS), ValueError, r"base: .*\(B, C, H, W\).*\(4, 3, 3\)", id="no-batch"),
        pytest.param((BASE[..., :0], [TAPS], BIAS), ValueError, r"base: .*none of them 0.*\(2, 4, 3, 0\)", id="empty"),
        pytest.param((BASE, TAPS, BIAS), TypeError, "taps: needs a list of tensors, got Tensor", id="no-list"),
        pytest.param((BASE, [], BIAS), ValueError, "taps: needs one map or more, got none", id="no-maps"),
        pytest.param((BASE, [TAPS, None], BIAS), TypeError, r"taps\[1\]: needs a tensor, got NoneType", id="none"),
        pytest.param(
            (BASE, [TAPS, TAPS[:, :4]], BIAS), ValueError, r"taps\[1\]: .*\(2, 36, h, w\).*\(2, 4, 2, 2\)", id="taps"
        ),
        pytest.param(
            (BASE, [TAPS[:1]], BIAS), ValueError, r"taps\[0\]: .*\(2, 36, h, w\).*\(1, 36, 2, 2\)", id="batch"
        ),
        pytest.param((BASE, [TAPS], BIAS[1:]), ValueError, r"bias: needs shape \(4\).*\(3,\)", id="bias"),
        pytest.param((BASE, [TAPS.half()], BIAS), TypeError, r"taps\[0\]: .*float32.*float16", id="two-dtypes"),
        pytest.param((BASE, [TAPS], BIAS.to("meta")), ValueError, "bias: needs device cpu.*meta", id="two-devices"),
    ],
)
def test_wrong_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        upsample_taps(*arguments)
