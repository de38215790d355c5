"""Benchmarks are files named `bench_*.py`, run by `pytest bench --benchmark-only`."""

import pytest
import torch


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine."""
    return str(request.param)
