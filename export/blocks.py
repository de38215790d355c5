"""Blocks of the network in its exported graph: which node belongs to which one."""

from __future__ import annotations

import ast

import onnx

from agln_fast.plan.blocks import block_of

__all__ = ["blocks_of_nodes"]

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
