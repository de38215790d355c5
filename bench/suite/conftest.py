"""Benchmarks: `pytest bench --benchmark-only`, of the ops in `bench_kernels.py`, of networks in `bench_networks.py`."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    # pytest knows them only where it is called with this very folder, or a file in it.
    group = parser.getgroup("kernels")
    group.addoption(
        "--rows", type=Path, metavar="FILE", help="write the results here, after each test; go on if it is there"
    )
    group.addoption("--budget", type=float, metavar="SECONDS", help="skip the tests that come later than this")
    group.addoption("--compile", action="store_true", help="measure torch.compile on a CPU, too")
