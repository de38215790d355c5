"""Which block of the network each convolution of an exported graph is in: what is quantised together, or not at all."""

from __future__ import annotations

import re
from pathlib import Path

import onnx

from agln_fast.export.blocks import blocks_of_nodes

__all__ = ["convolution_blocks"]

_RESIDUAL = re.compile(r"\.layer\d(\.\d+)\.")  # in the name of a weight


def convolution_blocks(graph: Path) -> dict[str, str]:
    """The name of each convolution of the ONNX file `graph`, in its order -> the block that it is in.

    Blocks are those of `agln_fast.plan.blocks`, but a stage of the encoder is one for each of its residual blocks, such
    as `encoder.stage2.0`. A convolution that is in none is a block of its own.
    """
    model = onnx.load(graph, load_external_data=False)
    blocks = blocks_of_nodes(model)
    found = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            part = _RESIDUAL.search(node.input[1])
            found[node.name] = blocks.get(node.name, node.name) + (part[1] if part else "")
    return found
