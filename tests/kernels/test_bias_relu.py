"""bias_relu: by hand, kernel under the interpreter, and op against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import poisoned, shipped, tiny
from tolerance import assert_as_exact
from torch import Tensor

from agln_fast.kernels import bias_relu
from agln_fast.kernels.bias_relu import kernel
from agln_fast.kernels.launch import choose
from agln_fast.kernels.registration import OPS

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LAYOUTS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
RESIDUAL = pytest.mark.parametrize("adds", [True, False], ids=["residual", "plain"])

Arguments = tuple[Tensor, Tensor, Tensor | None]


def plain(x: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """As PyTorch runs it, operation by operation, in the dtype of its arguments."""
    y = x + bias.view(-1, 1, 1)
    return (y if residual is None else y + residual).relu()


def inputs(shape: tuple[int, ...], dtype: torch.dtype, adds: bool, seed: int = 0) -> Arguments:
    generator = torch.Generator().manual_seed(seed)
    x, bias, residual = (torch.randn(size, generator=generator).to(dtype) for size in (shape, shape[1], shape))
    return x, bias, residual if adds else None


def laid_out(arguments: Arguments, memory_format: torch.memory_format) -> Arguments:
    x, bias, residual = arguments
    return (
        x.to(memory_format=memory_format),
        bias,
        None if residual is None else residual.to(memory_format=memory_format),
    )


def check(y: Tensor, arguments: Arguments) -> None:
    exact = [None if argument is None else argument.double() for argument in arguments]
    assert_as_exact(y, plain(*exact), plain(*arguments))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@LAYOUTS
@RESIDUAL
@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        pytest.param((1, 32, 8, 8), {"C": 32}, id="one-tile-of-channels"),
        pytest.param((2, 20, 7, 5), {}, id="odd-sizes-several-tiles-each-way-and-a-batch"),
        pytest.param((1, 3, 1, 1), {}, id="one-pixel"),
        pytest.param((1, 1, 2, 3), {"P": 64, "C": 64}, id="tile-larger-than-the-map"),
    ],
)
def test_kernel(shape, tile, adds, memory_format, dtype):
    arguments = laid_out(inputs(shape, dtype, adds), memory_format)
    with poisoned():
        y = kernel.bias_relu(*arguments, config=tiny(dtype, **tile))
    assert y.is_contiguous(memory_format=memory_format)
    check(y, arguments)


@pytest.mark.interpreter
def test_kernel_reads_every_layout_and_nothing_beside_it():
    """Every other row, or some channels, of maps that are NaN before, between and after them."""
    x, bias, residual = inputs((2, 20, 6, 5), torch.float32, True)
    apart = torch.full((40,), torch.nan)[::2].copy_(bias)
    whole = kernel.bias_relu(x, bias, residual, config=tiny(torch.float32))

    def rows(values: Tensor) -> Tensor:
        return torch.full((4, 20, 12, 5), torch.nan)[1:-1, :, ::2].copy_(values)

    def channels(values: Tensor) -> Tensor:
        return torch.full((4, 6, 5, 33), torch.nan)[1:-1, ..., 7:-6].permute(0, 3, 1, 2).copy_(values)

    for first in (rows, channels):
        for second in (rows, channels):
            y = kernel.bias_relu(first(x), apart, second(residual), config=tiny(torch.float32))
            assert torch.equal(y, whole)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@LAYOUTS
@shipped
def test_shipped_configurations(capability, is_regular, memory_format, dtype):
    arguments = laid_out(inputs((1, 300, 17, 16), dtype, True), memory_format)
    config = choose(OPS["bias_relu"].configs, arguments[0], is_regular, capability, 132)
    check(kernel.bias_relu(*arguments, config=config), arguments)


@pytest.mark.interpreter
@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(1, 3), *[st.integers(1, 20)] * 3), st.booleans(), st.integers(0, 2**16))
def test_kernel_at_any_size(shape, adds, seed):
    arguments = inputs(shape, torch.float32, adds, seed)
    check(kernel.bias_relu(*arguments, config=tiny(torch.float32)), arguments)


def test_by_hand():
    """relu(1 + 2 - 4) and relu(3 - 5 + 6) with a residual; relu(1 + 2) and relu(3 - 5) without."""
    x, bias, residual = torch.tensor([1.0, 3.0]), torch.tensor([2.0, -5.0]), torch.tensor([-4.0, 6.0])
    x, residual = x.view(1, 2, 1, 1), residual.view(1, 2, 1, 1)
    assert bias_relu(x, bias, residual).flatten().tolist() == [0, 4]
    assert bias_relu(x, bias).flatten().tolist() == [3, 0]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@LAYOUTS
@RESIDUAL
def test_op(adds, memory_format, dtype):
    arguments = laid_out(inputs((2, 6, 7, 5), dtype, adds), memory_format)
    given_map = arguments[0].clone()
    y = bias_relu(*arguments)
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(arguments[0], given_map)
    check(y, arguments)
    torch.library.opcheck(torch.ops.agln.bias_relu.default, arguments)


@pytest.mark.gpu
def test_nan_stays_nan_on_the_gpu():
    """As in PyTorch: an instruction for the larger of two numbers would take the zero. The interpreter has another."""
    x = torch.full((1, 16, 4, 4), float("nan"), device="cuda", dtype=torch.float16)
    assert bias_relu(x, torch.zeros(16, device="cuda", dtype=torch.float16), None).isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@LAYOUTS
@RESIDUAL
@pytest.mark.parametrize("shape", [(1, 256, 60, 60), (8, 64, 33, 17), (2, 2048, 7, 7), (1, 5, 1, 1)])
def test_on_the_gpu(shape, adds, memory_format, dtype):
    x, bias, residual = laid_out(inputs(shape, dtype, adds), memory_format)
    arguments = x.cuda(), bias.cuda(), None if residual is None else residual.cuda()
    y = bias_relu(*arguments)
    assert y.is_contiguous(memory_format=memory_format)
    check(y, arguments)


X, BIAS = torch.zeros(2, 4, 3, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param((X.numpy(), BIAS), TypeError, "x: needs a tensor, got ndarray", id="no-tensor"),
        pytest.param((X[0], BIAS), ValueError, r"x: .*\(B, C, H, W\).*\(4, 3, 3\)", id="no-batch"),
        pytest.param((X[..., :0], BIAS), ValueError, r"x: .*none of them 0.*\(2, 4, 3, 0\)", id="empty"),
        pytest.param((X, BIAS[1:]), ValueError, r"bias: needs shape \(4\).*\(3,\)", id="bias"),
        pytest.param((X, BIAS, X[:1]), ValueError, r"residual: .*\(2, 4, 3, 3\).*\(1, 4, 3, 3\)", id="residual"),
        pytest.param((X, BIAS, X.half()), TypeError, "residual: .*float32.*float16", id="two-dtypes"),
        pytest.param((X, BIAS.to("meta")), ValueError, "bias: needs device cpu.*meta", id="two-devices"),
    ],
)
def test_wrong_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        bias_relu(*arguments)
