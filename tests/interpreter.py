"""Triton kernels on the CPU: small tiles, and fresh memory in which an element that was not written shows.

The interpreter itself is switched on in conftest.py, for the whole process and before Triton is imported. It keeps
bfloat16 as the integers of its bits, and would multiply those in `tl.dot`; here they are widened first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from agln_fast.kernels.launch import LaunchConfig

__all__ = ["loads_stay_within", "poisoned", "shipped", "tiny"]

_BEHIND = 256  # bytes: where other memory may begin

# Arguments of `choose` that lead to every shipped configuration.
shipped = pytest.mark.parametrize(
    ("capability", "is_regular"),
    [("sm86", True), ("sm90", True), ("sm90", False)],
    ids=["little-shared-memory", "much-shared-memory", "irregular"],
)

_dot = InterpreterBuilder.create_dot


def _dot_of_any_type(self: Any, a: Any, b: Any, *rest: Any) -> Any:
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, *rest)


InterpreterBuilder.create_dot = _dot_of_any_type


def tiny(dtype: torch.dtype, processors: int = 4, **tile: int) -> LaunchConfig:
    """Tiles of 16 unless told otherwise: small maps then have several of each."""
    sizes = {"P": 16, "C": 16, "N": 16, "I": 16, "J": 16, "K": 16, "M": 16, "O": 16, "H": 4, "W": 4, **tile}
    return LaunchConfig((str(dtype).removeprefix("torch."),), sizes, num_warps=4, num_stages=1, processors=processors)


@contextmanager
def loads_stay_within(*tensors: Tensor) -> Iterator[None]:
    """What is loaded from the memory just behind one of `tensors` is an error, masked lanes apart."""
    load = InterpreterBuilder.create_masked_load

    def watched(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        first = pointers.data[mask.data].astype(np.int64)
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for tensor in tensors:
            storage = tensor.untyped_storage()
            end = storage.data_ptr() + storage.nbytes()
            assert not ((first + size > end) & (first < end + _BEHIND)).any(), "reads behind its memory"
        return load(self, pointers, mask, *rest)

    with patch.object(InterpreterBuilder, "create_masked_load", watched):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN, or the largest integer."""

    def fill(create: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poison(*args: Any, **kwargs: Any) -> Tensor:
            fresh = create(*args, **kwargs)
            return fresh.fill_(float("nan") if fresh.is_floating_point() else torch.iinfo(fresh.dtype).max)

        return poison

    with (
        patch.object(torch, "empty", fill(torch.empty)),
        patch.object(torch, "empty_like", fill(torch.empty_like)),
        patch.object(Tensor, "new_empty", fill(Tensor.new_empty)),
    ):
        yield
