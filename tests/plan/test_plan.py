"""The plan as data."""

import json
from typing import Any

import pytest

from agln_fast.errors import ConfigError
from agln_fast.plan.plan import ALGEBRA, NO_PLAN, Plan


@pytest.mark.parametrize(
    "plan",
    [NO_PLAN, ALGEBRA, Plan(fold_batchnorm=True, mix_before_upsample=("full", "rows", "none"), winograd=2)],
    ids=str,
)
def test_json_keeps_a_plan(plan: Plan) -> None:
    assert Plan.from_json(plan.to_json()) == plan
    assert hash(Plan.from_json(plan.to_json())) == hash(plan)


def test_what_is_left_out_is_off() -> None:
    assert Plan.from_json('{"fold_batchnorm": true}') == Plan(fold_batchnorm=True)


def test_a_plan_in_words() -> None:
    assert str(NO_PLAN) == "none"
    plan = Plan(fold_batchnorm=True, negate_energy=True, mix_before_upsample=("full", "none", "none"), winograd=1)
    assert str(plan) == "fold_batchnorm, negate_energy, mix_before_upsample(full, none, none), winograd(1)"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "a JSON object"),
        ({"fold_batchnorms": True}, "unknown rewrite 'fold_batchnorms'.*fold_batchnorm"),
        ({"fold_batchnorm": 1}, "must be true or false"),
        ({"mix_before_upsample": "full"}, "give a list"),
        ({"mix_before_upsample": [["full"], [], {}]}, "give a list of 3"),
        ({"fold_batchnorm": True, "mix_before_upsample": ["full"]}, "give a list of 3 of none, rows, full"),
        (
            {"fold_batchnorm": True, "mix_before_upsample": ["full", "x", "none"]},
            "give a list of 3 of none, rows, full",
        ),
        ({"winograd": 5}, "winograd 5: give a number of stages, 0 to 4"),
        ({"winograd": True}, "winograd True: give a number"),
        ({"mix_before_upsample": ["full", "none", "none"]}, "needs fold_batchnorm"),
    ],
)
def test_what_is_no_plan(values: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Plan.from_json(json.dumps(values))


def test_what_is_no_json() -> None:
    with pytest.raises(ConfigError, match="not a plan"):
        Plan.from_json("{")
