"""attention_pool: reference, kernel under the interpreter, and op against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import poisoned, shipped, tiny
from tolerance import assert_as_exact
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from agln_fast.kernels import attention_pool
from agln_fast.kernels.attention_pool import kernel
from agln_fast.kernels.launch import choose
from agln_fast.kernels.registration import OPS

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def plain(x: Tensor, w_theta: Tensor, w_phi: Tensor, b_phi: Tensor) -> Tensor:
    """Eq. 1 as PyTorch runs it, operation by operation, in the dtype of its arguments."""
    x = x.flatten(2)
    return w_phi @ (x @ (w_theta @ x).softmax(-1).transpose(1, 2)) + b_phi[:, None]


def inputs(
    shape: tuple[int, ...], n: int, dtype: torch.dtype, outputs: int = 20, scale: float = 1.0, seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    x = torch.randn(shape, generator=generator)
    w_theta = scale * torch.randn(n, channels, generator=generator) / channels**0.5
    w_phi = torch.randn(outputs, channels, generator=generator) / channels**0.5
    return [tensor.to(dtype) for tensor in (x, w_theta, w_phi, torch.randn(outputs, generator=generator))]


def check(descriptors: Tensor, arguments: list[Tensor], allowance: float = 0.0) -> None:
    assert descriptors.is_contiguous()
    exact = plain(*(tensor.double() for tensor in arguments))
    assert_as_exact(descriptors, exact, plain(*arguments), allowance)


def exponentials(x: Tensor, w_theta: Tensor, w_phi: Tensor, b_phi: Tensor) -> float:
    """What a GPU's exponential may change.

    It is `ex2.approx` of e · log2(e), and both steps are rounded: a weight whose energy is e below the largest is off
    by up to 2⁻²² (PTX ISA, ex2) and |e| · 2⁻²³ of itself, and a mean by that share of the mean of |x|. The splits are
    merged with such weights once more.
    """
    x, w_theta, w_phi = x.double(), w_theta.double(), w_phi.double()
    energies = w_theta @ x.flatten(2)
    spread = (energies.amax(-1) - energies.amin(-1)).max().item()
    means = energies.softmax(-1) @ x.abs().flatten(2).transpose(1, 2)  # (B, N, C)
    return 2 * (2**-22 + spread * 2**-23) * (w_phi.abs() @ means.transpose(1, 2)).max().item()


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "n", "outputs", "tile"),
    [
        pytest.param((1, 32, 8, 8), 16, 32, {"C": 32}, id="whole-channels"),
        pytest.param((2, 40, 7, 5), 20, 40, {}, id="odd-sizes-several-tiles-each-way"),
        pytest.param((2, 40, 7, 5), 20, 23, {"C": 64, "M": 32}, id="odd-sizes-whole-channels"),
        pytest.param((1, 24, 1, 1), 3, 24, {"C": 32}, id="one-pixel"),
        pytest.param((1, 24, 9, 11), 1, 24, {"C": 32}, id="one-descriptor"),
        pytest.param((1, 1, 5, 5), 2, 1, {}, id="one-channel-and-output"),
        pytest.param((1, 16, 3, 4), 8, 16, {"P": 64}, id="tile-larger-than-the-map"),
        pytest.param((3, 16, 12, 12), 8, 48, {"processors": 60}, id="nine-splits-a-batch-three-readers"),
        pytest.param((1, 16, 33, 32), 5, 16, {"processors": 132}, id="66-splits-in-several-steps"),
    ],
)
def test_kernel(shape, n, outputs, tile, dtype):
    arguments = inputs(shape, n, dtype, outputs)
    with poisoned():
        descriptors = kernel.attention_pool(*arguments, tiny(dtype, **tile))
    check(descriptors, arguments)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_reads_every_layout(dtype):
    x, *weights = arguments = inputs((2, 20, 6, 5), 4, dtype)
    sliced = torch.randn(2, 20, 12, 5).to(dtype)
    sliced[:, :, ::2] = x
    layouts = [x, x.to(memory_format=torch.channels_last), sliced[:, :, ::2], x.transpose(2, 3)]
    results = [kernel.attention_pool(layout, *weights, tiny(dtype)) for layout in layouts[:3]]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    w_theta, w_phi, b_phi = weights
    strided = w_theta.t().contiguous().t(), w_phi.t().contiguous().t(), torch.stack([b_phi, -b_phi], 1)[:, 0]
    check(kernel.attention_pool(layouts[3], *strided, tiny(dtype)), arguments)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [3e4, 1e30], ids=["beyond-float16", "one-hot"])
def test_energies_beyond_half_precision(scale, dtype):
    """The attention is one pixel for each descriptor then: the kernel returns the projection of that very pixel."""
    x, w_theta, *projection = inputs((1, 16, 9, 9), 4, torch.float32)
    w_theta = w_theta * min(scale, torch.finfo(dtype).max / 8)
    arguments = [tensor.to(dtype) for tensor in (8 * x, w_theta, *projection)]
    energy = arguments[1].double() @ arguments[0].double().flatten(2)
    assert energy.abs().max() > torch.finfo(torch.float16).max
    exact = plain(*(tensor.double() for tensor in arguments))
    descriptors = kernel.attention_pool(*arguments, tiny(dtype))
    assert_as_exact(descriptors, exact, plain(*(tensor.float() for tensor in arguments)).to(dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@shipped
def test_shipped_configurations(capability, is_regular, dtype):
    arguments = inputs((1, 260, 9, 10), 70, dtype, 270)
    config = choose(OPS["attention_pool"].configs, arguments[0], is_regular, capability, 132)
    check(kernel.attention_pool(*arguments, config), arguments)


@pytest.fixture
def guarded(monkeypatch):
    """Behind fresh memory lies some that nothing may load."""
    create, load = Tensor.new_empty, InterpreterBuilder.create_masked_load
    guards = []

    def fresh(self, *shape, **options):
        count = math.prod(shape)
        if count == 0:  # the interpreter's own
            return create(self, *shape, **options)
        whole = create(self, count + 2**14, **options)
        guards.append(whole[count:])
        return whole[:count].view(shape)

    def watched(self, pointers, mask, *rest):
        loaded = pointers.data[mask.data].astype(np.int64)
        for guard in guards:
            first = guard.data_ptr()
            assert not ((loaded >= first) & (loaded < first + guard.nbytes)).any(), "reads behind its memory"
        return load(self, pointers, mask, *rest)

    monkeypatch.setattr(Tensor, "new_empty", fresh)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", watched)
    return guards


@pytest.mark.interpreter
@pytest.mark.parametrize("processors", [4, 132], ids=["many-descriptors-a-program", "many-splits"])
def test_scratch_is_not_read_beyond_its_end(processors, guarded):
    arguments = inputs((2, 20, 25, 24), 11, torch.float32)
    check(kernel.attention_pool(*arguments, tiny(torch.float32, processors)), arguments)
    assert len(guarded) == 3  # descriptors; sums; maxima with their exponentials


@pytest.mark.parametrize(
    ("splits", "outputs", "few"),
    [
        pytest.param(128, 256, True, id="many-splits-are-read-seldom"),
        pytest.param(1, 768, False, id="many-weights-are-read-seldom"),
    ],
)
def test_the_projection_reads_little(splits, outputs, few):
    """Of 64 descriptors on 132 multiprocessors, in half precision."""
    rows, bm = kernel._projection_tile(splits, 64, outputs, 1, 2, 128, 132)
    assert (rows <= 2 and bm >= 64) if few else (rows >= 8 and bm <= 64)
    assert (64 // rows) * (outputs // bm) <= 132


def test_the_projection_keeps_to_its_largest_tile():
    assert kernel._projection_tile(1, 10**4, 10**4, 8, 4, 64, 132) == (16, 64)


@pytest.mark.slow
@pytest.mark.interpreter
@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 20),
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 2**16),
)
def test_kernel_at_any_size(shape, n, outputs, processors, seed):
    x, w_theta, w_phi, _ = arguments = inputs(shape, n, torch.float32, outputs, seed=seed)
    # An energy is a sum whose terms may cancel: it is off by their rounding, and a weight by as large a share.
    terms = (w_theta.double().abs() @ x.double().abs().flatten(2)).max().item()
    largest = x.abs().max().item() * w_phi.abs().sum(1).max().item()
    allowance = torch.finfo(torch.float32).eps * terms * largest
    check(kernel.attention_pool(*arguments, tiny(torch.float32, processors)), arguments, allowance)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_op(memory_format, dtype):
    x, *weights = inputs((2, 20, 7, 5), 4, dtype)
    arguments = [x.to(memory_format=memory_format), *weights]
    check(attention_pool(*arguments), arguments)
    torch.library.opcheck(torch.ops.agln.attention_pool.default, tuple(arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_zeros_is_the_mean(dtype):
    x, w_theta, w_phi, b_phi = inputs((2, 20, 7, 5), 1, dtype, scale=0.0)
    exact = w_phi.double() @ x.double().mean((2, 3))[..., None] + b_phi.double()[:, None]
    mean = x.float().mean((2, 3)).to(dtype)[..., None]
    assert_as_exact(attention_pool(x, w_theta, w_phi, b_phi), exact, w_phi @ mean + b_phi[:, None])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    ("shape", "n", "outputs"),
    [
        ((1, 256, 16, 16), 64, 768),
        ((1, 256, 64, 64), 64, 256),
        ((1, 256, 64, 64), 128, 256),
        ((8, 256, 15, 15), 128, 512),
        ((2, 300, 33, 17), 1, 300),
        ((1, 16, 1, 1), 5, 16),
    ],
)
def test_on_the_gpu(shape, n, outputs, memory_format, dtype):
    x, *weights = (tensor.cuda() for tensor in inputs(shape, n, dtype, outputs))
    arguments = [x.to(memory_format=memory_format), *weights]
    descriptors = attention_pool(*arguments)
    check(descriptors, arguments, exponentials(*arguments))
    assert torch.equal(descriptors, attention_pool(*arguments))


X, W, PHI, BIAS = torch.zeros(1, 4, 3, 3), torch.zeros(2, 4), torch.zeros(6, 4), torch.zeros(6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param((X.numpy(), W, PHI, BIAS), TypeError, "x: needs a tensor, got ndarray", id="no-tensor"),
        pytest.param((X.int(), W, PHI, BIAS), TypeError, r"x: needs float16, .*torch\.int32", id="integers"),
        pytest.param((X[0], W, PHI, BIAS), ValueError, r"x: needs shape \(B, C, h, w\).*\(4, 3, 3\)", id="no-batch"),
        pytest.param((X[:, :, :0], W, PHI, BIAS), ValueError, r"x: .*none of them 0.*\(1, 4, 0, 3\)", id="no-pixels"),
        pytest.param((X, W.half(), PHI, BIAS), TypeError, r"w_theta: needs torch\.float32.*float16", id="two-dtypes"),
        pytest.param((X, W[:, :3], PHI, BIAS), ValueError, r"w_theta: .* \(N, 4\).*\(2, 3\)", id="other-channels"),
        pytest.param((X, W.to("meta"), PHI, BIAS), ValueError, "w_theta: needs device cpu.*meta", id="two-devices"),
        pytest.param((X, W, PHI.t(), BIAS), ValueError, r"w_phi: needs shape \(M, 4\).*\(4, 6\)", id="transposed"),
        pytest.param((X, W, PHI, BIAS[:5]), ValueError, r"b_phi: needs shape \(6\).*\(5,\)", id="other-outputs"),
    ],
)
def test_wrong_argument_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        attention_pool(*arguments)
