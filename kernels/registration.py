"""Ops in `torch.library`: a check of the arguments, the reference, the Triton kernel, and shapes for tracing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from agln_fast.kernels.launch import LaunchConfig, choose, load_configs, regular

__all__ = ["OPS", "Op", "register"]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Op:
    """What there is to know of an op.

    reference: in plain PyTorch. package: the folder of it, as a module. configs: launch configurations.
    tiles: of the arguments, the tensors that a kernel loads tiles of; the first has the op's dtype and device.
    """

    name: str
    reference: Callable[..., Any]
    package: str
    configs: tuple[LaunchConfig, ...]
    tiles: Callable[..., tuple[Tensor | None, ...]]

    def launch(self, args: tuple[Any, ...], kwargs: dict[str, Any], device: tuple[str, int] | None = None) -> Any:
        """Run the kernel with arguments that are checked.

        device: compute capability and multiprocessors to choose the configuration by; None for those of the device.
        """
        tensors = self.tiles(*args, **kwargs)
        x = tensors[0]
        assert x is not None
        config = choose(self.configs, x, regular(*tensors), *(device or ()))
        kernel = import_module(f"{self.package}.kernel")  # which loads Triton
        return getattr(kernel, self.name)(*args, **kwargs, config=config)


OPS: dict[str, Op] = {}
"""Every op by its name."""


def register(
    package: str,
    reference: Callable[P, R],
    *,
    check: Callable[P, None],
    tiles: Callable[P, tuple[Tensor | None, ...]],
    fake: Callable[P, R],
    cpu: Callable[P, R] | None = None,
) -> Callable[P, R]:
    """Make the op `agln::NAME` of `reference`, whose name, schema and docstring it has, for inference alone.

    On CUDA it is the function NAME of `package`.kernel, with a configuration of `package`'s configs.json; in float64,
    which exists for proofs and which Triton's matrix products have not, the reference. `torch.library.custom_op` does
    the like, but its ops load the compiler at their first call, which takes seconds.

    Args:
        check: raises TypeError or ValueError where arguments do not fit; called once, wherever the op runs.
        tiles: see `Op`.
        fake: returns results of the right shape, strides, dtype and device, for tracing.
        cpu: in the place of the reference on CPUs.
    """
    name = reference.__name__
    op = OPS[name] = Op(name, reference, package, load_configs(package, name), tiles)

    def cuda(*args: P.args, **kwargs: P.kwargs) -> R:
        x = tiles(*args, **kwargs)[0]
        if x is not None and x.dtype == torch.float64:
            return reference(*args, **kwargs)
        result: R = op.launch(args, kwargs)
        return result

    def checked(run: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(run)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            check(*args, **kwargs)
            return run(*args, **kwargs)

        return call

    qualified = f"agln::{name}"
    schema = torch.library.infer_schema(reference, mutates_args=())
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, "cpu", checked(cpu or reference))
    torch.library.impl(qualified, "cuda", checked(cuda))
    torch.library.register_fake(qualified, checked(fake))
    dispatched = getattr(torch.ops.agln, name).default

    @functools.wraps(reference)
    def public(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            result: R = dispatched(*args, **kwargs)
        except RuntimeError:
            check(*args, **kwargs)  # what is no tensor does not get further than the dispatcher, which says less of it
            raise
        return result

    return public
