"""Times are those of the device, a report outlives the process that writes it, and ceilings are plausible."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from agln_fast.bench.kernels.report import Report, describe
from agln_fast.bench.kernels.roofline import Roofline, measure_roofline
from agln_fast.bench.kernels.table import kernel_table, main, to_markdown
from agln_fast.bench.kernels.timing import device_times
from agln_fast.errors import ConfigError
from agln_fast.kernels.registration import OPS

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_host_times_count_what_the_function_takes_and_not_its_warm_up(monkeypatch):
    """By a clock that only moves while the function runs: 200 ms the first time, then 2 ms."""
    calls, now = [], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def function():
        calls.append(None)
        now[0] += 0.2 if len(calls) == 1 else 0.002

    times = device_times(function, CPU, repeats=5)
    assert times.how == "host"
    assert times.microseconds == pytest.approx([2000] * 5)


@pytest.mark.gpu
def test_device_times_replay_a_graph_and_fall_back_to_calls():
    device = torch.device("cuda")
    x = torch.randn(2**26, device=device)
    times = device_times(lambda: x + 1, device, repeats=20)
    assert times.how == "graph"
    twice = device_times(lambda: x + 1 + x, device, repeats=20)
    assert twice.median > 1.3 * times.median

    def refuses():
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in a graph")
        return x + 1

    calls = device_times(refuses, device, repeats=20)
    assert calls.how == "calls"
    assert calls.median > 0.8 * times.median
    assert device_times(lambda: x + 1, device, repeats=20).how == "graph"


@pytest.mark.gpu
def test_ceilings_of_the_gpu():
    roofline = measure_roofline(torch.device("cuda"), [torch.float16])
    assert roofline.bytes_per_second > 1e11
    assert roofline.flops_per_second["float16"] > 1e12
    assert roofline.launch_us < 100


def test_ceilings_of_this_processor():
    roofline = measure_roofline(CPU, [torch.float32])
    assert 1e7 < roofline.bytes_per_second < 1e13
    assert 1e7 < roofline.flops_per_second["float32"] < 1e15


def test_bound_is_the_larger_of_both_ceilings():
    roofline = Roofline(4e12, {"float16": 8e14}, 2.0)
    assert roofline.bound_us(8_000_000, 1, torch.float16) == pytest.approx(2.0)
    assert roofline.bound_us(1, 800_000_000, torch.float16) == pytest.approx(2.0)


def test_report_goes_on_where_the_last_process_ended(tmp_path):
    path = tmp_path / "rows.json"
    first = Report(path, machine="a")
    first.put({"case": "x", "contestant": "op", "error": "it never ended"})
    first.put({"case": "x", "contestant": "eager", "left_out": "no time"})
    first.put({"case": "y", "contestant": "op", "median_us": 1})
    second = Report(path, machine="b")
    assert second.facts == {"machine": "a"}
    assert second.row("x", "op") == {"case": "x", "contestant": "op", "error": "it never ended"}
    assert second.row("x", "eager") is None
    second.put({"case": "x", "contestant": "op", "median_us": 2})
    assert [row.get("median_us") for row in json.loads(path.read_text())["rows"]] == [2, None, 1]
    assert list(tmp_path.iterdir()) == [path]


def test_error_is_described_with_its_place():
    try:
        Report(Path(__file__))
    except ValueError as error:
        text = describe(error)
    assert text.startswith("JSONDecodeError: ")
    assert "json" in text.splitlines()[-2]


def _kernel(contestant, median_us, batch=8, **more):
    row = {
        "case": f"pool batch {batch}",
        "op": "pool",
        "batch": batch,
        "contestant": contestant,
        "median_us": median_us,
    }
    return row | {"bound_us": 5.0, "fraction": 5.0 / median_us, "timing": "graph"} | more


def test_kernel_table():
    rows = [_kernel("eager", 40.0), _kernel("op", 10.0), _kernel("op", 6.0, batch=1, timing="calls")]
    rows += [
        {"case": "pool batch 8", "contestant": "compile", "error": "RuntimeError: no\nline 3"},
        {"case": "pool batch 1", "contestant": "compile", "left_out": "the time was over"},
    ]
    assert kernel_table(rows, launch_us=2.0).splitlines() == [
        "µs              eager  compile       op    bound",
        "pool batch 8     40.0        –     10.0      5.0  50%",
        "pool batch 1        –        –      6.0      5.0  83%",
        "pool: 50 to 50 % of the bound at larger batches, 3.0 to 3.0 launches at batch 1",
        "1 timed without a graph: gaps between launches count",
        "1 left out, the time was over: compile",
        "FAILED pool batch 8 compile: RuntimeError: no",
    ]


def test_missing_file_is_a_failure(tmp_path, capsys):
    assert main([str(tmp_path / "kernels.json")]) == 1
    assert "nothing was measured" in capsys.readouterr().out


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The benchmark of one op, run twice in processes of their own, the first without time for anything."""
    path = tmp_path_factory.mktemp("suite") / "kernels.json"
    # pytest-benchmark measures nothing where it sees that it runs beside other tests.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = {**inherited, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "bench/suite/bench_kernels.py", "--benchmark-only", "--quiet"]
    command += ["-k", "attention_pool"]

    def run(*options):
        return subprocess.run(
            [*command, "--rows", path, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

    out_of_time = run("--budget", "0")
    left_out = json.loads(path.read_text())["rows"]
    return out_of_time, left_out, run(), path


def test_suite_leaves_out_what_finds_no_time(measured):
    out_of_time, left_out, _, _ = measured
    assert out_of_time.returncode == 0, out_of_time.stdout
    assert left_out
    assert {row["left_out"] for row in left_out} == {"the time was over"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a whole run on a GPU takes minutes")
def test_suite_measures_every_contestant(measured, capsys):
    _, left_out, answer, path = measured
    assert answer.returncode == 0, answer.stdout
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == len(left_out)
    assert {(row["contestant"], row["descriptors"]) for row in rows} == {
        (name, n) for name in ("eager", "op") for n in (64, 128)
    }
    for row in rows:
        assert row["median_us"] > 0
        assert row["fraction"] == pytest.approx(row["bound_us"] / row["median_us"])
        assert row["deviation"] < 1e-4
        assert row["multiply_adds"] == row["descriptors"] * 256 * (2 * 30 * 30 + 256)
        assert row["bytes"] == 4 * (256 * 30 * 30 + 2 * row["descriptors"] * 256 + 256 * 256 + 256)
    assert main([str(path)]) == 0
    assert "attention_pool float32 1x30x30 descriptors=128" in capsys.readouterr().out


def test_every_op_has_its_test():
    folders = {Path(*op.package.split(".")).name for op in OPS.values()}
    assert folders == {path.parent.name for path in (ROOT / "kernels").glob("*/op.py")}
    for name in folders:
        assert (ROOT / "tests" / "kernels" / f"test_{name}.py").exists(), name


KEPT = ROOT / "bench" / "results" / "kernels"


@pytest.mark.parametrize("file", sorted(KEPT.glob("*.json")), ids=lambda file: file.name)
def test_every_report_that_the_project_keeps_is_read(file, capsys):
    assert main([str(file)]) == 0
    assert "of the bound at larger batches" in capsys.readouterr().out


def test_the_page_has_what_was_measured():
    report = json.loads((KEPT / "h100.json").read_text())
    assert to_markdown(report) in (ROOT / "docs" / "kernels.md").read_text("utf-8")


def test_a_page_without_the_two_lines_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- measured: begin -->\n")
    with pytest.raises(ConfigError, match="needs the two lines <!-- measured: begin --> and <!-- measured: end -->"):
        main([str(KEPT / "h100.json"), "--write", str(page)])
    page.write_text("a\n<!-- measured: begin -->\nold\n<!-- measured: end -->\nb\n")
    assert main([str(KEPT / "h100.json"), "--write", str(page)]) == 0
    text = page.read_text("utf-8")
    assert text.startswith("a\n<!-- measured: begin -->\n\nNVIDIA H100")
    assert text.endswith("% |\n\n<!-- measured: end -->\nb\n")
