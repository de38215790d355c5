"""upsample_bilinear: by hand, kernel under the interpreter, and op against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import poisoned, shipped, tiny
from tolerance import assert_as_exact
from torch import Tensor

from agln_fast.kernels import upsample_bilinear
from agln_fast.kernels.launch import choose
from agln_fast.kernels.registration import OPS
from agln_fast.kernels.upsample_bilinear import kernel

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
LAYOUTS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)


ALIGNMENTS = pytest.mark.parametrize("align_corners", [True, False], ids=["aligned", "unaligned"])


def plain(x: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def noise(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(y: Tensor, x: Tensor, size: tuple[int, int], align_corners: bool = True) -> None:
    """A coordinate of at most h (or w) is rounded twice, which moves the weight by h * eps, and the value by that times
    the difference of two neighbours; PyTorch rounds it in the same way, perhaps to the other side."""
    channels_last = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format  # one pixel is in both
    assert y.is_contiguous(memory_format=channels_last)
    blur = 4 * sum(x.shape[2:]) * torch.finfo(torch.float32).eps * x.abs().max().item()
    assert_as_exact(y, plain(x.double(), size, align_corners), plain(x, size, align_corners), blur)


SIZES = pytest.mark.parametrize(
    ("shape", "size", "tile"),
    [
        pytest.param((1, 32, 4, 4), (8, 8), {"C": 32}, id="one-tile-of-channels"),
        pytest.param((2, 20, 5, 4), (9, 7), {}, id="odd-sizes-several-tiles-each-way-and-a-batch"),
        pytest.param((1, 3, 1, 1), (3, 5), {}, id="one-source-pixel"),
        pytest.param((1, 3, 1, 4), (6, 5), {}, id="one-source-row"),
        pytest.param((1, 3, 4, 1), (6, 5), {}, id="one-source-column"),
        pytest.param((1, 3, 4, 5), (1, 1), {}, id="one-target-pixel"),
        pytest.param((1, 3, 5, 6), (5, 6), {}, id="same-size"),
        pytest.param((1, 3, 9, 8), (4, 3), {}, id="smaller-than-the-source"),
        pytest.param((1, 1, 2, 3), (3, 4), {"P": 64, "C": 64}, id="tile-larger-than-the-map"),
    ],
)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@ALIGNMENTS
@LAYOUTS
@SIZES
def test_kernel(shape, size, tile, memory_format, align_corners, dtype):
    x = noise(shape, dtype).to(memory_format=memory_format)
    with poisoned():
        y = kernel.upsample_bilinear(x, size, tiny(dtype, **tile), align_corners=align_corners)
    check(y, x, size, align_corners)


@pytest.mark.interpreter
def test_kernel_reads_every_layout_and_nothing_beside_it():
    """Every other row, or some channels, of maps that are NaN before, between and after them."""
    x = noise((2, 20, 6, 5), torch.float32)
    rows = torch.full((4, 20, 12, 5), torch.nan)[1:-1, :, ::2].copy_(x)
    channels = torch.full((4, 6, 5, 33), torch.nan)[1:-1, ..., 7:-6].permute(0, 3, 1, 2).copy_(x)
    whole = kernel.upsample_bilinear(x, (11, 9), tiny(torch.float32))
    for layout in (rows, channels):
        assert torch.equal(kernel.upsample_bilinear(layout, (11, 9), tiny(torch.float32)), whole)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@shipped
def test_shipped_configurations(capability, is_regular, dtype):
    x = noise((1, 300, 3, 5), dtype)
    config = choose(OPS["upsample_bilinear"].configs, x, is_regular, capability, 132)
    check(kernel.upsample_bilinear(x, (5, 9), config), x, (5, 9))


@pytest.mark.interpreter
@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 4), st.integers(1, 20), st.booleans(), st.integers(0, 2**16))
def test_kernel_at_any_size(sides, channels, align_corners, seed):
    x = noise((1, channels, *sides[:2]), torch.float32, seed)
    y = kernel.upsample_bilinear(x, sides[2:], tiny(torch.float32), align_corners=align_corners)
    check(y, x, sides[2:], align_corners)


@pytest.mark.parametrize(
    "run",
    [upsample_bilinear, lambda *a, **k: kernel.upsample_bilinear(*a, tiny(torch.float32), **k)],
    ids=["op", "kernel"],
)
@pytest.mark.interpreter
def test_by_hand(run):
    """Between 0, 2, 4 and 8 at the corners lie 1, 2, 6, 5 and their mean 3.5."""
    x = torch.tensor([[[[0.0, 2.0], [4.0, 8.0]]]])
    assert run(x, (3, 3)).tolist() == [[[[0, 1, 2], [2, 3.5, 5], [4, 6, 8]]]]
    ramp = torch.tensor([[[[0.0, 4.0]]]])  # pixels of half the width: their centres lie a quarter beside the others
    assert run(ramp, (1, 4), align_corners=False).tolist() == [[[[0, 1, 3, 4]]]]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@LAYOUTS
def test_op(memory_format, dtype):
    x = noise((2, 6, 4, 3), dtype).to(memory_format=memory_format)
    for align_corners in (True, False):
        keywords = {"align_corners": align_corners}
        check(upsample_bilinear(x, (7, 5), **keywords), x, (7, 5), align_corners)
        torch.library.opcheck(torch.ops.agln.upsample_bilinear.default, (x, (7, 5)), keywords)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@LAYOUTS
@pytest.mark.parametrize(
    ("shape", "size"), [((1, 256, 64, 64), (128, 128)), ((2, 70, 9, 17), (33, 17)), ((8, 300, 8, 8), (15, 16))]
)
@ALIGNMENTS
def test_on_the_gpu(shape, size, memory_format, dtype, align_corners):
    x = noise(shape, dtype).cuda().to(memory_format=memory_format)
    y = upsample_bilinear(x, size, align_corners=align_corners)
    check(y, x, size, align_corners)
    assert torch.equal(y, upsample_bilinear(x, size, align_corners=align_corners))


X = torch.zeros(2, 4, 3, 3)


@pytest.mark.parametrize(
    ("x", "size", "error", "message"),
    [
        pytest.param(X.numpy(), (4, 4), TypeError, "x: needs a tensor, got ndarray", id="no-tensor"),
        pytest.param(X[0], (4, 4), ValueError, r"x: .*\(B, C, h, w\).*\(4, 3, 3\)", id="no-batch"),
        pytest.param(X[..., :0], (4, 4), ValueError, r"x: .*none of them 0.*\(2, 4, 3, 0\)", id="empty"),
        pytest.param(X, 4, TypeError, "size: needs two integers", id="one-side"),
        pytest.param(X, (4, 0), ValueError, "size: needs H and W of at least 1", id="no-rows"),
    ],
)
def test_wrong_argument_is_named(x, size, error, message):
    with pytest.raises(error, match=message):
        upsample_bilinear(x, size)
