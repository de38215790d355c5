"""Benchmarks: `pytest bench --benchmark-only`, files named `bench_*.py`: one for each op, and `bench_networks.py`.

An op's file says what its op is compared with and how many multiply-adds it does. Here that becomes one test for each
case (batch, side of the map, dtype) and contestant: `eager`, the plain operations of PyTorch; `compile`, torch.compile
of them; `op`. On CUDA the time is the device's, the median of many (`agln_fast.bench.race.timing`); what
pytest-benchmark itself shows are a few calls by the host's clock. The medians, and how close to its bound each comes,
are in `extra_info`, and in the file that `--rows` names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from agln_fast.bench.kernels.roofline import Roofline, measure_roofline
from agln_fast.bench.race.report import DEVICE_LOST, Report, describe, device_is_lost
from agln_fast.bench.race.timing import device_times
from agln_fast.engines.torch_network import exact_float32
from agln_fast.machine import machine

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
GENERATOR = torch.Generator(DEVICE).manual_seed(0)  # the default one is of no use after a capture that failed
DTYPES = (torch.float16, torch.bfloat16) if CUDA else (torch.float32,)
REPEATS = 100 if CUDA else 5
TOLERANCE = 0.05  # of an op, to float32: loose enough for half precision; the tests prove the rest

_started = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    # pytest knows them only where it is called with this very folder, or a file in it.
    group = parser.getgroup("kernels")
    group.addoption(
        "--rows", type=Path, metavar="FILE", help="write the results here, after each test; go on if it is there"
    )
    group.addoption("--budget", type=float, metavar="SECONDS", help="skip the tests that come later than this")
    group.addoption("--compile", action="store_true", help="measure torch.compile on a CPU, too")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measure" not in metafunc.fixturenames:
        return
    contestants = ["eager", "op"]
    if CUDA or metafunc.config.getoption("compile", None):
        contestants.append("compile")
    metafunc.parametrize("contestant", contestants)
    metafunc.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
    metafunc.parametrize("side", [120, 128, 60, 30] if CUDA else [30])
    metafunc.parametrize("batch", [8, 1] if CUDA else [1])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is slow to prepare comes last, and float16 first, in case the time is over before the end."""

    def rank(item: pytest.Item) -> tuple[bool, int]:
        if not (isinstance(item, pytest.Function) and "measure" in item.fixturenames):
            return False, 0
        return item.callspec.params["contestant"] == "compile", DTYPES.index(item.callspec.params["dtype"])

    items.sort(key=rank)


@dataclass(frozen=True)
class Case:
    """What one test measures, and fresh random data for it."""

    batch: int
    side: int
    dtype: torch.dtype

    def map(self, channels: int) -> Tensor:
        """(B, channels, side, side), channels_last."""
        size = (self.batch, channels, self.side, self.side)
        values = torch.randn(size, device=DEVICE, generator=GENERATOR).to(self.dtype)
        return values.contiguous(memory_format=torch.channels_last)

    def weight(self, *shape: int) -> Tensor:
        """Such that sums over all dimensions but the first have variance 1."""
        values = torch.randn(shape, device=DEVICE, generator=GENERATOR)
        return (values / max(1, values[0].numel()) ** 0.5).to(self.dtype)


@pytest.fixture
def case(batch: int, side: int, dtype: torch.dtype) -> Case:
    return Case(batch, side, dtype)


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
def row(contestant: str, request: pytest.FixtureRequest, report: Report) -> Iterator[dict[str, Any]]:
    """What the report says of this test: written before it starts as one that never ended, and after it as it did."""
    parameters = dict(request.node.callspec.params)
    batch, side, dtype = parameters["batch"], parameters["side"], str(parameters["dtype"]).removeprefix("torch.")
    others = {key: value for key, value in parameters.items() if key not in ("batch", "side", "dtype", "contestant")}
    op = request.function.__name__.removeprefix("test_")
    name = " ".join([op, dtype, f"{batch}x{side}x{side}", *(f"{key}={value}" for key, value in sorted(others.items()))])
    row = {"case": name, "contestant": contestant, "op": op, "dtype": dtype, "batch": batch, "side": side, **others}
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


@pytest.fixture
def measure(row: dict[str, Any], roofline: Roofline, dtype: torch.dtype, benchmark: Any) -> Callable[..., None]:
    """`measure(op, eager, arguments, multiply_adds)`: run the contestant, compare it with float32, time it."""

    def _measure(op: Any, eager: Any, arguments: tuple[Any, ...], multiply_adds: int) -> None:
        benchmark.group = row["case"]
        function = op if row["contestant"] == "op" else eager
        if row["contestant"] == "compile":
            torch.compiler.reset()
            function = torch.compile(eager, dynamic=False)
        results = _tensors(function(*arguments))
        exact = _tensors(eager(*(_float32(argument) for argument in arguments)))
        row["deviation"] = max(_deviation(*pair) for pair in zip(results, exact, strict=True))
        assert row["deviation"] < TOLERANCE or row["contestant"] != "op"
        times = device_times(lambda: function(*arguments), DEVICE, repeats=REPEATS)
        row["median_us"], row["timing"] = times.median, times.how
        row["bytes"] = sum(tensor.nbytes for tensor in (*_tensors(arguments), *results))
        row["multiply_adds"] = multiply_adds
        row["bound_us"] = roofline.bound_us(row["bytes"], multiply_adds, dtype)
        row["fraction"] = row["bound_us"] / times.median
        del row["error"]
        benchmark.extra_info.update(row)
        benchmark.pedantic(_synchronised, (function, arguments), rounds=3)

    def _recorded(*args: Any, **kwargs: Any) -> None:
        try:
            with torch.inference_mode(), exact_float32(benchmark=True):
                _measure(*args, **kwargs)
        except Exception as error:
            row["error"] = describe(error)
            raise

    return _recorded


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in (values if isinstance(values, tuple) else (values,)) if isinstance(value, Tensor)]


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value


def _deviation(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖; of labels, the share of pixels that differ."""
    if not exact.is_floating_point():
        return (actual != exact).float().mean().item()
    return ((actual.float() - exact).norm() / exact.norm()).item()


def _synchronised(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    function(*arguments)
    if CUDA:
        torch.cuda.synchronize()
