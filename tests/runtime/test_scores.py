"""Scores of classes against PyTorch in float64, and by definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agln_fast.decode import best_classes
from agln_fast.runtime import scores
from agln_fast.runtime.scores import classes_of, lead, on_host, resized, softmax, strips


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize("align_corners", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("strip_bytes", [1, 2**19], ids=["strips of a row", "one strip"])
@pytest.mark.parametrize("size", [(9, 7), (31, 20), (3, 4), (1, 1), (1, 40), (40, 1)], ids=str)
@pytest.mark.parametrize("source", [(9, 7), (1, 5), (6, 1), (1, 1)], ids=str)
def test_resized_as_by_pytorch(source, size, strip_bytes, align_corners, monkeypatch):
    """Positions of at most 9 in float32 move a value by 9 * eps times the difference of neighbours, at most 8."""
    monkeypatch.setattr(scores, "_STRIP_BYTES", strip_bytes)
    logits = _noise(5, *source)
    wide = torch.from_numpy(logits).double()[None]
    exact = F.interpolate(wide, size, mode="bilinear", align_corners=align_corners)[0]
    got = list(resized(logits, size, align_corners=align_corners))
    assert len(got) == (size[0] if strip_bytes == 1 else 1)
    np.testing.assert_allclose(np.concatenate(got, 1), exact.numpy(), atol=2 * 9 * 8 * np.finfo(np.float32).eps, rtol=0)


def test_strips_are_the_rows(monkeypatch):
    monkeypatch.setattr(scores, "_STRIP_BYTES", 4 * 5 * 7 * 2)
    values = _noise(5, 9, 7)
    assert [strip.shape[1] for strip in strips(values)] == [2, 2, 2, 2, 1]
    assert np.array_equal(np.concatenate(list(strips(values)), 1), values)


@pytest.mark.parametrize("classes", [2, 3, 9])
def test_the_lead_is_the_largest_minus_the_next(classes):
    values = np.random.default_rng(0).integers(0, 5, (classes, 8, 6)).astype(np.float32)
    ordered = np.sort(values, 0)
    assert np.array_equal(lead(values), ordered[-1] - ordered[-2])


def test_a_single_class_has_no_lead():
    assert not lead(_noise(1, 3, 4)).any()


def test_softmax_is_that_of_pytorch_and_does_not_overflow():
    values = 200 * _noise(6, 4, 5)
    exact = torch.from_numpy(values).double().softmax(0).numpy()
    np.testing.assert_allclose(softmax(values), exact, atol=1e-6)  # a few roundings of numbers up to 1


@pytest.mark.parametrize("size", [(9, 7), (31, 20), (3, 4), (1, 40)], ids=str)
def test_tensors_are_computed_with_as_arrays(size, monkeypatch):
    """Each multiplication and sum is the same one; of a softmax the exponential is the library's own."""
    monkeypatch.setattr(scores, "_DEVICE_STRIP_BYTES", 4 * 5 * 7 * 2)
    logits = _noise(5, 9, 7)
    expected, tensors = list(resized(logits, size)), list(resized(torch.from_numpy(logits), size))
    assert all(isinstance(strip, torch.Tensor) for strip in tensors)
    assert tensors[0].shape[1] == min(size[0], max(1, 14 // size[1]))
    array, tensor = np.concatenate(expected, 1), torch.cat(tensors, 1)
    assert np.array_equal(tensor.numpy(), array)
    assert np.array_equal(on_host(lead(tensor)), lead(array))
    np.testing.assert_allclose(softmax(tensor).numpy(), softmax(array), atol=1e-6)


@pytest.mark.parametrize("classes", [1, 3, 256, 300])
def test_classes_of_tensors_are_those_of_arrays(classes):
    """Ties go to the lowest class; integers make many."""
    values = np.random.default_rng(0).integers(0, 4, (classes, 8, 6)).astype(np.float32)
    labels = classes_of(torch.from_numpy(values))
    assert labels.dtype == best_classes(values).dtype
    assert np.array_equal(labels, best_classes(values))
    assert np.array_equal(classes_of(values), labels)
