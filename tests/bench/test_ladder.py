"""Rungs add one rewrite each, and end at the plan itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agln_fast.bench.race.ladder import best_plan, cumulative, default_rungs, ladder
from agln_fast.bench.race.measure import Case, Entry, Options
from agln_fast.errors import ConfigError
from agln_fast.plan.plan import ALGEBRA, NO_PLAN, Plan

CASE = Case("agln_nano", (64, 64), 1, 5)
FOLD = Plan(fold_batchnorm=True)
WHOLE = replace(FOLD, negate_energy=True, mix_before_upsample=("rows", "none", "full"))
QUICK = Options(threads=1, warmup=0, iters=3, frames=1, memory=False, accuracy=False)


def test_each_step_adds_one_rewrite():
    assert cumulative(WHOLE) == [
        ("fold_batchnorm", FOLD),
        ("negate_energy", replace(FOLD, negate_energy=True)),
        ("mix_before_upsample(rows, none, full)", WHOLE),
    ]
    assert cumulative(NO_PLAN) == []


def test_default_rungs():
    rungs = default_rungs(WHOLE, "torch")
    assert [(rung.contestant, rung.precision, rung.title) for rung in rungs] == [
        ("torch", "fp32", "torch, best peer"),
        ("planned openvino", "fp32", "fold_batchnorm"),
        ("planned openvino", "fp32", "negate_energy"),
        ("planned openvino", "fp32", "mix_before_upsample(rows, none, full)"),
    ]
    assert rungs[0].plan is None
    assert rungs[-1].plan == WHOLE
    assert {rung.precision for rung in default_rungs(WHOLE, precision="bf16")} == {"bf16"}


def test_rows_of_the_rungs():
    rungs = default_rungs(FOLD, "onnxruntime", "planned onnxruntime")
    peer, fold = ladder(CASE, rungs, QUICK).rows
    assert (peer.contestant, peer.plan, peer.ratio) == ("onnxruntime, best peer", "", 1)
    assert (fold.contestant, fold.plan) == ("fold_batchnorm", "fold_batchnorm")
    assert fold.agreement >= 0.999


def test_best_plan_is_that_of_the_options():
    assert best_plan(CASE, options=replace(QUICK, plan=WHOLE)) == WHOLE
    found = best_plan(CASE)
    assert all(getattr(found, name) for name, value in ALGEBRA.to_dict().items() if value is True)


@pytest.mark.parametrize("rungs", [[], [Entry("torch", "fp32")], [Entry("torch", "fp32")] * 2])
def test_no_ladder(rungs):
    with pytest.raises(ConfigError, match="at least two rungs"):
        ladder(CASE, rungs)
