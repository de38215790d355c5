"""Ops are there for CPUs, CUDA and tracing, and cost nothing to start."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from agln_fast import kernels
from agln_fast.bench.kernels.calls import CALLS
from agln_fast.kernels.registration import OPS


def test_every_op_is_public_and_has_a_call():
    assert OPS.keys() == CALLS.keys() == set(kernels.__all__)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta"])
def test_every_op_has_a_kernel_for(key, op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"agln::{op}", key)


def test_the_first_call_loads_no_compiler():
    """It would take longer than most images."""
    program = (
        "import sys, torch; from agln_fast.kernels import label_upsample as op; op(torch.zeros(1, 2, 3, 3), (4, 4));"
        "sys.exit('torch._dynamo' in sys.modules or 'triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
