"""Ops in `torch.library`: one function for each device, and one for shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["register"]


def register(name: str, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Make the op `agln::NAME`, with the schema of `cpu`'s annotations, for inference alone.

    `torch.library.custom_op` does the same, but its ops load the compiler at their first call, which takes seconds.

    Args:
        cpu, cuda: run it on a device of that type.
        fake: returns results of the right shape, strides, dtype and device, for tracing.

    Returns:
        The op, a callable.
    """
    schema = torch.library.infer_schema(cpu, mutates_args=())
    torch.library.define(f"agln::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"agln::{name}", "cpu", cpu)
    torch.library.impl(f"agln::{name}", "cuda", cuda)
    torch.library.register_fake(f"agln::{name}", fake)
    return getattr(torch.ops.agln, name).default
