"""Short tables of the JSON that the benchmarks write.

    python -m agln_fast.bench.kernels.table FILE.json ... [--write docs/kernels.md]

Ends with status 1 if anything failed. --write puts the last file's table into a page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agln_fast.bench.kernels.page import replace_section

__all__ = ["kernel_table", "main", "to_markdown"]

_Rows = Sequence[dict[str, Any]]

_KERNEL_CONTESTANTS = ("eager", "compile", "op")


def kernel_table(rows: _Rows, launch_us: float) -> str:
    """A line for each case: medians in microseconds, and what the op reaches of its bound; then a line for each op."""
    cases = _by_case(rows)
    width = max(map(len, cases), default=0)
    lines = [f"{'µs':{width}}{''.join(f'{name:>9}' for name in _KERNEL_CONTESTANTS)}    bound"]
    for case, found in cases.items():
        times = "".join(_microseconds(found.get(name, {}).get("median_us")) for name in _KERNEL_CONTESTANTS)
        op = found.get("op", {})
        reached = f"{op['bound_us']:9.1f} {op['fraction']:4.0%}" if "fraction" in op else ""
        lines.append(f"{case:{width}}{times}{reached}")
    measured = [row for row in rows if row["contestant"] == "op" and "median_us" in row]
    for op in dict.fromkeys(row["op"] for row in measured):
        # A batch of one is too small for most bounds: there the goal is a few launches.
        reached = _range([100 * row["fraction"] for row in measured if row["op"] == op and row["batch"] > 1], 0)
        launches = _range(
            [row["median_us"] / launch_us for row in measured if row["op"] == op and row["batch"] == 1], 1
        )
        lines.append(f"{op}: {reached} % of the bound at larger batches, {launches} launches at batch 1")
    return "\n".join(lines + _remarks(rows))


def _by_case(rows: _Rows) -> dict[str, dict[str, dict[str, Any]]]:
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["contestant"]] = row
    return cases


def _remarks(rows: _Rows) -> list[str]:
    """What a reader must know who sees only the numbers."""
    calls = sum(row.get("timing") == "calls" for row in rows)
    left_out = [row for row in rows if "left_out" in row]
    lines = [f"{calls} timed without a graph: gaps between launches count"] if calls else []
    if left_out:
        names = sorted({row["contestant"] for row in left_out})
        lines.append(f"{len(left_out)} left out, the time was over: {', '.join(names)}")
    return lines + [
        f"FAILED {row['case']} {row['contestant']}: {row['error'].splitlines()[0]}" for row in rows if "error" in row
    ]


def _microseconds(value: float | None) -> str:
    return f"{'–':>9}" if value is None else f"{value:9.1f}"


def _range(values: Sequence[float], digits: int) -> str:
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}" if values else "–"


def to_markdown(report: dict[str, Any]) -> str:
    """Of a report of a GPU: AGLN's usual size in half precision, one line for each op and batch."""
    machine, roofline = report["machine"], report["roofline"]
    rows = [row for row in report["rows"] if (row["side"], row["dtype"]) == (128, "float16") and "median_us" in row]
    lines = [
        f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}: copies "
        f"{roofline['bytes_per_second'] / 1e12:.2f} TB/s, fp16",
        f"products {roofline['flops_per_second']['float16'] / 1e12:.0f} TFLOP/s.",
        "",
        "| op, float16, 128x128 | batch | PyTorch, µs | op, µs | gain | of the bound |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for found in _by_case(rows).values():
        if {"eager", "op"} <= set(found):
            eager, op = found["eager"], found["op"]
            variant = [str(op[key]) for key in ("descriptors", "classes", "pattern") if key in op]
            name = ", ".join([f"`{op['op']}`", *variant])
            gain = eager["median_us"] / op["median_us"]
            lines.append(
                f"| {name} | {op['batch']} | {eager['median_us']:.0f} | {op['median_us']:.1f} | {gain:.1f} | "
                f"{op['fraction']:.0%} |"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Print a table for each file; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.json")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="page of the docs whose table is replaced")
    options = parser.parse_args(arguments)
    failed = False
    for path in options.files:
        if not Path(path).exists():
            print(f"\n{path}: nothing was measured")
            failed = True
            continue
        report = json.loads(Path(path).read_text())
        rows = report["rows"]
        print(f"\n{path}: {report['machine']['gpu'] or report['machine']['cpu']}")
        if "roofline" in report:
            roofline = report["roofline"]
            rates = ", ".join(
                f"{rate / 1e12:.0f} TFLOP/s {kind}" for kind, rate in roofline["flops_per_second"].items()
            )
            launch = roofline["launch_us"]
            print(f"{roofline['bytes_per_second'] / 1e12:.2f} TB/s copied, {rates}; a launch takes {launch:.1f} µs")
            print(kernel_table(rows, launch))
        failed = failed or any("error" in row for row in rows)
    if options.write:
        replace_section(options.write, "measured", to_markdown(json.loads(Path(options.files[-1]).read_text())))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
