"""Each op, as AGLN calls it, in each case (what its variants change, batch, side of the map, dtype), by contestants.

`eager` is the plain operations of PyTorch, `compile` torch.compile of them, `op` the op itself: see
`agln_fast.bench.kernels.calls`. On CUDA the time is the device's, the median of many
(`agln_fast.bench.kernels.timing`); what pytest-benchmark itself shows are a few calls by the host's clock. The medians,
and how close to its bound each comes, are in `extra_info`, and in the file that `--rows` names.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from agln_fast import kernels
from agln_fast.bench.kernels.calls import CALLS, Case
from agln_fast.bench.kernels.report import DEVICE_LOST, Report, describe, device_is_lost
from agln_fast.bench.kernels.roofline import Roofline, measure_roofline
from agln_fast.bench.kernels.timing import device_times
from agln_fast.engines.torch_network import exact_float32
from agln_fast.machine import machine

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
GENERATOR = torch.Generator(DEVICE).manual_seed(0)  # the default one is of no use after a capture that failed
DTYPES = (torch.float16, torch.bfloat16) if CUDA else (torch.float32,)
REPEATS = 100 if CUDA else 5
TOLERANCE = 0.05  # of an op, to float32: loose enough for half precision; the tests prove the rest

_started = time.monotonic()


def _id(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={change}" for key, change in value.items())
    return str(value).removeprefix("torch.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """What tells most comes first, in case the time is over before the end; what is slow to prepare comes last."""
    contestants = ["eager", "op"]
    if CUDA or metafunc.config.getoption("compile", None):
        contestants.append("compile")
    variants = [(op, changes) for op, call in CALLS.items() for changes in call.variants]
    sides, batches = ([128, 60, 120, 30], [1, 8]) if CUDA else ([30], [1])
    # What comes first varies slowest.
    order = itertools.product(DTYPES, sides, batches, variants, contestants)
    cases = [(op, changes, batch, side, dtype, who) for dtype, side, batch, (op, changes), who in order]
    cases.sort(key=lambda case: case[-1] == "compile")
    metafunc.parametrize(("op", "changes", "batch", "side", "dtype", "contestant"), cases, ids=_id)


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    return Report(pytestconfig.getoption("rows", None), machine=machine())


@pytest.fixture(scope="session")
def roofline(report: Report) -> Roofline:
    if "roofline" not in report.facts:
        report.facts["roofline"] = asdict(measure_roofline(DEVICE, DTYPES))
        report.write()
    return Roofline(**report.facts["roofline"])


@pytest.fixture
def case(batch: int, side: int, dtype: torch.dtype, changes: dict[str, Any]) -> Case:
    return replace(Case(batch, side, dtype, DEVICE, generator=GENERATOR), **changes)


@pytest.fixture
def row(
    op: str, case: Case, changes: dict[str, Any], contestant: str, request: pytest.FixtureRequest, report: Report
) -> Iterator[dict[str, Any]]:
    """What the report says of this test: written before it starts as one that never ended, and after it as it did."""
    dtype = _id(case.dtype)
    name = " ".join([op, dtype, f"{case.batch}x{case.side}x{case.side}", _id(changes)]).rstrip()
    sizes = {"dtype": dtype, "batch": case.batch, "side": case.side}
    row = {"case": name, "contestant": contestant, "op": op, **sizes, **changes}
    if report.row(name, contestant) is not None:
        pytest.skip("it stands in the report already")
    budget = request.config.getoption("budget", None)
    if budget is not None and time.monotonic() - _started > budget:
        report.put({**row, "left_out": "the time was over"})
        pytest.skip("the time is over")
    row["error"] = "it ended before anything was measured"
    report.put(row)
    yield row
    report.put(row)
    if "error" in row and device_is_lost():
        pytest.exit("the device is lost: call again with the same --rows to go on with the rest", DEVICE_LOST)


def test_kernels(op: str, case: Case, contestant: str, row: dict[str, Any], roofline: Roofline, benchmark: Any) -> None:
    """Run the contestant, compare it with float32, time it."""
    benchmark.group = row["case"]
    try:
        with torch.inference_mode(), exact_float32(benchmark=True):
            run = _measure(op, case, contestant, row, roofline)
            del row["error"]
            benchmark.extra_info.update(row)
            benchmark.pedantic(run, rounds=3)
    except Exception as error:
        row["error"] = describe(error)
        raise


def _measure(op: str, case: Case, contestant: str, row: dict[str, Any], roofline: Roofline) -> Any:
    call = CALLS[op]
    arguments, keywords = call.arguments(case), call.keywords(case)
    function = getattr(kernels, op) if contestant == "op" else call.eager
    if contestant == "compile":
        torch.compiler.reset()
        function = torch.compile(call.eager, dynamic=False)
    function = partial(function, **keywords)
    results = _tensors(function(*arguments))
    exact = _tensors(call.eager(*tree_map_only(Tensor, Tensor.float, arguments), **keywords))
    row["deviation"] = max(_deviation(*pair) for pair in zip(results, exact, strict=True))
    assert row["deviation"] < TOLERANCE or contestant != "op"
    times = device_times(lambda: function(*arguments), DEVICE, repeats=REPEATS)
    row["median_us"], row["timing"] = times.median, times.how
    row["bytes"] = sum(tensor.nbytes for tensor in (*_tensors(arguments), *results))
    row["multiply_adds"] = call.multiply_adds(*arguments)
    row["bound_us"] = roofline.bound_us(row["bytes"], row["multiply_adds"], case.dtype)
    row["fraction"] = row["bound_us"] / times.median
    return partial(_synchronised, function, arguments)


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _deviation(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖; of labels, the share of pixels that differ."""
    if not exact.is_floating_point():
        return (actual != exact).float().mean().item()
    return ((actual.float() - exact).norm() / exact.norm()).item()


def _synchronised(function: Any, arguments: tuple[Any, ...]) -> None:
    function(*arguments)
    if CUDA:
        torch.cuda.synchronize()
