"""Blocks of the network in its exported graph: what is called by their names, and which node belongs to which one."""

from __future__ import annotations

import ast
from functools import partial
from typing import TYPE_CHECKING

import onnx
from onnx_ir.passes import common
from torch import Tensor, nn

from agln_fast.contract import IOContract
from agln_fast.deployment import DeployedNetwork
from agln_fast.plan.blocks import block_of
from agln_fast.plan.watch import watching

if TYPE_CHECKING:
    from collections.abc import Iterable

    import onnx_ir as ir

__all__ = ["WatchedDeployment", "blocks_of_nodes", "more_outputs", "name_blocks", "tensors_of"]

_SCOPES = "pkg.torch.onnx.name_scopes"  # where PyTorch's exporter writes the paths of the modules around a node


def blocks_of_nodes(graph: onnx.ModelProto) -> dict[str, str]:
    """Name of each node of an exported graph -> name of its block (`agln_fast.plan.blocks.blocks_of`).

    Nodes outside of all blocks are left out: the normalisation, resizes between modules, the best class of each pixel.
    OpenVINO calls the operation that it makes of a node by the node's name, or by "NAME/WithoutBiases".
    """
    found = {}
    for node in graph.graph.node:
        scopes = next((each.value for each in node.metadata_props if each.key == _SCOPES), "[]")
        for path in reversed(ast.literal_eval(scopes)[:-1]):  # the last one is the node itself
            if block := block_of(path):
                found[node.name] = block
                break
    return found


class WatchedDeployment(DeployedNetwork):
    """A network to export, which gives the results of its blocks after its own output.

    `blocks` are the names of those blocks, after a run; without what is the output itself.
    """

    def __init__(self, network: nn.Module, contract: IOContract, num_classes: int) -> None:
        super().__init__(network, contract, num_classes)
        blocks: list[str] = []
        # Behind functions: PyTorch's exporter puts all lists of a module back as they were.
        self.blocks, self._set_blocks = blocks.copy, partial(blocks.__setitem__, slice(None))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        with watching(self.network, lambda x: x) as found:
            output = super().forward(image)
        results = {name: x for name, x in found.items() if x is not output}
        self._set_blocks(list(results))
        return output, *results.values()


def name_blocks(model: ir.Model, blocks: list[str]) -> None:
    """Make of a graph that gives the results of `blocks` after its output one that gives the output alone, and in which
    they are called "NAME", each by its block.

    Of what PyTorch's exporter notes at each node the modules around it stay, and not the lines of code: those have
    paths of the machine that it ran on.
    """
    output, *results = model.graph.outputs
    for block, result in zip(blocks, results, strict=True):
        if block != output.name:  # which, in half precision, is the same converted
            result.name = block
    model.graph.outputs[:] = [output]
    common.RemoveUnusedNodesPass()(model)
    for node in model.graph:
        for key in node.metadata_props.keys() - {_SCOPES}:
            del node.metadata_props[key]


def tensors_of(data: bytes) -> list[str]:
    """The names of all that the nodes of an ONNX file give."""
    return [name for node in onnx.load_model_from_string(data).graph.node for name in node.output]


def more_outputs(data: bytes, tensors: Iterable[str]) -> bytes:
    """The ONNX file `data`, which gives `tensors` of its inside, too, after its own output."""
    model = onnx.load_model_from_string(data)
    own = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in tensors if name not in own)
    serialized: bytes = model.SerializeToString()
    return serialized
