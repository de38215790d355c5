"""ONNX -> ONNX with pairs of QuantizeLinear and DequantizeLinear, as TensorRT and OpenVINO take it: int8."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from agln_fast import interruption
from agln_fast.errors import BuildError, MissingPackageError
from agln_fast.export.convolutions import convolution_blocks
from agln_fast.files import replacing
from agln_fast.telemetry import import_quietly

__all__ = ["leave_in_floating_point", "quantize_to_qdq"]


def quantize_to_qdq(graph: Path, path: Path, batches: Sequence[npt.NDArray[np.generic]]) -> None:
    """Quantise the convolutions of an ONNX file by ONNX Runtime's `quantize_static`, and write it as another one.

    As TensorRT wants it: weights int8 with a scale for each output channel, inputs int8 with one for all, both
    symmetric, so that 0 is 0; biases and outputs stay in floating point. So does all but convolutions: see
    `agln_fast.export.quantize`, which does the same for OpenVINO.

    Args:
        graph: as `export_onnx` writes it, in fp32 or half precision, which all that is not int8 keeps.
        path: the file to write, whole or not at all.
        batches: pictures to calibrate on, as the graph takes them: the largest magnitude of a tensor is 127.

    Raises:
        MissingPackageError: ONNX Runtime is not installed.
        BuildError: no batches, a graph that cannot be quantised by these batches, or no space.
    """
    if len(batches) == 0:
        raise BuildError("int8 needs pictures to calibrate on, and there are none")
    try:
        import_quietly("onnxruntime")
        from onnxruntime import quantization
        from onnxruntime.quantization.quant_utils import add_pre_process_metadata
    except ImportError:
        raise MissingPackageError("onnxruntime", "int8") from None
    with replacing(path, BuildError) as part:
        try:
            model = onnx.load(graph)
            add_pre_process_metadata(model)  # or it advises to optimise the graph, by the root logger
            quantization.quantize_static(
                model,
                part,
                _Batches(batches),
                op_types_to_quantize=["Conv"],
                per_channel=True,
                activation_type=quantization.QuantType.QInt8,
                weight_type=quantization.QuantType.QInt8,
                extra_options={
                    "ActivationSymmetric": True,
                    "WeightSymmetric": True,
                    "QuantizeBias": False,
                    "OpTypesToExcludeOutputQuantization": ["Conv"],
                },
            )
            quantised = onnx.load(part)
        except Exception as error:  # ONNX's, ONNX Runtime's and protobuf's exceptions have no common base
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise BuildError(f"{graph}: cannot be quantised: {reason}") from error
        onnx.save(_give_back(quantised, onnx.load(graph), convolution_blocks(graph)), part)


def leave_in_floating_point(quantised: Path, graph: Path, path: Path, floating: Collection[str]) -> None:
    """Write `quantised`, which `quantize_to_qdq` has made of `graph`, to `path`, but for the blocks `floating`.

    Their convolutions (`convolution_blocks`) read what they read in `graph`; the others are as they were.

    Raises:
        BuildError: that is all of them, or there is no space.
    """
    rest = [name for name, block in convolution_blocks(graph).items() if block not in floating]
    if not rest:
        raise BuildError(f"{graph}: all convolutions stay in floating point: nothing is left to quantise")
    with replacing(path, BuildError) as part:
        onnx.save(_give_back(onnx.load(quantised), onnx.load(graph), rest), part)


def _give_back(quantised: onnx.ModelProto, plain: onnx.ModelProto, convolutions: Collection[str]) -> onnx.ModelProto:
    """`quantised` with what all but `convolutions` read as it is in `plain`.

    Where one node reads a tensor in int8, ONNX Runtime's quantiser gives it so to all: to attention, and to sums.
    """
    inputs = {tuple(node.output): node.input for node in plain.graph.node if node.name not in convolutions}
    graph = quantised.graph
    for node in graph.node:
        if tuple(node.output) in inputs:
            node.input[:] = inputs[tuple(node.output)]
    there = {value.name for value in graph.initializer}
    graph.initializer.extend(value for value in plain.graph.initializer if value.name not in there)
    model = onnx_ir.from_proto(quantised)
    RemoveUnusedNodesPass()(model)
    return onnx_ir.to_proto(model)


class _Batches:
    """What `quantize_static` reads: one batch after the other, then None."""

    def __init__(self, batches: Sequence[npt.NDArray[Any]]) -> None:
        self._rest = iter(batches)

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        interruption.check()
        batch = next(self._rest, None)
        return None if batch is None else {"image": batch}
