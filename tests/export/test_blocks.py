"""Blocks in exported graphs."""

from __future__ import annotations

from dataclasses import replace

import onnx
import pytest

from agln_fast.contract import IOContract
from agln_fast.deployment import DeployedNetwork
from agln_fast.export import onnx as exporter
from agln_fast.export.blocks import blocks_of_nodes, more_outputs, tensors_of
from agln_fast.plan.blocks import block_of, blocks_of
from agln_fast.plan.plan import ALGEBRA, NO_PLAN

CONTRACT = IOContract(64, 96)
LOW = replace(ALGEBRA, low_resolution_labels=True)


class Unwatched(DeployedNetwork):
    def blocks(self) -> list[str]:
        return []


def check(graph: onnx.ModelProto, model) -> None:
    """Each convolution is in the block of its weight, and all blocks are the network's."""
    blocks = blocks_of_nodes(graph)
    convolutions = [node for node in graph.graph.node if node.op_type == "Conv"]
    assert len(convolutions) > 20
    for node in convolutions:
        assert blocks[node.name] == block_of(node.input[1])
    assert set(blocks.values()) <= {block.name for block in blocks_of(model)}
    assert not {"Cast", "ArgMax"} & {node.op_type for node in graph.graph.node if node.name in blocks}


def test_each_convolution_is_in_the_block_of_its_weight(bundle):
    artefact = bundle.artefact("onnxruntime-fp32")
    check(onnx.load(artefact.file), artefact.model)


@pytest.mark.slow
@pytest.mark.parametrize("plan", [NO_PLAN, ALGEBRA, LOW], ids=["as it is", "rewritten", "low resolution"])
@pytest.mark.parametrize("name", ["fpn_resnet18", "agln_resnet18", "agln_release_resnet18"])
def test_names_change_no_graph(name, plan, small_network, tmp_path, monkeypatch):
    network = small_network(name)
    exporter.export_onnx(network, tmp_path / "named.onnx", CONTRACT, plan=plan)
    monkeypatch.setattr(exporter, "WatchedDeployment", Unwatched)
    exporter.export_onnx(network, tmp_path / "plain.onnx", CONTRACT, plan=plan)
    named, plain = (onnx.load(tmp_path / f"{file}.onnx") for file in ("named", "plain"))
    assert [node.op_type for node in named.graph.node] == [node.op_type for node in plain.graph.node]
    assert [value.name for value in named.graph.output] == [value.name for value in plain.graph.output]
    check(named, network.config)
    hidden = {"decoder.sab.0", "decoder.sab.1", "decoder.sab.2"} if "release" in name and plan != NO_PLAN else set()
    hidden |= {"classifier"} if plan is LOW else set()  # it is the output, "logits"
    missing = {block.name for block in blocks_of(network.config)} - set(tensors_of(named.SerializeToString()))
    assert missing == hidden


def test_more_outputs_come_after_the_graph_s_own(bundle):
    data = bundle.artefact("onnxruntime-fp32").file.read_bytes()
    graph = onnx.load_model_from_string(more_outputs(data, ["head", "labels", "encoder.stem"])).graph
    assert [value.name for value in graph.output] == ["labels", "head", "encoder.stem"]
