"""Blocks in exported graphs."""

from __future__ import annotations

import onnx
import pytest

from agln_fast.contract import IOContract
from agln_fast.export.blocks import blocks_of_nodes
from agln_fast.export.onnx import export_onnx
from agln_fast.plan.blocks import block_of, blocks_of
from agln_fast.plan.plan import ALGEBRA, NO_PLAN

CONTRACT = IOContract(64, 96)


@pytest.mark.parametrize("plan", [NO_PLAN, ALGEBRA], ids=["as it is", "rewritten"])
def test_each_convolution_is_in_the_block_of_its_weight(plan, small_network, tmp_path):
    network = small_network()
    file = tmp_path / "model.onnx"
    export_onnx(network, file, CONTRACT, plan=plan)
    graph = onnx.load(file)
    blocks = blocks_of_nodes(graph)
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    assert len(convolutions) > 40
    for node in convolutions:
        assert blocks[node.name] == block_of(node.input[1])
    assert set(blocks.values()) <= {block.name for block in blocks_of(network.config)}
    assert not {"Cast", "ArgMax"} & {node.op_type for node in graph.graph.node if node.name in blocks}
