"""The kernels of an engine, in order, and their picture."""

from __future__ import annotations

from collections import Counter

import pytest

from agln_fast.bench.jobs.layers import Kernel, draw_layers, read_kernels
from agln_fast.errors import BuildError

# As TensorRT-RTX 1.7.1 writes programs; tensors, buffers and signals are no kernels.
PLAN = b"""\0\0header {
  version = 4
  function={ name=__myl_Conc fqn=__myl_Conc_0x1 }
header {
  version = 5
  tensor={ alignment=128 dims={ 1 } name="x" type=half }
  function={ name=__myl_CastTranMulAddMulCast fqn=__myl_CastTranMulAddMulCast_0x1 }
  corrltn={ name="node_conv2d" output={"a" } input={"x" "w" } }
  maxpool={ name="node_max_pool2d" output={"b" } }
  function={ name=__myl_MoveReshTran fqn=__myl_MoveReshTran_0x1 }
  custom_layer={ name="node_channel_affinity_3" output={"c" } input={"b" "b" } }
  custom_layer={ name="node_semantic_distribution_1__1" output={"d" } input={"b" } }
  signal={ name="s" }
  runtime_fusion={ name="node_conv2d_1" output={"e" } }
header {
  version = 4
"""


def test_kernels_are_read_in_order():
    assert read_kernels(PLAN) == [
        Kernel("other"),
        Kernel("convolution"),
        Kernel("other"),
        Kernel("copy"),
        Kernel("ours", "ChannelAffinity"),
        Kernel("ours", "SemanticDistribution"),
        Kernel("convolution"),
    ]
    with pytest.raises(BuildError, match="not a plan of TensorRT-RTX"):
        read_kernels(b"PK")


def test_a_cell_for_each_kernel():
    kernels = 40 * read_kernels(PLAN)
    figure = draw_layers(kernels, "title")
    (axes,) = figure.axes
    colours = Counter(patch.get_facecolor() for patch in axes.patches)
    assert sorted(colours.values()) == [40, 80, 80, 80]
    assert Counter(text.get_text() for text in axes.texts) == {"CA": 40, "SD": 40}
    words = [text.get_text() for text in figure.legends[0].texts]
    assert words == ["ours, 80", "convolution, 80", "copy to another order, 40", "other, 80"]
