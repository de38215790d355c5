"""channel_affinity and channel_apply: references, kernels under the interpreter, and ops against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import poisoned, shipped, tiny
from tolerance import assert_as_exact
from torch import Tensor

from agln_fast.kernels.channel_resample import channel_affinity, channel_apply, kernel
from agln_fast.kernels.launch import choose
from agln_fast.kernels.registration import OPS

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FORMATS = [torch.contiguous_format, torch.channels_last]
SIGNS = [pytest.param(1, id="paper"), pytest.param(-1, id="release")]
PARTS = [
    pytest.param(True, True, id="both"),
    pytest.param(True, False, id="resampling-alone"),
    pytest.param(False, True, id="gating-alone"),
    pytest.param(False, False, id="neither"),
]
small = partial(tiny, R=4)


def plain_affinity(e: Tensor, b: Tensor, sign: float) -> Tensor:
    """Eq. 4 as PyTorch runs it, operation by operation, in the dtype of its arguments."""
    return (sign * (e.flatten(2) @ b.flatten(2).transpose(1, 2))).softmax(-1)


def plain_apply(r: Tensor | None, b: Tensor, m: Tensor | None, base: Tensor, gate_scale: float, skip_scale: float):
    """Eq. 4 and 5 and the sum before Φ as PyTorch runs them, operation by operation, in the dtype of B."""
    resampled = b if r is None else (r.to(b.dtype) @ b.flatten(2)).view(b.shape)
    gated = resampled if m is None else resampled * m.sigmoid()
    return base + gate_scale * gated + skip_scale * b


def maps_of(number: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(number)]


def pair(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Maps whose energies are of unit size, so that the affinity is no one-hot."""
    e, b = maps_of(2, shape, torch.float32, seed)
    return [(e / (shape[2] * shape[3]) ** 0.5).to(dtype), b.to(dtype)]


def operands(shape: tuple[int, ...], dtype: torch.dtype, has_r: bool = True, has_m: bool = True, seed: int = 0):
    b, m, base = maps_of(3, shape, dtype, seed)
    r = channel_affinity(*pair(shape, dtype, seed), 1, dtype=dtype)
    return [r if has_r else None, b, m if has_m else None, base]


def double(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.double() for tensor in tensors]


def check_affinity(r: Tensor, e: Tensor, b: Tensor, sign: float) -> None:
    """Held to PyTorch's float32, which multiplies half numbers without rounding: more is asked than in their dtype."""
    assert r.is_contiguous()
    wide = torch.promote_types(e.dtype, torch.float32)
    assert_as_exact(
        r, plain_affinity(e.double(), b.double(), sign), plain_affinity(e.to(wide), b.to(wide), sign).to(r.dtype)
    )


def check_apply(out: Tensor, tensors: list[Tensor | None], gate_scale: float, skip_scale: float) -> None:
    exact = plain_apply(*double(tensors), gate_scale, skip_scale)
    assert_as_exact(out, exact, plain_apply(*tensors, gate_scale, skip_scale))


@pytest.mark.interpreter
@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        pytest.param((1, 32, 8, 8), {"I": 32, "J": 32}, id="one-tile-of-channels"),
        pytest.param((2, 40, 7, 5), {}, id="odd-sizes-several-tiles-each-way"),
        pytest.param((1, 40, 5, 5), {"I": 16, "J": 32}, id="tiles-of-two-sides"),
        pytest.param((1, 24, 1, 1), {}, id="one-pixel"),
        pytest.param((1, 1, 5, 5), {}, id="one-channel"),
        pytest.param((1, 16, 3, 4), {"P": 64, "I": 64}, id="tile-larger-than-the-map"),
        pytest.param((3, 16, 12, 12), {"processors": 60}, id="nine-splits-and-a-batch"),
    ],
)
def test_affinity_kernel(shape, tile, dtype, sign):
    e, b = pair(shape, dtype)
    with poisoned():
        r = kernel.channel_affinity(e, b, sign, small(dtype, **tile))
    check_affinity(r, e, b, sign)


@pytest.mark.interpreter
@pytest.mark.parametrize(("has_r", "has_m"), PARTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        pytest.param((1, 32, 4, 4), {"I": 32, "J": 32}, id="one-tile-of-channels"),
        pytest.param((2, 40, 7, 5), {}, id="odd-sizes-several-tiles-each-way"),
        pytest.param((1, 40, 5, 5), {"I": 16, "J": 32}, id="tiles-of-two-sides"),
        pytest.param((1, 24, 1, 1), {}, id="one-pixel"),
        pytest.param((1, 1, 5, 5), {}, id="one-channel"),
        pytest.param((1, 16, 3, 4), {"P": 64, "I": 64}, id="tile-larger-than-the-map"),
    ],
)
def test_apply_kernel(shape, tile, dtype, has_r, has_m):
    tensors = operands(shape, dtype, has_r, has_m)
    with poisoned():
        out = kernel.channel_apply(*tensors, 0.75, -0.5, small(dtype, **tile))
    check_apply(out, tensors, 0.75, -0.5)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("gate_scale", "skip_scale"),
    [
        pytest.param(0.0, 0.0, id="base-alone"),
        pytest.param(0.0, 0.5, id="no-gate"),
        pytest.param(0.5, 0.0, id="no-skip"),
        pytest.param(1, 0, id="integers"),
    ],
)
def test_apply_kernel_with_scales_of_zero(gate_scale, skip_scale, dtype):
    tensors = operands((1, 20, 5, 5), dtype)
    out = kernel.channel_apply(*tensors, gate_scale, skip_scale, small(dtype))
    check_apply(out, tensors, gate_scale, skip_scale)
    if gate_scale == skip_scale == 0:
        assert torch.equal(out, tensors[-1])


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_apply_kernel_takes_a_float32_affinity(dtype):
    _, *maps = operands((1, 20, 5, 5), dtype)
    r = channel_affinity(*pair((1, 20, 5, 5), dtype), 1)
    assert r.dtype == torch.float32
    out = kernel.channel_apply(r, *maps, 0.75, -0.5, small(dtype))
    check_apply(out, [r, *maps], 0.75, -0.5)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_apply_kernel_closes_and_opens_the_gate(dtype):
    """σ of ±200 is 0 and 1, without a NaN."""
    r, b, _, base = operands((1, 20, 5, 5), dtype)
    for gate, m in ((0.0, torch.full_like(b, -200)), (1.0, torch.full_like(b, 200))):
        out = kernel.channel_apply(r, b, m, base, 1.0, 0.0, small(dtype))
        assert torch.equal(out, kernel.channel_apply(r, b, None, base, gate, 0.0, small(dtype)))


def layouts(x: Tensor) -> list[Tensor]:
    """The same map: contiguous, channels_last, and every other row of one that is twice as high."""
    sliced = x.new_full((*x.shape[:2], 2 * x.shape[2], x.shape[3]), 7)
    sliced[:, :, ::2] = x
    return [x, x.to(memory_format=torch.channels_last), sliced[:, :, ::2]]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_read_every_layout(dtype):
    """Inputs of one call in different memory formats: bit for bit what they give in one."""
    e, b = pair((2, 20, 6, 5), dtype)
    r = kernel.channel_affinity(e, b, 1, small(dtype))
    _, _, m, base = operands(b.shape, dtype)
    out = kernel.channel_apply(r, b, m, base, 0.75, -0.5, small(dtype))
    for turn in range(3):
        es, bs, ms, bases = (layouts(x)[(turn + i) % 3] for i, x in enumerate((e, b, m, base)))
        assert torch.equal(kernel.channel_affinity(es, bs, 1, small(dtype)), r)
        transposed = r.transpose(1, 2).contiguous().transpose(1, 2)
        assert torch.equal(kernel.channel_apply(transposed, bs, ms, bases, 0.75, -0.5, small(dtype)), out)


@pytest.mark.interpreter
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_apply_kernel_keeps_the_memory_format_of_base(memory_format):
    r, b, m, base = operands((2, 20, 6, 5), torch.float32)
    out = kernel.channel_apply(r, b, m, base.to(memory_format=memory_format), 1.0, 1.0, small(torch.float32))
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.interpreter
@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_energies_beyond_float16(sign, dtype):
    """Energies of 8e4 that differ by 1: half precision would see infinities, or all of them equal.

    They are whole numbers that float32 adds without rounding, in any order.
    """
    e, b = torch.full((2, 1, 20, 9, 9), 32.0)
    e[:, :, 0, 0] = 1
    b[:, :, 0, 0] += torch.arange(20) % 4
    e, b = e.to(dtype), b.to(dtype)
    exact = plain_affinity(e.double(), b.double(), sign)
    assert (e.double().flatten(2) @ b.double().flatten(2).mT).min() > torch.finfo(torch.float16).max
    assert 0.1 < exact.max() < 0.2
    for r in (kernel.channel_affinity(e, b, sign, small(dtype)), channel_affinity(e, b, sign)):
        torch.testing.assert_close(r.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.interpreter
@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_hot_affinity_picks_a_channel(sign, dtype):
    """With energies of 1e5 a row of R is one channel, and (R B) is that very channel."""
    e, b = ((40 * x.abs()).to(dtype) for x in maps_of(2, (1, 20, 9, 9), torch.float32))
    r = kernel.channel_affinity(e, b, sign, small(dtype))
    exact = plain_affinity(e.double(), b.double(), sign)
    assert exact.amax(2).min() > 1 - 1e-9
    assert torch.equal(r.argmax(2), exact.argmax(2))
    check_affinity(r, e, b, sign)
    zero = torch.zeros_like(b)
    out = kernel.channel_apply(r, b, None, zero, 1.0, 0.0, small(dtype))
    picked = b[0, exact.argmax(2)[0]]
    torch.testing.assert_close(out[0], picked, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@shipped
def test_shipped_configurations(capability, is_regular, dtype):
    e, b = pair((1, 260, 9, 10), dtype)
    config = choose(OPS["channel_affinity"].configs, e, is_regular, capability, 132)
    check_affinity(kernel.channel_affinity(e, b, -1, config), e, b, -1)
    tensors = operands((1, 260, 9, 10), dtype)
    config = choose(OPS["channel_apply"].configs, b, is_regular, capability, 132)
    check_apply(kernel.channel_apply(*tensors, 0.75, -0.5, config), tensors, 0.75, -0.5)


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))


@pytest.mark.interpreter
@settings(max_examples=20, deadline=None)
@given(SHAPES, st.sampled_from([1, -1]), st.integers(1, 40), st.integers(0, 2**16))
def test_affinity_kernel_at_any_size(shape, sign, processors, seed):
    """Of whole numbers, whose energies float32 adds without rounding."""
    generator = torch.Generator().manual_seed(seed)
    e, b = torch.randint(-2, 3, (2, *shape), generator=generator).float()
    r = kernel.channel_affinity(e, b, sign, small(torch.float32, processors))
    torch.testing.assert_close(r.double(), plain_affinity(e.double(), b.double(), sign), rtol=1e-5, atol=1e-7)


@pytest.mark.interpreter
@settings(max_examples=20, deadline=None)
@given(SHAPES, st.booleans(), st.booleans(), st.floats(-2, 2), st.floats(-2, 2), st.integers(0, 2**16))
def test_apply_kernel_at_any_size(shape, has_r, has_m, gate_scale, skip_scale, seed):
    tensors = operands(shape, torch.float32, has_r, has_m, seed)
    out = kernel.channel_apply(*tensors, gate_scale, skip_scale, small(torch.float32))
    exact = plain_apply(*double(tensors), gate_scale, skip_scale)
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_affinity_op(memory_format, dtype):
    e, b = (x.to(memory_format=memory_format) for x in pair((2, 20, 7, 5), dtype))
    r = channel_affinity(e, b, -1)
    assert r.dtype == torch.promote_types(dtype, torch.float32)
    check_affinity(r, e, b, -1)
    asked = channel_affinity(e, b, -1, dtype=torch.bfloat16)
    assert torch.equal(asked, r.to(torch.bfloat16))
    for wanted in (None, torch.bfloat16):
        torch.library.opcheck(torch.ops.agln.channel_affinity.default, (e, b, -1.0), {"dtype": wanted})


@pytest.mark.parametrize(("has_r", "has_m"), PARTS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_apply_op(memory_format, dtype, has_r, has_m):
    r, *maps = operands((2, 20, 7, 5), dtype, has_r, has_m)
    b, m, base = (None if x is None else x.to(memory_format=memory_format) for x in maps)
    out = channel_apply(r, b, m, base, 0.75, -0.5)
    assert out.stride() == base.stride()
    check_apply(out, [r, b, m, base], 0.75, -0.5)
    torch.library.opcheck(torch.ops.agln.channel_apply.default, (r, b, m, base, 0.75, -0.5))


ON_GPU = [
    pytest.param((1, 256, 64, 64), id="one-image"),
    pytest.param((8, 256, 15, 15), id="batch"),
    pytest.param((2, 300, 33, 17), id="odd-sizes"),
    pytest.param((1, 16, 1, 1), id="one-pixel"),
    pytest.param((1, 1, 5, 5), id="one-channel"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", ON_GPU)
def test_affinity_on_the_gpu(shape, memory_format, dtype):
    e, b = (x.cuda().to(memory_format=memory_format) for x in pair(shape, dtype))
    r = channel_affinity(e, b, -1, dtype=dtype)
    assert_as_exact(r, plain_affinity(e.double(), b.double(), -1), plain_affinity(e, b, -1))
    assert torch.equal(r, channel_affinity(e, b, -1, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(("has_r", "has_m"), PARTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", ON_GPU)
def test_apply_on_the_gpu(shape, memory_format, dtype, has_r, has_m):
    r, *maps = (None if x is None else x.cuda() for x in operands(shape, dtype, has_r, has_m))
    tensors = [r, *(None if x is None else x.to(memory_format=memory_format) for x in maps)]
    out = channel_apply(*tensors, 0.75, -0.5)
    check_apply(out, tensors, 0.75, -0.5)
    assert torch.equal(out, channel_apply(*tensors, 0.75, -0.5))


X, R = torch.zeros(1, 4, 3, 3), torch.zeros(1, 4, 4)


@pytest.mark.parametrize(
    ("e", "b", "sign", "dtype", "error", "message"),
    [
        pytest.param(X.numpy(), X, 1, None, TypeError, "e: needs a tensor, got ndarray", id="no-tensor"),
        pytest.param(X[0], X, 1, None, ValueError, r"e: needs shape \(B, C, H, W\).*\(4, 3, 3\)", id="no-batch"),
        pytest.param(X, X.half(), 1, None, TypeError, r"b: needs torch\.float32.*float16", id="two-dtypes"),
        pytest.param(
            X, X[:, :3], 1, None, ValueError, r"b: needs shape \(1, 4, 3, 3\).*\(1, 3, 3, 3\)", id="two-shapes"
        ),
        pytest.param(X, X.to("meta"), 1, None, ValueError, "b: needs device cpu.*meta", id="two-devices"),
        pytest.param(X, X, 0, None, ValueError, "sign: needs .*got 0", id="sign-of-zero"),
        pytest.param(X, X, "+", None, TypeError, "sign: needs a number, got str", id="sign-no-number"),
        pytest.param(X, X, 1, torch.int32, TypeError, r"dtype: needs float16.*torch\.int32", id="integer-result"),
    ],
)
def test_wrong_argument_of_affinity_is_named(e, b, sign, dtype, error, message):
    with pytest.raises(error, match=message):
        channel_affinity(e, b, sign, dtype=dtype)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        pytest.param({"b": X[:, :, :0]}, ValueError, "b: .*none of them 0", id="no-pixels"),
        pytest.param({"r": R[:, :3]}, ValueError, r"r: needs shape \(1, 4, 4\).*\(1, 3, 4\)", id="affinity-not-square"),
        pytest.param({"r": R.half()}, TypeError, r"r: needs torch\.float32.*float16", id="affinity-in-half"),
        pytest.param({"r": R.to("meta")}, ValueError, "r: needs device cpu.*meta", id="affinity-elsewhere"),
        pytest.param({"m": X[..., :2]}, ValueError, r"m: needs shape \(1, 4, 3, 3\)", id="gate-of-another-size"),
        pytest.param({"m": X.double()}, TypeError, r"m: needs torch\.float32.*float64", id="gate-of-another-dtype"),
        pytest.param({"base": None}, TypeError, "base: needs a tensor, got NoneType", id="no-base"),
        pytest.param({"base": X[..., :2]}, ValueError, r"base: needs shape \(1, 4, 3, 3\)", id="base-of-another-size"),
        pytest.param({"gate_scale": X}, TypeError, "gate_scale: needs a number, got Tensor", id="gate-scale-a-tensor"),
    ],
)
def test_wrong_argument_of_apply_is_named(changed, error, message):
    arguments = {"r": R, "b": X, "m": X, "base": X, "gate_scale": 1.0, "skip_scale": 0.0} | changed
    with pytest.raises(error, match=message):
        channel_apply(**arguments)
