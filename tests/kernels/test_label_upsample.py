"""label_upsample: reference, NumPy on CPUs, kernel under the interpreter, op; against float64 and by hand."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import loads_stay_within, poisoned, shipped, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from agln_fast import decode as cpu
from agln_fast.kernels.label_upsample import kernel, label_upsample, reference
from agln_fast.kernels.launch import choose
from agln_fast.kernels.registration import OPS

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def noise(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ALIGNMENTS = pytest.mark.parametrize("align_corners", [True, False], ids=["aligned", "unaligned"])


def check(logits: Tensor, size: tuple[int, int], labels: Tensor, align_corners: bool = True) -> None:
    """Equal to the float64 resize wherever its two best classes are further apart than float32 can blur.

    A coordinate of at most h (or w) is rounded twice, which moves the weight by h * eps and the value by that times the
    difference of two neighbours, at most 2 * max|logits|; two classes may move towards each other.
    """
    exact = F.interpolate(logits.double(), size, mode="bilinear", align_corners=align_corners)
    blur = 8 * sum(logits.shape[2:]) * torch.finfo(torch.float32).eps * logits.abs().max().double()
    assert labels.shape == (logits.shape[0], *size)
    assert labels.is_contiguous()
    assert int(labels.max()) < logits.shape[1]
    chosen = exact.gather(1, labels.long().unsqueeze(1)).squeeze(1)
    assert bool((exact.amax(1) - chosen <= blur).all())


SIZES = pytest.mark.parametrize(
    ("shape", "size"),
    [
        pytest.param((1, 21, 32, 32), (128, 128), id="quarter-resolution"),
        pytest.param((2, 7, 17, 13), (50, 41), id="odd-sizes-and-a-batch"),
        pytest.param((1, 5, 9, 9), (9, 9), id="same-size"),
        pytest.param((1, 5, 40, 30), (13, 7), id="smaller-than-the-source"),
        pytest.param((1, 4, 1, 6), (11, 12), id="one-source-row"),
        pytest.param((1, 4, 6, 1), (11, 12), id="one-source-column"),
        pytest.param((1, 4, 1, 1), (3, 5), id="one-source-pixel"),
        pytest.param((1, 4, 6, 5), (1, 9), id="one-target-row"),
        pytest.param((1, 4, 6, 5), (9, 1), id="one-target-column"),
        pytest.param((1, 1, 6, 5), (9, 8), id="one-class"),
        pytest.param((1, 300, 6, 5), (9, 8), id="more-classes-than-8-bits"),
    ],
)


def smooth(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Logits as of pictures: regions of a class, with few borders between them."""
    coarse = noise((*shape[:2], 3, 4), seed)
    return F.interpolate(coarse, shape[2:], mode="bicubic", align_corners=True).contiguous()


IMPLEMENTATIONS = pytest.mark.parametrize(
    "label_upsample", [label_upsample, reference.label_upsample], ids=["op", "reference"]
)


@IMPLEMENTATIONS
@ALIGNMENTS
@pytest.mark.parametrize("make", [noise, smooth])
@SIZES
def test_agrees_with_resize_then_argmax(shape, size, make, align_corners, label_upsample):
    logits = make(shape)
    labels = label_upsample(logits, size, align_corners=align_corners)
    check(logits, size, labels, align_corners)
    resized = F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)
    agreement = (labels == resized.argmax(1)).float().mean()
    assert agreement > 0.999  # both are float32: only near ties may differ


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 12)] * 4), st.integers(1, 4), st.booleans(), st.integers(0, 2**16))
def test_agrees_with_float64_at_any_size(
    sides: tuple[int, int, int, int], classes: int, align_corners: bool, seed: int
) -> None:
    for logits in (noise((1, classes, *sides[:2]), seed), smooth((1, classes, *sides[:2]), seed)):
        for implementation in (label_upsample, reference.label_upsample):
            check(logits, sides[2:], implementation(logits, sides[2:], align_corners=align_corners), align_corners)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_accumulates_in_float32_for_every_dtype_and_memory_format(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    logits = noise((2, 6, 9, 7), 1).to(dtype).to(memory_format=memory_format)
    for align_corners in (True, False):
        keywords = {"align_corners": align_corners}
        check(logits, (23, 19), label_upsample(logits, (23, 19), **keywords), align_corners)
        torch.library.opcheck(torch.ops.agln.label_upsample.default, (logits, (23, 19)), keywords)


def test_two_by_two_by_hand() -> None:
    """A ramp 0, 1, 2 / 1, 2, 3 / 2, 3, 4 between the corners 0, 2, 2, 4 beats a constant 1.5 where it is 2 or more."""
    ramp = torch.tensor([[0.0, 2.0], [2.0, 4.0]])
    logits = torch.stack([torch.full((2, 2), 1.5), ramp]).unsqueeze(0)
    assert label_upsample(logits, (3, 3)).tolist() == [[[0, 0, 1], [0, 1, 1], [1, 1, 1]]]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "run",
    [label_upsample, reference.label_upsample, lambda *a, **k: kernel.label_upsample(*a, tiny(torch.float32), **k)],
    ids=["op", "reference", "kernel"],
)
def test_a_ramp_by_hand(run) -> None:  # type: ignore[no-untyped-def]
    """Of 0 and 4 four pixels become 0, 4/3, 8/3, 4 with aligned corners, and 0, 1, 3, 4 without: the outer ones lie
    beyond both centres. Against a constant 1.2."""
    logits = torch.tensor([[1.2, 1.2], [0.0, 4.0]]).view(1, 2, 1, 2)
    assert run(logits, (1, 4), align_corners=True).tolist() == [[[0, 1, 1, 1]]]
    assert run(logits, (1, 4), align_corners=False).tolist() == [[[0, 0, 1, 1]]]
    assert run(logits.transpose(2, 3), (4, 1), align_corners=False).tolist() == [[[0], [0], [1], [1]]]
    assert torch.equal(run(logits, (1, 4)), run(logits, (1, 4), align_corners=True))


def test_ties_go_to_the_lowest_class() -> None:
    best = noise((1, 1, 5, 4), 2)
    logits = torch.cat([best - 1, best, best, best - 2], dim=1)
    assert bool((label_upsample(logits, (17, 11)) == 1).all())


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(256, torch.uint8), (257, torch.int32)],
    ids=["largest-uint8", "smallest-int32"],
)
def test_dtype_holds_the_last_class(classes: int, dtype: torch.dtype) -> None:
    logits = torch.zeros(1, classes, 1, 2)
    logits[:, -1] = 1
    labels = label_upsample(logits, (2, 3))
    assert labels.dtype == dtype
    assert bool((labels == classes - 1).all())


@ALIGNMENTS
@pytest.mark.parametrize("size", [(31, 20), (3, 4)], ids=["up", "down"])
def test_strips_of_one_row_give_the_same_labels(
    size: tuple[int, int], align_corners: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = noise((2, 6, 9, 7), 3)
    whole = reference.label_upsample(logits, size, align_corners=align_corners)
    monkeypatch.setattr(reference, "_STRIP_BYTES", 1)
    assert torch.equal(reference.label_upsample(logits, size, align_corners=align_corners), whole)


@ALIGNMENTS
@pytest.mark.parametrize("size", [(31, 20), (3, 4), (9, 7)], ids=["up", "down", "same-size"])
def test_cells_one_by_one_give_the_same_labels(
    size: tuple[int, int], align_corners: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = noise((1, 6, 9, 7), 3)
    whole = label_upsample(logits, size, align_corners=align_corners)
    monkeypatch.setattr(cpu, "_STRIP_BYTES", 1)
    monkeypatch.setattr(cpu, "_CELLS", 1)
    assert torch.equal(label_upsample(logits, size, align_corners=align_corners), whole)


@ALIGNMENTS
def test_cells_whose_corners_agree_are_not_interpolated(align_corners: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Class 1 takes the source from column 4 on: only the cells between columns 3 and 4 are mixed."""
    logits = torch.zeros(1, 2, 5, 8)
    logits[:, 1] = torch.arange(8) - 3.5
    seen = []
    interpolate = cpu._interpolate

    def spy(labels, flat, width, rows, columns, y, x, down, across):  # type: ignore[no-untyped-def]
        seen.extend(zip(y.tolist(), x.tolist(), strict=True))
        interpolate(labels, flat, width, rows, columns, y, x, down, across)

    monkeypatch.setattr(cpu, "_interpolate", spy)
    check(logits, (25, 57), label_upsample(logits, (25, 57), align_corners=align_corners), align_corners)
    assert sorted(seen) == [(row, 3) for row in range(4)]


@pytest.mark.parametrize("corner", range(4), ids=["upper-left", "upper-right", "lower-left", "lower-right"])
def test_one_corner_that_differs_is_enough(corner: int) -> None:
    """Class 1 is 1 against 0.3 at one corner of four, and wins where its weight is above 0.3: beyond that corner."""
    logits = torch.stack([torch.full((4,), 0.3), torch.zeros(4)]).view(1, 2, 2, 2)
    logits.view(2, 4)[1, corner] = 1
    labels = label_upsample(logits, (9, 9))
    assert torch.equal(labels, reference.label_upsample(logits, (9, 9)))
    assert labels.sum() > 1


def test_a_class_that_wins_at_no_corner_may_win_between_them() -> None:
    """1 - 2x, 2x - 1 and 0.3 along a cell: the third is ahead from x = 0.35 to 0.65."""
    logits = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.3, 0.3]]).view(1, 3, 1, 2)
    assert label_upsample(logits, (1, 11)).tolist() == [[[0, 0, 0, 0, 2, 2, 2, 1, 1, 1, 1]]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("size", [(4, 5), (11, 13), (2, 2)], ids=["same-size", "up", "down"])
def test_what_is_not_finite_gives_some_label(value: float, size: tuple[int, int]) -> None:
    logits = noise((1, 5, 4, 5))
    logits[:, ::2] = value
    assert int(label_upsample(logits, size).max()) < 5


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("classes", [1, 3, 300])
def test_the_best_class_is_the_first_of_the_largest(classes: int, order: str) -> None:
    scores = np.random.default_rng(0).integers(0, 3, (classes, 7, 9)).astype(np.float32, order=order)
    best = cpu.best_classes(scores)
    assert np.array_equal(best, scores.argmax(0))
    assert best.dtype == cpu.labels_dtype(classes)


@pytest.mark.parametrize(
    ("source", "size"), [((16, 16), (512, 512)), ((512, 512), (8, 512))], ids=["up", "rows-shrink-sixtyfold"]
)
def test_no_tensor_exceeds_its_share_of_the_strip(
    source: tuple[int, int], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.zeros(1, 8, *source)
    given, largest = logits.untyped_storage().data_ptr(), 0

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != given:
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    budget = 6 * 2**20
    monkeypatch.setattr(reference, "_STRIP_BYTES", budget)
    with Watch():  # type: ignore[no-untyped-call]
        reference.label_upsample(logits, size)
    assert 0 < largest <= budget / 3


def test_takes_logits_that_require_grad() -> None:
    logits = torch.randn(1, 3, 2, 2, requires_grad=True)
    assert not label_upsample(logits, (4, 4)).requires_grad


@pytest.mark.interpreter
@ALIGNMENTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "size", "tile"),
    [
        pytest.param((2, 40, 5, 7), (13, 11), {}, id="odd-sizes-several-tiles-each-way-and-a-batch"),
        pytest.param((1, 5, 6, 6), (6, 6), {}, id="same-size"),
        pytest.param((1, 5, 14, 12), (5, 3), {}, id="smaller-than-the-source"),
        pytest.param((1, 4, 1, 6), (5, 9), {}, id="one-source-row"),
        pytest.param((1, 4, 6, 1), (5, 9), {}, id="one-source-column"),
        pytest.param((1, 4, 1, 1), (3, 5), {}, id="one-source-pixel"),
        pytest.param((1, 4, 6, 5), (1, 9), {}, id="one-target-row"),
        pytest.param((1, 4, 6, 5), (9, 1), {}, id="one-target-column"),
        pytest.param((1, 1, 6, 5), (9, 8), {}, id="one-class"),
        pytest.param((1, 300, 2, 3), (5, 4), {"K": 64}, id="more-classes-than-8-bits"),
        pytest.param((1, 6, 3, 3), (5, 6), {"H": 8, "W": 16, "P": 64, "K": 32}, id="tiles-larger-than-the-map"),
    ],
)
def test_kernel(shape, size, tile, dtype, align_corners):
    logits = noise(shape).to(dtype)
    channels_last = logits.to(memory_format=torch.channels_last)
    strided = torch.zeros(*shape[:3], 2 * shape[3]).to(dtype)
    strided[..., ::2] = logits
    with poisoned():
        labels = kernel.label_upsample(logits, size, tiny(dtype, **tile), align_corners=align_corners)
    assert labels.dtype == (torch.uint8 if shape[1] <= 256 else torch.int32)
    check(logits, size, labels, align_corners)
    for layout in (channels_last, strided[..., ::2]):
        found = kernel.label_upsample(layout, size, tiny(dtype, **tile), align_corners=align_corners)
        assert torch.equal(found, labels)


@pytest.mark.interpreter
@settings(max_examples=25, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 4), st.integers(1, 40), st.booleans(), st.integers(0, 2**16))
def test_kernel_at_any_size(sides, classes, align_corners, seed):
    logits = noise((1, classes, *sides[:2]), seed)
    labels = kernel.label_upsample(logits, sides[2:], tiny(torch.float32), align_corners=align_corners)
    check(logits, sides[2:], labels, align_corners)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@shipped
def test_shipped_configurations(capability, is_regular, dtype):
    logits = noise((1, 70, 4, 9)).to(dtype)
    config = choose(OPS["label_upsample"].configs, logits, is_regular, capability, 132)
    check(logits, (9, 18), kernel.label_upsample(logits, (9, 18), config))


@pytest.mark.interpreter
@pytest.mark.parametrize("first", [3, 14, 20], ids=["in-one-tile", "over-two-tiles", "in-the-last-tile"])
def test_kernel_gives_ties_to_the_lowest_class(first):
    """Two classes are equal in every pixel: wherever one of them wins, it is the lower, in every tile of classes."""
    logits = noise((1, 24, 5, 4), 2)
    logits[:, first : first + 4] = logits[:, first : first + 1] + 1
    labels = kernel.label_upsample(logits, (9, 11), tiny(torch.float32))
    check(logits, (9, 11), labels)
    assert bool((labels == first).any())
    assert not bool(((labels > first) & (labels < first + 4)).any())


@pytest.mark.interpreter
@pytest.mark.parametrize("corner", range(4), ids=["upper-left", "upper-right", "lower-left", "lower-right"])
def test_kernel_sees_that_one_corner_differs(corner):
    """Class 1 is 1 against 0.3 at one corner of four, and wins where its weight is above 0.3: beyond that corner."""
    logits = torch.stack([torch.full((4,), 0.3), torch.zeros(4)]).view(1, 2, 2, 2)
    logits.view(2, 4)[1, corner] = 1
    labels = kernel.label_upsample(logits, (9, 9), tiny(torch.float32))
    assert torch.equal(labels, reference.label_upsample(logits, (9, 9)))
    assert labels.sum() > 1


@pytest.mark.interpreter
@ALIGNMENTS
@pytest.mark.parametrize("winner", [3, 17, 19], ids=["in-the-first-tile", "in-the-last-tile", "last-class"])
def test_kernel_interpolates_nothing_where_the_corners_agree(winner, align_corners, monkeypatch):
    """A class wins in the left half of the source: only tiles that reach beyond it are interpolated. Pixel 15 of 32
    lies at 3.4 or 3.4 of the source: between columns that agree."""
    logits = noise((1, 20, 4, 8))
    logits[:, winner, :, :5] += 10
    run = partial(kernel.label_upsample, logits, (16, 32), tiny(torch.float32), align_corners=align_corners)
    expected = run()
    interpolated = kernel._labels_between
    columns = []

    def spy(image, classes, step, o_y, o_x, *rest):
        columns.append(int(o_x.handle.data.min()))
        return interpolated(image, classes, step, o_y, o_x, *rest)

    monkeypatch.setattr(kernel, "_labels_between", spy)
    assert torch.equal(run(), expected)
    check(logits, (16, 32), expected, align_corners)
    assert sorted(columns) == [x for x in (16, 20, 24, 28) for _ in range(4)]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [8, 13, 16])
def test_kernel_copies_only_what_it_cannot_read_as_it_is(classes, dtype):
    """Classes in rows of 16 with NaN behind them, which may be read and must not win; those that are not aligned, or
    not next to each other, are copied."""
    lanes = 16 // dtype.itemsize
    rows = torch.full((2, 6, 5, 16), torch.nan, dtype=dtype)
    logits = rows[..., :classes].permute(0, 3, 1, 2).copy_(noise((2, classes, 6, 5)))
    assert kernel._in_rows(logits, lanes).data_ptr() == logits.data_ptr()
    labels = kernel.label_upsample(logits, (13, 11), tiny(dtype))
    check(logits, (13, 11), labels)
    unaligned = torch.full((1000,), torch.nan, dtype=dtype).as_strided(logits.shape, logits.stride(), 3).copy_(logits)
    for layout in (logits.contiguous(), unaligned):
        assert kernel._in_rows(layout, lanes).data_ptr() != layout.data_ptr()
        assert torch.equal(kernel.label_upsample(layout, (13, 11), tiny(dtype)), labels)


@pytest.mark.interpreter
def test_kernel_reads_nothing_behind_the_last_row():
    """Ten classes from the eighth on, of rows of 20: a load up to the twelfth class would end behind the memory."""
    memory = torch.zeros(2 * 3 * 20)
    logits = memory.as_strided((1, 10, 2, 3), (120, 1, 60, 20), 8).copy_(noise((1, 10, 2, 3)))
    assert kernel._in_rows(logits, 4).stride(2) == 20
    with loads_stay_within(logits):
        labels = kernel.label_upsample(logits, (5, 7), tiny(torch.float32, K=64))
    check(logits, (5, 7), labels)
    tight = memory[:118].clone().as_strided((1, 10, 2, 3), (120, 1, 60, 20), 8)
    assert tight.untyped_storage().nbytes() == 4 * 118
    assert kernel._in_rows(tight, 4).stride(2) == 12


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@ALIGNMENTS
@SIZES
def test_on_the_gpu(shape, size, memory_format, dtype, align_corners):
    logits = noise(shape).to(dtype).cuda().to(memory_format=memory_format)
    labels = label_upsample(logits, size, align_corners=align_corners)
    check(logits, size, labels, align_corners)
    assert torch.equal(labels, label_upsample(logits, size, align_corners=align_corners))


LOGITS = torch.zeros(1, 2, 3, 3)


@pytest.mark.parametrize(
    ("logits", "size", "error", "message"),
    [
        pytest.param(LOGITS.int(), (4, 4), TypeError, r"logits: .*torch\.int32", id="integer-logits"),
        pytest.param(LOGITS.numpy(), (4, 4), TypeError, "logits: .*ndarray", id="no-tensor"),
        pytest.param(LOGITS[0], (4, 4), ValueError, r"logits: .*\(2, 3, 3\)", id="no-batch-dimension"),
        pytest.param(LOGITS[:, :0], (4, 4), ValueError, r"logits: .*\(1, 0, 3, 3\)", id="no-classes"),
        pytest.param(LOGITS, 4, TypeError, "size: .*got 4", id="size-of-one-number"),
        pytest.param(LOGITS, (4, 4, 4), TypeError, r"size: .*\[4, 4, 4\]", id="size-of-three-numbers"),
        pytest.param(LOGITS, (4.0, 4), TypeError, r"size: .*4\.0", id="size-of-floats"),
        pytest.param(LOGITS, (4, 0), ValueError, r"size: .*\[4, 0\]", id="empty-size"),
    ],
)
def test_wrong_argument_is_named(logits: Tensor, size: tuple[int, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        label_upsample(logits, size)
