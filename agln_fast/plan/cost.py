"""What a planned network costs on a machine of known rates: arithmetic and memory traffic, without running it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.network import PlannedNetwork
from agln_fast.plan.rates import Rates

__all__ = ["estimate_seconds", "without_weights"]


class _Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the time of each operation, which is bound by its arithmetic or by its traffic, whatever takes longer.

    Element-wise operations are free: compilers compute them beside the operation before.
    """

    def __init__(self, rates: Rates, element_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds = 0.0
        self._rates = rates
        self._element_size = element_size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is None and (func.is_view or torch.Tag.pointwise in func.tags):
            return result
        flops = 0 if count is None else count(*args, **(kwargs or {}), out_val=result)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        moved = self._element_size * sum(tensor.numel() for tensor in tensors)
        convolves = func.overloadpacket is torch.ops.aten.convolution
        rate = self._rates.convolution if convolves else self._rates.product
        self.seconds += max(flops / rate, moved / self._rates.bytes)
        return result


def without_weights(model: SegmentationNetwork) -> SegmentationNetwork:
    """A copy on the meta device, which is rewritten in no time; α, β and γ, which decide what is computed, are kept."""
    tensors = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.numel() > 1]
    return copy.deepcopy(model, {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors})


@torch.no_grad()
def estimate_seconds(
    network: PlannedNetwork, size: tuple[int, int], rates: Rates, *, batch: int, element_size: int, full_size: bool
) -> float:
    """Seconds of one run on images of `size`, numbers being `element_size` bytes; `network` is not changed.

    `full_size`: logits are resized to the size of the image.
    """
    shadow = network.copy().to("meta")
    image = torch.empty(batch, 3, *size, device="meta")
    with _Meter(rates, element_size) as meter:
        shadow(image) if full_size else shadow.logits(image)
    return float(meter.seconds)
