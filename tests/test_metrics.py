"""Metrics against cases that were counted by hand, and against the plainest of loops."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from agln_fast.errors import ConfigError, MissingPackageError
from agln_fast.metrics import SegmentationMetrics


def _counted(labels, truth, num_classes=3, **options) -> SegmentationMetrics:
    metrics = SegmentationMetrics(num_classes, **options)
    metrics.update(np.array(labels), np.array(truth))
    return metrics


def test_a_case_counted_by_hand():
    """Truth 0 0 0 1 1 2, labels 0 0 1 1 2 2."""
    metrics = _counted([[0, 0, 1], [1, 2, 2]], [[0, 0, 0], [1, 1, 2]])
    assert metrics.matrix.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    assert metrics.matrix.dtype == np.int64
    assert metrics.iou.tolist() == [2 / 3, 1 / 3, 1 / 2]
    assert metrics.accuracy.tolist() == [2 / 3, 1 / 2, 1]
    assert metrics.share.tolist() == [3 / 6, 2 / 6, 1 / 6]
    assert metrics.mean_iou == pytest.approx(1 / 2, abs=1e-15)
    assert metrics.mean_accuracy == pytest.approx(13 / 18, abs=1e-15)
    assert metrics.pixel_accuracy == 4 / 6


def test_ignored_pixels_count_nowhere():
    """The third and fourth pixel are ignored, one labelled like its neighbours, one with a class seen nowhere else."""
    metrics = _counted([0, 1, 1, 2], [0, 1, 255, 255])
    assert metrics.matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert metrics.mean_iou == metrics.pixel_accuracy == 1
    assert math.isnan(metrics.iou[2])


def test_another_id_may_be_the_ignored_one():
    metrics = _counted([0, 1], [0, -1], ignore_index=-1)
    assert metrics.matrix.sum() == 1


def test_a_class_in_neither_is_left_out_of_the_mean():
    metrics = _counted([0, 0, 1, 1], [0, 0, 1, 0], num_classes=4)
    np.testing.assert_array_equal(metrics.iou, [2 / 3, 1 / 2, np.nan, np.nan])
    assert metrics.mean_iou == pytest.approx(7 / 12, abs=1e-15)


def test_a_class_that_is_never_predicted_counts_as_zero():
    metrics = _counted([0, 0, 0, 0], [0, 0, 0, 1], num_classes=2)
    assert metrics.iou.tolist() == [3 / 4, 0]
    assert metrics.mean_iou == 3 / 8
    assert metrics.mean_accuracy == 1 / 2


def test_a_class_that_is_only_predicted_has_no_accuracy_but_an_iou_of_zero():
    metrics = _counted([0, 1], [0, 0], num_classes=2)
    assert metrics.iou.tolist() == [1 / 2, 0]
    np.testing.assert_array_equal(metrics.accuracy, [1 / 2, np.nan])
    assert metrics.mean_accuracy == 1 / 2


def test_perfect():
    metrics = _counted([0, 1, 2, 2], [0, 1, 2, 2])
    assert metrics.iou.tolist() == metrics.accuracy.tolist() == [1, 1, 1]
    assert metrics.mean_iou == metrics.mean_accuracy == metrics.pixel_accuracy == 1


@pytest.mark.parametrize("truth", [[], [255, 255]], ids=["no pixel", "all ignored"])
def test_nothing_counted_is_nan_and_no_warning(truth, recwarn):
    metrics = _counted(np.zeros(len(truth), np.uint8), np.array(truth, np.uint8))
    for number in (metrics.mean_iou, metrics.mean_accuracy, metrics.pixel_accuracy, *metrics.share, *metrics.iou):
        assert math.isnan(number)
    assert not recwarn.list


def test_one_class_is_enough():
    assert _counted([0, 0], [0, 255], num_classes=1).mean_iou == 1


def test_tensors_arrays_and_lists_count_alike():
    labels, truth = [[0, 1], [2, 2]], [[0, 1], [1, 255]]
    expected = _counted(labels, truth).matrix
    frozen = np.array(labels, np.int32)
    frozen.flags.writeable = False
    for a, b in (
        (torch.tensor(labels, dtype=torch.int32), torch.tensor(truth, dtype=torch.uint8)),
        (frozen, np.array(truth, np.uint8)),
        (np.array(labels, np.uint8)[:, ::-1], np.array(truth, np.uint16)[:, ::-1]),
        (labels, torch.tensor(truth)),
    ):
        metrics = SegmentationMetrics(3)
        metrics.update(a, b)
        assert np.array_equal(metrics.matrix, expected)


def test_more_than_256_classes():
    metrics = SegmentationMetrics(300, ignore_index=-1)
    metrics.update(np.array([299, 255], np.int32), np.array([299, 298], np.int32))
    assert metrics.matrix[299, 299] == metrics.matrix[298, 255] == 1


@pytest.mark.parametrize(
    ("labels", "truth", "message"),
    [
        ([0, 3], [0, 0], "class id 3 in the labels: there are 3 classes"),
        ([0, -1], [0, 0], "class id -1 in the labels"),
        ([0, 255], [0, 255], "class id 255 in the labels"),
        ([0, 0], [0, 3], "class id 3 in the ground truth"),
        ([0, 0], [0, -1], "class id -1 in the ground truth"),
        ([0, 0], [[0, 0]], r"labels \(2,\), ground truth \(1, 2\): must be equal"),
        ([0.0, 1.0], [0, 0], "labels: needs class ids of an integer type, got float64"),
        ([True, False], [0, 0], "labels: needs class ids of an integer type, got bool"),
    ],
    ids=str,
)
def test_what_cannot_be_counted_is_refused(labels, truth, message):
    metrics = SegmentationMetrics(3)
    with pytest.raises(ConfigError, match=message):
        metrics.update(np.array(labels), np.array(truth))
    assert metrics.matrix.sum() == 0


@pytest.mark.parametrize(("num_classes", "ignored"), [(0, 255), (256, 255), (3, 0)])
def test_impossible_settings(num_classes, ignored):
    with pytest.raises(ConfigError, match=f"{num_classes} classes, ignored is {ignored}"):
        SegmentationMetrics(num_classes, ignore_index=ignored)


def test_a_matrix_to_count_on_from():
    start = _counted([0, 1, 2], [0, 0, 2])
    for matrix in (start.matrix, torch.from_numpy(start.matrix)):
        metrics = SegmentationMetrics(3, matrix=matrix)
        metrics.update(np.array([1]), np.array([2]))
        assert metrics.matrix.tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 1]]
    with pytest.raises(ConfigError, match="must be 3 x 3"):
        SegmentationMetrics(3, matrix=np.zeros((2, 2), int))


def test_merging_needs_equal_classes():
    with pytest.raises(ConfigError, match="metrics of 4 and of 3 classes"):
        SegmentationMetrics(3).merge(SegmentationMetrics(4))


def test_without_torchmetrics(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.classification", None)
    with pytest.raises(MissingPackageError, match=r'package "torchmetrics" .*agln-fast\[eval\]'):
        SegmentationMetrics(3)


_PIXELS = 24


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.uint8, _PIXELS, elements=st.integers(0, 3)),
    arrays(np.uint8, _PIXELS, elements=st.sampled_from([0, 1, 2, 3, 255])),
    st.integers(0, _PIXELS),
)
def test_loops_and_merged_parts_give_the_same(labels, truth, cut):
    whole, first, second = (SegmentationMetrics(4) for _ in range(3))
    whole.update(labels, truth)
    first.update(labels[:cut], truth[:cut])
    second.update(labels[cut:], truth[cut:])
    first.merge(second)
    assert np.array_equal(first.matrix, whole.matrix)
    ious, right, counted = [], 0, 0
    for k in range(4):
        pairs = [(label == k, true == k) for label, true in zip(labels, truth, strict=True) if true != 255]
        union = sum(a or b for a, b in pairs)
        if union:
            ious.append(sum(a and b for a, b in pairs) / union)
        right += sum(a and b for a, b in pairs)
        counted = len(pairs)
    if counted:
        # A mean of at most four numbers up to 1, summed in another order.
        assert whole.mean_iou == pytest.approx(sum(ious) / len(ious), abs=4 * sys.float_info.epsilon)
        assert whole.pixel_accuracy == right / counted
    else:
        assert math.isnan(whole.mean_iou)
