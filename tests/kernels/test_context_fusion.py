"""context_fusion: the ops it is made of, reference, kernel under the interpreter, and op against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import poisoned, shipped, tiny
from tolerance import assert_as_exact
from torch import Tensor

from agln_fast.kernels import channel_apply, context_fusion, semantic_distribution
from agln_fast.kernels.context_fusion import kernel
from agln_fast.kernels.launch import choose
from agln_fast.kernels.registration import OPS

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FORMATS = [torch.contiguous_format, torch.channels_last]
SCALES = 0.7, 0.75, -0.5  # α, gate_scale, skip_scale
PARTS = [
    pytest.param(True, True, id="both"),
    pytest.param(True, False, id="resampling-alone"),
    pytest.param(False, True, id="gating-alone"),
    pytest.param(False, False, id="neither"),
]


def plain(a, w_phi, b_phi, d, r, b, alpha, gate_scale, skip_scale, gates=True) -> Tensor:
    """Eq. 2 to 6 up to Φ, as released, operation by operation in the dtype of the arguments."""
    m = (d @ (w_phi @ a.flatten(2) + b_phi[:, None]).softmax(1)).view(a.shape)
    resampled = b if r is None else (r.to(b.dtype) @ b.flatten(2)).view(b.shape)
    return a + alpha * m + gate_scale * (resampled * m.sigmoid() if gates else resampled) + skip_scale * b


def inputs(shape: tuple[int, ...], n: int, dtype: torch.dtype, has_r: bool = True, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    batch, channels = shape[:2]
    w_phi = 2 * draw(n, channels) / channels**0.5
    r = (2 * draw(batch, channels, channels)).softmax(2)
    tensors = draw(*shape), w_phi, draw(n), draw(batch, channels, n), r, draw(*shape)
    return [x.to(dtype) if has_r or x is not r else None for x in tensors]


def exactly(tensors: list[Tensor | None], scales=SCALES, gates: bool = True) -> Tensor:
    return plain(*(None if x is None else x.double() for x in tensors), *scales, gates)


def check(out: Tensor, tensors: list[Tensor | None], scales=SCALES, gates: bool = True) -> None:
    assert_as_exact(out, exactly(tensors, scales, gates), plain(*tensors, *scales, gates))


@pytest.mark.parametrize("gates", [True, False], ids=["gates", "no-gates"])
@pytest.mark.parametrize("has_r", [True, False], ids=["resamples", "identity"])
def test_it_is_the_two_ops_it_is_made_of(has_r, gates):
    a, w_phi, b_phi, d, r, b = inputs((2, 20, 7, 5), 18, torch.float64, has_r)
    m, base = semantic_distribution(a, w_phi, b_phi, d, SCALES[0])
    expected = channel_apply(r, b, m if gates else None, base, *SCALES[1:])
    out = context_fusion(a, w_phi, b_phi, d, r, b, *SCALES, gates=gates)
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.interpreter
@pytest.mark.parametrize(("has_r", "gates"), PARTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "n", "tile"),
    [
        pytest.param((1, 32, 8, 8), 16, {"J": 32, "K": 32}, id="both-kept-two-slices"),
        pytest.param((1, 32, 4, 4), 16, {"C": 32, "J": 32, "K": 32}, id="both-kept-one-slice"),
        pytest.param((2, 40, 7, 5), 40, {}, id="odd-sizes-several-tiles-each-way"),
        pytest.param((2, 40, 7, 5), 40, {"N": 64, "C": 32, "J": 64}, id="odd-sizes-both-kept"),
        pytest.param((2, 40, 7, 5), 40, {"N": 64, "K": 64}, id="softmax-kept-alone"),
        pytest.param((2, 40, 7, 5), 40, {"J": 64}, id="map-kept-alone"),
        pytest.param((1, 24, 1, 1), 3, {"J": 32}, id="one-pixel"),
        pytest.param((1, 24, 9, 11), 1, {"J": 32}, id="one-descriptor"),
        pytest.param((1, 1, 5, 5), 2, {}, id="one-channel"),
        pytest.param((1, 16, 3, 4), 8, {"P": 64, "N": 64, "C": 64, "J": 64, "K": 64}, id="tiles-larger-than-the-map"),
        pytest.param((3, 16, 6, 7), 8, {}, id="batch"),
    ],
)
def test_kernel(shape, n, tile, dtype, has_r, gates):
    tensors = inputs(shape, n, dtype, has_r)
    with poisoned():
        out = kernel.context_fusion(*tensors, *SCALES, tiny(dtype, **tile), gates=gates)
    check(out, tensors, gates=gates)


KEPT = [
    pytest.param({"N": 32, "J": 32}, id="kept"),
    pytest.param({}, id="in-tiles"),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", KEPT)
def test_kernel_reads_every_layout(tile, dtype):
    """Inputs of one call in different layouts: bit for bit what they give in one."""
    a, w_phi, b_phi, d, r, b = tensors = inputs((2, 20, 6, 5), 18, dtype)
    config = tiny(dtype, **tile)
    expected = kernel.context_fusion(*tensors, *SCALES, config)
    check(expected, tensors)
    turned = w_phi.t().contiguous().t(), b_phi.repeat_interleave(2)[::2], d.mT.contiguous().mT, r.mT.contiguous().mT

    def layouts(x: Tensor) -> list[Tensor]:
        part = torch.cat([x, x], 1)[:, :20]
        return [x.to(memory_format=torch.channels_last), x.repeat_interleave(2, 2)[:, :, ::2], part]

    for a_layout, b_layout in zip(layouts(a), reversed(layouts(b)), strict=True):
        assert torch.equal(kernel.context_fusion(a_layout, *turned, b_layout, *SCALES, config), expected)


def among_nan(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The same values in larger memory that is NaN behind each of `dims`."""
    larger = x.new_full([size + 16 * (dim in dims) for dim, size in enumerate(x.shape)], float("nan"))
    return larger[tuple(slice(size) for size in x.shape)].copy_(x)


@pytest.mark.interpreter
@pytest.mark.parametrize("tile", KEPT)
def test_kernel_reads_nothing_beside_its_inputs(tile):
    tensors = inputs((2, 20, 6, 3), 18, torch.float32)
    wide = [among_nan(x, dims) for x, dims in zip(tensors, [(1, 2), (0, 1), (0,), (1, 2), (1, 2), (1, 2)], strict=True)]
    check(kernel.context_fusion(*wide, *SCALES, tiny(torch.float32, **tile)), tensors)


@pytest.mark.interpreter
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_kernel_keeps_the_memory_format_of_a(memory_format):
    a, *rest = inputs((2, 20, 6, 5), 4, torch.float32)
    a = a.to(memory_format=memory_format)
    assert kernel.context_fusion(a, *rest, *SCALES, tiny(torch.float32)).stride() == a.stride()


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_kernel_takes_a_float32_affinity(dtype):
    *distribution, r, b = inputs((1, 20, 5, 5), 18, torch.float32)
    tensors = [*(x.to(dtype) for x in distribution), r, b.to(dtype)]
    check(kernel.context_fusion(*tensors, *SCALES, tiny(dtype, J=32)), tensors)


def on_the_cpu(*arguments):
    return context_fusion(*arguments)


def in_the_kernel(a, *arguments):
    return kernel.context_fusion(a, *arguments, tiny(a.dtype))


PATHS = [
    pytest.param(on_the_cpu, id="reference"),
    pytest.param(in_the_kernel, id="kernel", marks=pytest.mark.interpreter),
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "scales",
    [scales for scales in itertools.product((0.0, 0.5), repeat=3) if not all(scales)] + [(1, -1, 0)],
    ids=str,
)
def test_scales_of_zero_and_integers(scales, dtype, path):
    tensors = inputs((1, 20, 5, 4), 18, dtype)
    out = path(*tensors, *scales)
    check(out, tensors, scales)
    if not any(scales):
        assert torch.equal(out, tensors[0])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gate_closes_and_opens(dtype, path):
    """Of one descriptor of ±200 is M ±200 everywhere, and σ(M) 0 and 1, without a NaN."""
    a, w_phi, b_phi, d, r, b = inputs((1, 20, 5, 5), 1, dtype)
    for gate, value in ((0.0, -200.0), (1.0, 200.0)):
        out = path(a, w_phi, b_phi, torch.full_like(d, value), r, b, 0.0, 1.0, 0.0)
        check(out, [a, w_phi, b_phi, d, r, b], (0.0, gate, 0.0), gates=False)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sum_takes_m_before_it_is_rounded(dtype, path):
    """M is 1 + eps / 2, half way between two descriptors, and rounds to 1 in `dtype`; A = -1 leaves eps / 2."""
    eps = torch.finfo(dtype).eps
    a = torch.full((1, 3, 2, 2), -1.0, dtype=dtype)
    d = torch.tensor([1.0, 1.0 + eps], dtype=dtype).expand(1, 3, 2)
    out = path(a, torch.zeros(2, 3, dtype=dtype), torch.zeros(2, dtype=dtype), d, None, torch.ones_like(a), 1.0, 0.0, 0)
    assert bool((out == eps / 2).all())


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_energies_beyond_half_precision(dtype, path):
    """Sums of quarters times quarters, which float32 holds exactly: large ones that differ by a little, a mixture."""
    generator = torch.Generator().manual_seed(0)
    a, w_phi = (torch.randint(-8, 9, shape, generator=generator) / 4 for shape in ((1, 20, 5, 4), (18, 20)))
    w_phi = w_phi / 4
    a[:, 0], w_phi[:, 0] = 12, 8000
    rest = inputs((1, 20, 5, 4), 18, torch.float32)[3:]
    tensors = [x.to(dtype) for x in (a, w_phi, torch.zeros(18), *rest)]
    energy = tensors[1].double() @ tensors[0].double().flatten(2)
    assert energy.abs().max() > torch.finfo(torch.float16).max
    single = plain(*(x.float() for x in tensors), *SCALES)
    assert_as_exact(path(*tensors, *SCALES), exactly(tensors), single.to(dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@shipped
@pytest.mark.parametrize("n", [pytest.param(64, id="softmax-kept"), pytest.param(130, id="softmax-in-tiles")])
@pytest.mark.parametrize("channels", [pytest.param(256, id="map-kept"), pytest.param(260, id="map-in-chunks")])
def test_shipped_configurations(channels, n, capability, is_regular, dtype):
    tensors = inputs((1, channels, 7, 10), n, dtype)
    config = choose(OPS["context_fusion"].configs, tensors[0], is_regular, capability, 1)
    check(kernel.context_fusion(*tensors, *SCALES, config), tensors)


@pytest.mark.interpreter
@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    st.integers(1, 40),
    st.tuples(st.sampled_from([16, 64]), st.sampled_from([16, 64]), st.sampled_from([16, 64])),
    st.tuples(*[st.floats(-2, 2, width=32)] * 3),
    st.tuples(st.booleans(), st.booleans()),
    st.integers(0, 2**16),
)
def test_kernel_at_any_size(shape, n, tiles, scales, parts, seed):
    has_r, gates = parts
    tensors = inputs(shape, n, torch.float32, has_r, seed)
    config = tiny(torch.float32, **dict(zip("NCJ", tiles, strict=True)))
    with poisoned():
        out = kernel.context_fusion(*tensors, *scales, config, gates=gates)
    # Of one pixel, PyTorch's own error may be 0 by chance: a fixed bound here.
    torch.testing.assert_close(out.double(), exactly(tensors, scales, gates), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("has_r", "gates"), PARTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_op(memory_format, dtype, has_r, gates):
    tensors = inputs((2, 20, 7, 5), 4, dtype, has_r)
    tensors[0], tensors[-1] = (tensors[i].to(memory_format=memory_format) for i in (0, -1))
    out = context_fusion(*tensors, *SCALES, gates=gates)
    assert out.stride() == tensors[0].stride()
    check(out, tensors, gates=gates)
    torch.library.opcheck(torch.ops.agln.context_fusion.default, (*tensors, *SCALES), {"gates": gates})


@pytest.mark.gpu
@pytest.mark.parametrize(("has_r", "gates"), PARTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("shape", "n"),
    [
        pytest.param((1, 256, 128, 128), 64, id="agln-release"),
        pytest.param((8, 256, 15, 15), 128, id="batch"),
        pytest.param((2, 300, 33, 17), 150, id="odd-sizes-several-tiles-each-way"),
        pytest.param((1, 16, 1, 1), 1, id="one-pixel-one-descriptor"),
    ],
)
def test_on_the_gpu(shape, n, memory_format, dtype, has_r, gates):
    tensors = [None if x is None else x.cuda() for x in inputs(shape, n, dtype, has_r)]
    tensors[0], tensors[-1] = (tensors[i].to(memory_format=memory_format) for i in (0, -1))
    out = context_fusion(*tensors, *SCALES, gates=gates)
    assert out.stride() == tensors[0].stride()
    check(out, tensors, gates=gates)
    assert torch.equal(out, context_fusion(*tensors, *SCALES, gates=gates))


X = torch.zeros(2, 4, 3, 3)
RIGHT = {
    "a": X,
    "w_phi": torch.zeros(5, 4),
    "b_phi": torch.zeros(5),
    "d": torch.zeros(2, 4, 5),
    "r": torch.zeros(2, 4, 4),
    "b": X,
    "alpha": 0.5,
    "gate_scale": 0.5,
    "skip_scale": 0.5,
}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        pytest.param("a", X.numpy(), TypeError, "a: needs a tensor, got ndarray", id="no-tensor"),
        pytest.param("a", X[0], ValueError, r"a: needs shape \(B, C, H, W\).*\(4, 3, 3\)", id="no-batch"),
        pytest.param("w_phi", torch.zeros(5, 3), ValueError, r"w_phi: .*\(N, 4\).*\(5, 3\)", id="w-channels"),
        pytest.param("b_phi", torch.zeros(4), ValueError, r"b_phi: needs shape \(5\).*\(4,\)", id="b-descriptors"),
        pytest.param("d", torch.zeros(2, 4, 6), ValueError, r"d: .*\(2, 4, 5\).*\(2, 4, 6\)", id="d-descriptors"),
        pytest.param("r", torch.zeros(2, 3, 4), ValueError, r"r: needs shape \(2, 4, 4\).*\(2, 3, 4\)", id="r-shape"),
        pytest.param("r", RIGHT["r"].half(), TypeError, r"r: needs torch\.float32.*float16", id="r-in-half"),
        pytest.param("r", RIGHT["r"].to("meta"), ValueError, "r: needs device cpu.*meta", id="r-elsewhere"),
        pytest.param("b", X[..., :2], ValueError, r"b: needs shape \(2, 4, 3, 3\)", id="b-of-another-size"),
        pytest.param("b", X.double(), TypeError, r"b: needs torch\.float32.*float64", id="b-of-another-dtype"),
        pytest.param("alpha", X, TypeError, "alpha: needs a number, got Tensor", id="alpha-a-tensor"),
        pytest.param("gate_scale", X, TypeError, "gate_scale: needs a number, got Tensor", id="gate-scale-a-tensor"),
        pytest.param("skip_scale", "1", TypeError, "skip_scale: needs a number, got str", id="skip-scale-no-number"),
        pytest.param("gates", "no", TypeError, "gates: needs True or False, got 'no'", id="gates-no-bool"),
    ],
)
def test_wrong_argument_is_named(name, value, error, message):
    with pytest.raises(error, match=message):
        context_fusion(**{**RIGHT, name: value})
