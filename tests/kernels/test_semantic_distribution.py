"""semantic_distribution: reference, kernel under the interpreter, and op against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import poisoned, shipped, tiny
from tolerance import assert_as_exact
from torch import Tensor

from agln_fast.kernels import semantic_distribution
from agln_fast.kernels.launch import choose
from agln_fast.kernels.registration import OPS
from agln_fast.kernels.semantic_distribution import kernel

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FORMATS = [torch.contiguous_format, torch.channels_last]
ALPHA = 0.7


def plain(a: Tensor, w_phi: Tensor, b_phi: Tensor, d: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Eq. 2 and the sum of Eq. 3 as PyTorch runs them, operation by operation, in the dtype of the arguments."""
    attention = (w_phi @ a.flatten(2) + b_phi[:, None]).softmax(1)
    m = (d @ attention).view(a.shape)
    return m, a + alpha * m


def inputs(shape: tuple[int, ...], n: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(shape, generator=generator)
    w_phi = 2 * torch.randn(n, shape[1], generator=generator) / shape[1] ** 0.5
    b_phi = torch.randn(n, generator=generator)
    d = torch.randn(shape[0], shape[1], n, generator=generator)
    return [tensor.to(dtype) for tensor in (a, w_phi, b_phi, d)]


def in_float64(tensors: list[Tensor], alpha: float) -> tuple[Tensor, Tensor]:
    return plain(*(tensor.double() for tensor in tensors), alpha)


def check(results: tuple[Tensor, Tensor], tensors: list[Tensor], alpha: float = ALPHA) -> None:
    for result, exact, own in zip(results, in_float64(tensors, alpha), plain(*tensors, alpha), strict=True):
        assert_as_exact(result, exact, own)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "n", "tile"),
    [
        pytest.param((1, 32, 8, 8), 16, {"C": 32, "K": 32}, id="whole-channels-one-trip"),
        pytest.param((2, 40, 7, 5), 40, {}, id="odd-sizes-several-tiles-each-way"),
        pytest.param((2, 40, 7, 5), 40, {"C": 64, "K": 64}, id="odd-sizes-whole-channels"),
        pytest.param((2, 40, 7, 5), 40, {"C": 64}, id="whole-channels-energies-in-chunks"),
        pytest.param((1, 24, 1, 1), 3, {"C": 32, "K": 32}, id="one-pixel"),
        pytest.param((1, 24, 9, 11), 1, {"C": 32, "K": 32}, id="one-descriptor"),
        pytest.param((1, 1, 5, 5), 2, {}, id="one-channel"),
        pytest.param((1, 16, 3, 4), 8, {"P": 64, "N": 64, "C": 64, "K": 64}, id="tiles-larger-than-the-map"),
        pytest.param((3, 16, 6, 7), 8, {}, id="batch"),
    ],
)
def test_kernel(shape, n, tile, dtype):
    tensors = inputs(shape, n, dtype)
    with poisoned():
        results = kernel.semantic_distribution(*tensors, ALPHA, tiny(dtype, **tile))
    check(results, tensors)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [pytest.param(32, id="whole-channels"), pytest.param(16, id="channel-tiles")])
def test_kernel_reads_every_layout(channels, dtype):
    a, w_phi, b_phi, d = inputs((2, 20, 6, 5), 18, dtype)
    config = tiny(dtype, C=channels, K=channels)
    expected = kernel.semantic_distribution(a, w_phi, b_phi, d, ALPHA, config)
    strided = a.repeat_interleave(2, 2)[:, :, ::2]
    transposed = a.transpose(2, 3).contiguous().transpose(2, 3)
    part = torch.cat([a, a], 1)[:, :20]  # no copy is made of it: its batch stride is its own
    for layout in (a, a.to(memory_format=torch.channels_last), strided, transposed, part):
        turned = (w_phi.t().contiguous().t(), b_phi.repeat_interleave(2)[::2], d.mT.contiguous().mT)
        for result, wanted in zip(kernel.semantic_distribution(layout, *turned, ALPHA, config), expected, strict=True):
            assert torch.equal(result, wanted)
    check(expected, [a, w_phi, b_phi, d])


def among_nan(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The same values in larger memory that is NaN behind each of `dims`."""
    larger = x.new_full([size + 16 * (dim in dims) for dim, size in enumerate(x.shape)], float("nan"))
    view = larger[tuple(slice(size) for size in x.shape)]
    return view.copy_(x)


@pytest.mark.interpreter
@pytest.mark.parametrize("channels", [pytest.param(32, id="whole-channels"), pytest.param(16, id="channel-tiles")])
def test_kernel_reads_nothing_beside_its_inputs(channels):
    tensors = inputs((2, 20, 6, 3), 18, torch.float32)
    wide = [among_nan(x, dims) for x, dims in zip(tensors, [(1, 2), (0, 1), (0,), (1, 2)], strict=True)]
    check(kernel.semantic_distribution(*wide, ALPHA, tiny(torch.float32, C=channels, K=channels)), tensors)


@pytest.mark.interpreter
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_kernel_keeps_the_memory_format(memory_format):
    a, *rest = inputs((2, 20, 6, 5), 4, torch.float32)
    a = a.to(memory_format=memory_format)
    for result in kernel.semantic_distribution(a, *rest, ALPHA, tiny(torch.float32)):
        assert result.stride() == a.stride()


def on_the_cpu(*arguments):
    return semantic_distribution(*arguments)


def in_the_kernel(a, *arguments):
    return kernel.semantic_distribution(a, *arguments, tiny(a.dtype))


PATHS = [
    pytest.param(on_the_cpu, id="reference"),
    pytest.param(in_the_kernel, id="kernel", marks=pytest.mark.interpreter),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("alpha", [0, 0.0, 1, 1.0, -2.5], ids=repr)
def test_alpha(alpha, dtype, path):
    tensors = inputs((1, 20, 5, 4), 18, dtype)
    results = path(*tensors, alpha)
    check(results, tensors, alpha)
    if alpha == 0:
        assert torch.equal(results[1], tensors[0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sum_takes_m_before_it_is_rounded(dtype, path):
    """M is 1 + eps / 2, half way between two descriptors, and rounds to 1 in `dtype`; A = -1 leaves eps / 2."""
    eps = torch.finfo(dtype).eps
    a = torch.full((1, 3, 2, 2), -1.0, dtype=dtype)
    d = torch.tensor([1.0, 1.0 + eps], dtype=dtype).expand(1, 3, 2)
    m, enhanced = path(a, torch.zeros(2, 3, dtype=dtype), torch.zeros(2, dtype=dtype), d, 1.0)
    assert bool((m == 1).all())
    assert bool((enhanced == eps / 2).all())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("common", [pytest.param(0, id="one-hot"), pytest.param(8000, id="close-together")])
def test_energies_beyond_half_precision(common, dtype, path):
    """Sums of quarters times quarters, which float32 holds exactly; float16 overflows, bfloat16 loses what differs.

    One-hot: the energies differ by thousands, and M is one descriptor. Close together: they share one large term and
    differ by a little, so that M is a mixture.
    """
    generator = torch.Generator().manual_seed(0)
    step = 0.25 if common else 1024.0
    a, w_phi = (torch.randint(-8, 9, shape, generator=generator) / 4 for shape in ((1, 20, 5, 4), (18, 20)))
    a, w_phi = a * 8, w_phi * step
    if common:
        a, w_phi[:, 0] = a / 8, common
        a[:, 0] = 12
    b_phi, d = torch.zeros(18), torch.randn(1, 20, 18, generator=generator)
    tensors = [tensor.to(dtype) for tensor in (a, w_phi, b_phi, d)]
    energy = w_phi.double() @ a.double().flatten(2)
    assert energy.abs().max() > torch.finfo(torch.float16).max
    singles = plain(*(tensor.float() for tensor in tensors), ALPHA)
    for result, exact, single in zip(path(*tensors, ALPHA), in_float64(tensors, ALPHA), singles, strict=True):
        assert_as_exact(result, exact, single.to(dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@shipped
@pytest.mark.parametrize("channels", [pytest.param(256, id="whole-channels"), pytest.param(260, id="channel-tiles")])
def test_shipped_configurations(channels, capability, is_regular, dtype):
    tensors = inputs((1, channels, 9, 15), 130, dtype)
    config = choose(OPS["semantic_distribution"].configs, tensors[0], is_regular, capability, 132)
    check(kernel.semantic_distribution(*tensors, ALPHA, config), tensors)


@pytest.mark.interpreter
@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 40),
    st.sampled_from([16, 64]),
    st.floats(-4, 4, width=32),
    st.integers(0, 2**16),
)
def test_kernel_at_any_size(shape, n, channels, alpha, seed):
    tensors = inputs(shape, n, torch.float32, seed=seed)
    with poisoned():
        results = kernel.semantic_distribution(*tensors, alpha, tiny(torch.float32, C=channels, K=channels))
    # Of one pixel, PyTorch's own error may be 0 by chance: a fixed bound here.
    for result, exact in zip(results, in_float64(tensors, alpha), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_op(memory_format, dtype):
    a, *rest = inputs((2, 20, 7, 5), 4, dtype)
    a = a.to(memory_format=memory_format)
    results = semantic_distribution(a, *rest, ALPHA)
    assert all(result.is_contiguous(memory_format=memory_format) for result in results)
    check(results, [a, *rest])
    torch.library.opcheck(torch.ops.agln.semantic_distribution.default, (a, *rest, ALPHA))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "n"),
    [
        pytest.param((1, 256, 128, 128), 128, id="agln"),
        pytest.param((8, 256, 15, 15), 64, id="release-and-a-batch"),
        pytest.param((2, 300, 33, 17), 130, id="odd-sizes-several-tiles-each-way"),
        pytest.param((1, 16, 1, 1), 1, id="one-pixel-one-descriptor"),
    ],
)
def test_on_the_gpu(shape, n, memory_format, dtype):
    a, *rest = (tensor.cuda() for tensor in inputs(shape, n, dtype))
    a = a.to(memory_format=memory_format)
    results = semantic_distribution(a, *rest, ALPHA)
    assert all(result.is_contiguous(memory_format=memory_format) for result in results)
    check(results, [a, *rest])
    for result, again in zip(results, semantic_distribution(a, *rest, ALPHA), strict=True):
        assert torch.equal(result, again)


RIGHT = {
    "a": torch.zeros(2, 4, 3, 3),
    "w_phi": torch.zeros(5, 4),
    "b_phi": torch.zeros(5),
    "d": torch.zeros(2, 4, 5),
    "alpha": 0.5,
}
FOUND = {name: value for name, value in RIGHT.items() if name != "alpha"}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        pytest.param("a", FOUND["a"].numpy(), TypeError, "a: needs a tensor, got ndarray", id="no-tensor"),
        pytest.param("a", FOUND["a"].int(), TypeError, r"a: needs float16, .*torch\.int32", id="integers"),
        pytest.param("a", FOUND["a"][0], ValueError, r"a: needs shape \(B, C, H, W\).*\(4, 3, 3\)", id="no-batch"),
        pytest.param("a", FOUND["a"][:, :, :0], ValueError, r"a: .*none of them 0.*\(2, 4, 0, 3\)", id="no-pixels"),
        pytest.param("w_phi", FOUND["w_phi"].half(), TypeError, r"w_phi: needs torch\.float32.*float16", id="w-dtype"),
        pytest.param("w_phi", torch.zeros(5, 3), ValueError, r"w_phi: .*\(N, 4\).*\(5, 3\)", id="w-channels"),
        pytest.param("w_phi", FOUND["w_phi"].to("meta"), ValueError, "w_phi: needs device cpu.*meta", id="w-device"),
        pytest.param("b_phi", torch.zeros(4), ValueError, r"b_phi: needs shape \(5\).*\(4,\)", id="b-descriptors"),
        pytest.param("b_phi", FOUND["b_phi"].double(), TypeError, "b_phi: needs torch.float32.*float64", id="b-dtype"),
        pytest.param("b_phi", FOUND["b_phi"].to("meta"), ValueError, "b_phi: needs device cpu.*meta", id="b-device"),
        pytest.param("d", torch.zeros(1, 4, 5), ValueError, r"d: needs shape \(2, 4, 5\).*\(1, 4, 5\)", id="d-batch"),
        pytest.param("d", torch.zeros(2, 3, 5), ValueError, r"d: .*\(2, 4, 5\).*\(2, 3, 5\)", id="d-channels"),
        pytest.param("d", torch.zeros(2, 4, 6), ValueError, r"d: .*\(2, 4, 5\).*\(2, 4, 6\)", id="d-descriptors"),
        pytest.param("d", FOUND["d"].half(), TypeError, "d: needs torch.float32.*float16", id="d-dtype"),
        pytest.param("d", FOUND["d"].to("meta"), ValueError, "d: needs device cpu.*meta", id="d-device"),
    ],
)
def test_wrong_argument_is_named(name, value, error, message):
    with pytest.raises(error, match=message):
        semantic_distribution(**{**RIGHT, name: value})
