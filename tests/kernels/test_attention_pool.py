"""attention_pool: reference, kernel under the interpreter, and op against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import poisoned, shipped, tiny
from tolerance import assert_as_exact
from torch import Tensor

from agln_fast.kernels import attention_pool
from agln_fast.kernels.attention_pool import kernel
from agln_fast.kernels.launch import choose
from agln_fast.kernels.registration import OPS

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def plain(x: Tensor, w_theta: Tensor) -> Tensor:
    """Eq. 1 as PyTorch runs it, operation by operation, in the dtype of its arguments."""
    x = x.flatten(2)
    return x @ (w_theta @ x).softmax(-1).transpose(1, 2)


def inputs(shape: tuple[int, ...], n: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    w_theta = scale * torch.randn(n, shape[1], generator=generator) / shape[1] ** 0.5
    return [x.to(dtype), w_theta.to(dtype)]


def check(pooled: Tensor, x: Tensor, w_theta: Tensor, allowance: float = 0.0) -> None:
    assert pooled.transpose(1, 2).is_contiguous()
    assert_as_exact(pooled, plain(x.double(), w_theta.double()), plain(x, w_theta), allowance)


def exponentials(x: Tensor, w_theta: Tensor) -> float:
    """What a GPU's exponential may change.

    It is `ex2.approx` of e · log2(e), and both steps are rounded: a weight whose energy is e below the largest is off
    by up to 2⁻²² (PTX ISA, ex2) and |e| · 2⁻²³ of itself, and a mean by that share of the mean of |x|.
    """
    x, w_theta = x.double(), w_theta.double()
    energies = w_theta @ x.flatten(2)
    spread = (energies.amax(-1) - energies.amin(-1)).max().item()
    mean = (energies.softmax(-1) @ x.abs().flatten(2).transpose(1, 2)).max().item()
    return (2**-22 + spread * 2**-23) * mean


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "n", "tile"),
    [
        pytest.param((1, 32, 8, 8), 16, {"C": 32}, id="whole-channels"),
        pytest.param((2, 40, 7, 5), 20, {}, id="odd-sizes-several-tiles-each-way"),
        pytest.param((2, 40, 7, 5), 20, {"C": 64}, id="odd-sizes-whole-channels"),
        pytest.param((1, 24, 1, 1), 3, {"C": 32}, id="one-pixel"),
        pytest.param((1, 24, 9, 11), 1, {"C": 32}, id="one-descriptor"),
        pytest.param((1, 1, 5, 5), 2, {}, id="one-channel"),
        pytest.param((1, 16, 3, 4), 8, {"P": 64}, id="tile-larger-than-the-map"),
        pytest.param((3, 16, 12, 12), 8, {"processors": 60}, id="nine-splits-and-a-batch"),
    ],
)
def test_kernel(shape, n, tile, dtype):
    x, w_theta = inputs(shape, n, dtype)
    with poisoned():
        pooled = kernel.attention_pool(x, w_theta, tiny(dtype, **tile))
    check(pooled, x, w_theta)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_reads_every_layout(dtype):
    x, w_theta = inputs((2, 20, 6, 5), 4, dtype)
    sliced = torch.randn(2, 20, 12, 5).to(dtype)
    sliced[:, :, ::2] = x
    layouts = [x, x.to(memory_format=torch.channels_last), sliced[:, :, ::2], x.transpose(2, 3)]
    results = [kernel.attention_pool(layout, w_theta, tiny(dtype)) for layout in layouts[:3]]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    check(kernel.attention_pool(layouts[3], w_theta.t().contiguous().t(), tiny(dtype)), x, w_theta)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [3e4, 1e30], ids=["beyond-float16", "one-hot"])
def test_energies_beyond_half_precision(scale, dtype):
    """The attention is one pixel for each descriptor then: the kernel returns that very pixel."""
    x, w_theta = inputs((1, 16, 9, 9), 4, torch.float32)
    w_theta = w_theta * min(scale, torch.finfo(dtype).max / 8)
    x, w_theta = (x * 8).to(dtype), w_theta.to(dtype)
    energy = w_theta.double() @ x.double().flatten(2)
    assert energy.abs().max() > torch.finfo(torch.float16).max
    exact = plain(x.double(), w_theta.double())
    pooled = kernel.attention_pool(x, w_theta, tiny(dtype))
    assert_as_exact(pooled, exact, plain(x.float(), w_theta.float()).to(dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@shipped
def test_shipped_configurations(capability, is_regular, dtype):
    x, w_theta = inputs((1, 260, 9, 10), 70, dtype)
    config = choose(OPS["attention_pool"].configs, x, is_regular, capability, 132)
    check(kernel.attention_pool(x, w_theta, config), x, w_theta)


@pytest.mark.slow
@pytest.mark.interpreter
@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(0, 2**16),
)
def test_kernel_at_any_size(shape, n, processors, seed):
    x, w_theta = inputs(shape, n, torch.float32, seed=seed)
    # An energy is a sum whose terms may cancel: it is off by their rounding, and a weight by as large a share.
    terms = (w_theta.double().abs() @ x.double().abs().flatten(2)).max().item()
    allowance = torch.finfo(torch.float32).eps * terms * x.abs().max().item()
    check(kernel.attention_pool(x, w_theta, tiny(torch.float32, processors)), x, w_theta, allowance)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_op(memory_format, dtype):
    x, w_theta = inputs((2, 20, 7, 5), 4, dtype)
    x = x.to(memory_format=memory_format)
    check(attention_pool(x, w_theta), x, w_theta)
    torch.library.opcheck(torch.ops.agln.attention_pool.default, (x, w_theta))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("shape", "n"), [((1, 256, 64, 64), 64), ((8, 256, 15, 15), 128), ((2, 300, 33, 17), 1), ((1, 16, 1, 1), 5)]
)
def test_on_the_gpu(shape, n, memory_format, dtype):
    x, w_theta = (tensor.cuda() for tensor in inputs(shape, n, dtype))
    x = x.to(memory_format=memory_format)
    pooled = attention_pool(x, w_theta)
    check(pooled, x, w_theta, exponentials(x, w_theta))
    assert torch.equal(pooled, attention_pool(x, w_theta))


X, W = torch.zeros(1, 4, 3, 3), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("x", "w_theta", "error", "message"),
    [
        pytest.param(X.numpy(), W, TypeError, "x: needs a tensor, got ndarray", id="no-tensor"),
        pytest.param(X.int(), W, TypeError, r"x: needs float16, .*torch\.int32", id="integers"),
        pytest.param(X[0], W, ValueError, r"x: needs shape \(B, C, h, w\).*\(4, 3, 3\)", id="no-batch"),
        pytest.param(X[:, :, :0], W, ValueError, r"x: .*none of them 0.*\(1, 4, 0, 3\)", id="no-pixels"),
        pytest.param(X, W.half(), TypeError, r"w_theta: needs torch\.float32.*float16", id="two-dtypes"),
        pytest.param(X, W[:, :3], ValueError, r"w_theta: needs shape \(N, 4\).*\(2, 3\)", id="other-channels"),
        pytest.param(X, W.to("meta"), ValueError, "w_theta: needs device cpu.*meta", id="two-devices"),
    ],
)
def test_wrong_argument_is_named(x, w_theta, error, message):
    with pytest.raises(error, match=message):
        attention_pool(x, w_theta)
