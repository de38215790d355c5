"""What a planned network costs on a machine of known rates: arithmetic and memory traffic, without running it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.network import InferenceNetwork
from agln_fast.plan.plan import Plan
from agln_fast.plan.rates import Rates
from agln_fast.plan.rewrites import rewrite

__all__ = ["CostModel"]


@dataclass(frozen=True)
class _Operation:
    """What one operation does: whether it is a convolution, its floating-point operations, the numbers that it reads
    and writes."""

    convolves: bool
    flops: int
    numbers: int


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation but element-wise ones: compilers compute these beside the operation before."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[_Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is None and (func.is_view or torch.Tag.pointwise in func.tags):
            return result
        flops = 0 if count is None else count(*args, **(kwargs or {}), out_val=result)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        convolves = func.overloadpacket is torch.ops.aten.convolution
        self.operations.append(_Operation(convolves, flops, sum(tensor.numel() for tensor in tensors)))
        return result


class CostModel:
    """What one run of a network costs under each plan. Operations are counted once for a plan, on the meta device."""

    def __init__(self, model: SegmentationNetwork, size: tuple[int, int], batch: int) -> None:
        """`size` (height, width) of the images, `batch` of them in a run."""
        # Without weights it is rewritten in no time; α, β and γ, which decide what is computed, are kept.
        tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel() > 1]
        self._model = copy.deepcopy(model, {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors})
        self._image = torch.empty(batch, 3, *size, device="meta")
        self._rewritten: dict[tuple[str, ...], InferenceNetwork] = {}
        self._counted: dict[Plan, list[_Operation]] = {}

    def seconds(self, plan: Plan, rates: Rates, *, element_size: int) -> float:
        """Seconds on a machine of `rates`, where a number has `element_size` bytes.

        An operation is bound by its arithmetic or by its traffic, whatever takes longer.
        """
        return sum(
            max(
                operation.flops / (rates.convolution if operation.convolves else rates.product),
                element_size * operation.numbers / rates.bytes,
            )
            for operation in self._operations(plan)
        )

    def differ(self, plan: Plan, other: Plan) -> bool:
        """Both make different networks of this one: what only one of them asks for is not without effect here."""
        return self._network(plan) is not self._network(other)

    def _network(self, plan: Plan) -> InferenceNetwork:
        return rewrite(self._model, plan, self._rewritten).to("meta")

    @torch.no_grad()
    def _operations(self, plan: Plan) -> list[_Operation]:
        if plan not in self._counted:
            network = self._network(plan)
            with _Meter() as meter:
                network(self._image)
            self._counted[plan] = meter.operations
        return self._counted[plan]
