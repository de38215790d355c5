"""One plan for all points, the smallest first, and what would take too long is told."""

from __future__ import annotations

import pytest
from synthetic_rows import row

from agln_fast.bench.race import cases, scaling
from agln_fast.bench.race.measure import Case, Entry, Measured, Options
from agln_fast.bench.race.scaling import scale
from agln_fast.errors import BackendError, ConfigError
from agln_fast.plan.plan import NO_PLAN, Plan

BASE = Case("fpn_nano", (64, 64), 1, 5)
QUICK = Options(threads=1, warmup=0, iters=3)
ENTRIES = [Entry("openvino", "fp32")]


@pytest.fixture
def measured(monkeypatch):
    """What was measured, by a clock that stands still but for it: a second for each 64x64 image."""
    seen, now = [], [0.0]

    def measure(cases, entries, options, progress):
        (case,) = cases
        seen.append((case, entries, options))
        now[0] += scaling._pixels(case) / 64**2
        if case.batch == 4:
            raise BackendError("no memory")
        size = f"{case.size[0]}x{case.size[1]}"
        return Measured((row(1.0, size=size, batch=case.batch),), ("tensorrt fp32: no GPU",))

    monkeypatch.setattr(scaling, "measure", measure)
    monkeypatch.setattr(scaling.time, "monotonic", lambda: now[0])
    return seen


def test_points_come_smallest_first_and_each_once(measured):
    found = scale(BASE, ENTRIES, QUICK, sides=(128, 64), batches=(2, 1, 4))
    points = [(case.size[0], case.batch) for case, _, _ in measured]
    assert points == [(64, 1), (64, 2), (128, 1), (64, 4)]
    assert len(found.rows) == 3
    assert found.left_out == ("tensorrt fp32: no GPU", "fpn_nano 64x64 batch 4, 5 classes: no memory")
    assert all(not (options.frames or options.memory or options.accuracy) for _, _, options in measured)
    assert all(options.budget_s is None for _, _, options in measured)


def test_the_budget_leaves_out_what_would_take_longer(measured):
    found = scale(BASE, ENTRIES, Options(budget_s=6.5), sides=(64, 128, 256), batches=(1, 2))
    # 1 + 2 + 4 s would be 7: after 3 s, 3.5 are left, and 4 and 16 are too many.
    assert [(r.size, r.batch) for r in found.rows] == [("64x64", 1), ("64x64", 2)]
    assert [options.budget_s for _, _, options in measured] == [6.5, 5.5]
    assert sum("longer than what is left of 6 s" in line or "left of 7 s" in line for line in found.left_out) == 2


def test_the_plan_is_chosen_once(measured, monkeypatch):
    plan, asked = Plan(fold_batchnorm=True), []
    monkeypatch.setattr(scaling, "best_plan", lambda *arguments: asked.append(arguments[1:3]) or plan)
    entries = [
        Entry("planned openvino", "bf16"),
        Entry("planned fused", "fp32"),
        Entry("planned openvino", "fp32", NO_PLAN),
    ]
    scale(BASE, [*entries, *ENTRIES], QUICK, sides=(64, 128), batches=())
    assert asked == [("openvino", "bf16")]
    for _, used, _ in measured:
        assert [entry.plan for entry in used] == [plan, None, NO_PLAN, None]


def test_scaling_for_real():
    found = scale(BASE, [Entry("planned onnxruntime", "fp32")], QUICK, sides=(64, 256), batches=())
    small, large = found.rows
    assert small.plan == large.plan != ""
    assert small.median_ms * 16**0.3 < large.median_ms < small.median_ms * 16**1.7


def test_the_fastest_that_is_not_calibrated_anew_at_every_point(measured, monkeypatch):
    case, chosen = Case("agln_nano", (64, 64), 1, 5), []
    same = {"network": "agln_nano", "size": "64x64", "num_classes": 5}
    rows = [row(9.0, **same), row(5.0, contestant="quick", precision="bf16", **same)]
    rows += [row(1.0, precision="int8", **same), row(1.0, **same | {"num_classes": 6})]
    monkeypatch.setattr(cases, "scale", lambda case, entries, options, progress: chosen.extend(entries))
    cases.measure_scaling(rows, [case], QUICK)
    assert chosen == [Entry("quick", "bf16")]
    told = cases.measure_scaling(rows[2:], [case], QUICK)
    assert told == Measured((), ("scaling: nothing of agln_nano could be measured",))


def test_nothing_to_scale(measured):
    with pytest.raises(ConfigError, match="at least two"):
        scale(BASE, ENTRIES, QUICK, sides=(64,), batches=(1,))
    with pytest.raises(BackendError, match=r"nothing could be scaled: .*no memory"):
        scale(Case("fpn_nano", (64, 64), 4, 5), ENTRIES, QUICK, sides=(64, 128), batches=())
