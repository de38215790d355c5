"""What one run of the fused network launches on a GPU, and how many bytes that moves: counted without one.

    python -m agln_fast.bench.kernels.launches [--network NAME] [--write docs/kernels.md]

The network runs on the device "meta", which computes nothing. What reaches PyTorch's dispatcher is counted: an op of
ours by calling its own launcher with launches stood in for, any other operation as one kernel, unless it only gives a
view or takes memory. A convolution with a ReLU is what cuDNN does in one call, bias and residual included, as it was on
an H100 for all of them; kernels that it launches before, to pad or to reorder, are not seen, nor is what our launchers
do beside launching, which is nothing for maps of these sizes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agln_fast.bench.kernels.page import replace_section
from agln_fast.bench.race.weights import random_network
from agln_fast.contract import IOContract
from agln_fast.engines.fused_network import FusedDeployment
from agln_fast.kernels.devices import DEVICES
from agln_fast.kernels.registration import OPS
from agln_fast.plan.convolution import FusedConv2d
from agln_fast.plan.fuse import fuse

__all__ = ["Part", "count_launches", "deployed", "to_markdown"]

_DEVICE = "sm90"
_NO_KERNEL = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::detach"}
_ENDS = "ends"


@dataclass
class Part:
    """Of a run: of a part of the network what runs there, e.g. "convolution" or an op, how often, and bytes of all."""

    part: str
    what: str
    launches: int = 0
    bytes: int = 0


def count_launches(network: FusedDeployment, batch: int = 1) -> list[Part]:
    """A row for each part and what runs there, in the order of the run; both copies between host and GPU included.

    `network` is left on the device "meta".
    """
    contract = network.contract
    network.to("meta")
    image = torch.empty(batch, contract.height, contract.width, 3, dtype=torch.uint8, device="meta")
    counter = _Counter()
    counter.note(_ENDS, "copy of the image", 1, [image])
    with counter.following(network), torch.inference_mode(), counter:
        labels = network(image)
    counter.note(_ENDS, "copy of the labels", 1, [labels])
    return list(counter.rows.values())


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows: dict[tuple[str, str], Part] = {}
        self._part = _ENDS

    def note(self, part: str, what: str, launches: int, tensors: Sequence[Tensor]) -> None:
        row = self.rows.setdefault((part, what), Part(part, what))
        row.launches += launches
        row.bytes += sum(x.numel() * x.element_size() for x in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        if func.namespace == "agln":
            self._note_op(name.removeprefix("agln::"), args, kwargs)
        elif not func.is_view and name not in _NO_KERNEL:
            tensors = {id(x): x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
            self.note(self._part, name.removeprefix("aten::").rstrip("_"), 1, list(tensors.values()))
        return result

    def _note_op(self, op: str, args: Any, kwargs: Any) -> None:
        def on_cpu(x: Any) -> Any:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) if isinstance(x, Tensor) else x

        given, named = torch.utils._pytree.tree_map(on_cpu, (args, kwargs))
        with torch._C._DisableTorchDispatch(), _launches() as launched:
            OPS[op].launch(given, named, (_DEVICE, DEVICES[_DEVICE].processors))
        for tensors in launched:
            self.note(self._part, op, 1, tensors)

    @contextmanager
    def following(self, network: FusedDeployment) -> Iterator[None]:
        """Know which part of the network runs, and take a convolution for one call."""
        hooks = [module.register_forward_pre_hook(self._enter(name)) for name, module in _parts(network.network)]
        forward = FusedConv2d.forward

        def convolve(layer: FusedConv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
            with torch.utils._python_dispatch._disable_current_modes():
                y = forward(layer, x, residual)
            maps = [each for each in (x, residual, y) if each is not None]
            self.note(self._part, "convolution", 1, [*maps, layer.weight])
            if layer.bias is not None and not layer.relu:  # no call of cuDNN's adds it
                self.note(self._part, "bias", 1, [y, y])
            return y

        try:
            with patch.object(FusedConv2d, "forward", convolve):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, arguments: Any) -> None:
            self._part = name

        return enter


def _parts(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What runs one after the other, by the names of the inference network: each stage, each level."""
    for name, module in network.named_children():
        if name not in ("encoder", "decoder"):
            yield name, module
            continue
        for inner, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                yield from ((f"{name}.{inner}.{number}", each) for number, each in enumerate(child))
            else:
                yield f"{name}.{inner}", child


@contextmanager
def _launches() -> Iterator[list[list[Tensor]]]:
    """Triton launches nothing; yields the tensors of each launch that was asked for."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import KernelInterface

    found: list[list[Tensor]] = []

    def launch(self: Any, grid: Any) -> Any:
        def note(*args: Any, **kwargs: Any) -> None:
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            found.append(list({x.data_ptr(): x for x in tensors}.values()))

        return note

    with patch.object(KernelInterface, "__getitem__", launch), patch.object(InterpretedFunction, "__getitem__", launch):
        yield found


def deployed(name: str) -> FusedDeployment:
    """A network as it was measured on an H100: random weights, 59 classes, 512x512, fp16."""
    return FusedDeployment(fuse(random_network(name, 59)).half(), IOContract(512, 512), 59)


def to_markdown(rows: Sequence[Part]) -> str:
    """A line for each row, and the sum."""
    lines = ["| part | what | launches | MB |", "| --- | --- | ---: | ---: |"]
    lines += [f"| {row.part} | {row.what} | {row.launches} | {row.bytes / 1e6:.1f} |" for row in rows]
    launches, megabytes = sum(row.launches for row in rows), sum(row.bytes for row in rows) / 1e6
    return "\n".join([*lines, f"| all of it | everything | {launches} | {megabytes:.1f} |"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print, and perhaps write a page of the docs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", default="agln_release_resnet50")
    parser.add_argument("--write", type=Path, help="page of the docs whose table is replaced")
    options = parser.parse_args(arguments)
    text = to_markdown(count_launches(deployed(options.network)))
    print(text)
    if options.write:
        replace_section(options.write, "launches", text)


if __name__ == "__main__":
    main()
