"""Kind `openvino`: the exported graph on OpenVINO's CPU plugin, in exactly the precision asked for.

An int8 engine is an OpenVINO IR whose graph says itself what is quantised (`export.quantize`). The rest of it runs in
bf16 where the CPU has it, and in fp32 elsewhere. A trial of one is an ONNX file (`export.qdq`), whose rest is in fp32.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Generator, Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np

from agln_fast.artefact import Artefact
from agln_fast.engines.base import (
    CALIBRATION,
    Array,
    Engine,
    EngineKind,
    Port,
    Workbench,
    as_promised,
    block_tensors,
    check_ports,
)
from agln_fast.engines.denormals import denormals_as_zero
from agln_fast.errors import BackendError, MissingPackageError
from agln_fast.plan.plan import ALGEBRA, NO_PLAN, Plan
from agln_fast.precision import Precision
from agln_fast.telemetry import import_quietly

__all__ = ["OpenVino", "OpenVinoEngine", "quantised_graph"]

_HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_TYPES = {"u8": "uint8", "i32": "int32", "f32": "float32"}
_INTEGERS = ("i8", "u8")

_opened_in: int | None = None  # the process that opened the first engine


def quantised_graph(bench: Workbench, kind: Precision, plan: Plan, floating: Collection[str] = ()) -> Artefact:
    """The int8 form of the ONNX graph of type `kind`, as ONNX: for TensorRT, and for OpenVINO to see what it costs."""
    from agln_fast.export.qdq import leave_in_floating_point, quantize_to_qdq

    graph, name, kept = bench.graph(kind, plan), "model.int8.onnx", tuple(sorted(floating))
    key = "quantised graph", kind, plan
    file = bench.file(name, (*key, ()), lambda path: quantize_to_qdq(graph, path, bench.calibration()))
    if kept:
        whole = file
        file = bench.file(name, (*key, kept), lambda path: leave_in_floating_point(whole, graph, path, kept))
    return OpenVino().artefact(bench, "int8", plan, file, floating=kept)


class OpenVino(EngineKind):
    """bf16 and int8 are made of the fp32 graph."""

    name = "openvino"
    precisions = ("fp32", "fp16", "bf16", "int8")
    package = extra = "openvino"
    plans = "timing"
    start = replace(ALGEBRA, pixel_major_attention=True)  # its convolutions keep channels adjacent
    settings = "LATENCY, precision hint, denormals as zero"

    def automatic(self) -> tuple[Precision, ...]:
        # int8 is none of it, because it takes minutes and costs accuracy.
        return ("fp32",) if self.obstacle("bf16") else ("fp32", "bf16")

    def graph_type(self, precision: Precision) -> Precision:
        return "fp16" if precision == "fp16" else "fp32"

    def timed_in(self, precision: Precision) -> Precision:
        # Each candidate would have to be quantised; what is best in bf16 is taken for best in int8.
        return "bf16" if precision == "int8" else precision

    def seconds_to_make(self, precision: Precision, parameters: int, image_s: float) -> float:
        return 15 + 2 * CALIBRATION * image_s if precision == "int8" else 0.0

    def packages(self, precision: Precision) -> tuple[str, ...]:
        return ("openvino", "nncf") if precision == "int8" else ("openvino",)

    def _obstacle(self, precision: Precision, where: str) -> str | None:
        if _opened_in not in (None, os.getpid()):
            return (
                "this process was forked from one that had opened an OpenVINO engine, whose threads are not here: open "
                "the first one after the fork, or start processes with spawn or forkserver (docs/concurrency.md)"
            )
        has = _capabilities(import_quietly("openvino"))
        if precision.upper() not in has:
            return f"this CPU has no {precision} arithmetic for OpenVINO (it has {', '.join(has)})"
        return None

    def check_make(self, precision: Precision, compute_capabilities: Sequence[str] = ()) -> None:
        for package in self.packages(precision) if precision == "int8" else ():
            if find_spec(package) is None:
                raise MissingPackageError(package, "int8")

    def trial(self, bench: Workbench, plan: Plan, floating: Collection[str] = ()) -> Artefact:
        return quantised_graph(bench, "fp32", plan, floating)

    def make(
        self, bench: Workbench, precision: Precision, plan: Plan = NO_PLAN, floating: Collection[str] = ()
    ) -> Artefact:
        if precision != "int8":
            return self.artefact(bench, precision, plan, bench.graph(self.graph_type(precision), plan))
        from agln_fast.export.quantize import quantize_onnx

        kept = tuple(sorted(floating))

        def write(path: Path) -> None:
            quantize_onnx(bench.graph("fp32", plan), path, bench.calibration(), kept)

        file = bench.file("model.int8.xml", ("int8", plan, kept), write)
        return self.artefact(bench, precision, plan, file, floating=kept)

    def open(self, artefact: Artefact, *, device: str | None = None, threads: int | None = None) -> Engine:
        return OpenVinoEngine(artefact, threads)

    def blocks(
        self, artefact: Artefact, images: Iterable[Array], *, device: str | None = None, threads: int | None = None
    ) -> Generator[dict[str, Array], None, None]:
        with OpenVinoEngine(artefact, threads, watched=True) as engine:
            for image in images:
                yield engine.run_blocks(image)


class OpenVinoEngine(Engine):
    """Sets the precision hint and reads it back: OpenVINO left alone takes bf16 where the CPU has it."""

    name = "openvino"
    device = "cpu"

    def __init__(self, artefact: Artefact, threads: int | None, *, watched: bool = False) -> None:
        """`watched`: the graph gives the results of its blocks, too."""
        from agln_fast.engines.onnx_file import parse_graph

        openvino = import_quietly("openvino")
        self._artefact, self.precision = artefact, artefact.precision
        path, parts = str(artefact.file), [artefact.read(file) for file in artefact.files]
        if len(parts) == 1:
            parse_graph(parts[0], path)
        is_trial = len(parts) == 1  # of what other libraries compute more exactly than in bf16
        rest = "bf16" if "BF16" in _capabilities(openvino) and not is_trial else "fp32"
        hint = _HINTS[rest if self.precision == "int8" else self.precision]
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": hint,
            "CPU_DENORMALS_OPTIMIZATION": True,  # in its own threads
        }
        if is_trial and self.precision == "int8":
            # As the graph says, in fp32: OpenVINO's own arithmetic on signed inputs is wrong on some CPUs with VNNI.
            settings["LP_TRANSFORMS_MODE"] = False
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        global _opened_in
        _opened_in = os.getpid()
        try:
            with denormals_as_zero():
                core = openvino.Core()
                model = core.read_model(*parts)
                self._blocks = _watch(model, artefact) if watched else {}
                compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise BackendError(f"openvino cannot open {path}: {str(error).splitlines()[-1]}") from None
        built = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if built != hint:
            raise BackendError(f"openvino would run {artefact.name} in {built}, not in {self.precision}")
        if self.precision == "int8" and not (_mostly_quantised(model) if is_trial else _mostly_int8(compiled)):
            raise BackendError(
                f"openvino would run the convolutions of {path} in {built}, not in int8: "
                "the file is not quantised, or not for this CPU; build it again with `agln-fast rebuild`"
            )
        ports = (list(map(_port, listed)) for listed in (compiled.inputs, compiled.outputs[:1]))
        check_ports(artefact, *ports)
        self._request: Any = compiled.create_infer_request()

    def _run(self, image: Array) -> Array:
        # The request owns its output buffer and overwrites it in the next run.
        with denormals_as_zero():
            return np.array(self._request.infer([image], share_inputs=True)[0])

    def run_blocks(self, image: Array) -> dict[str, Array]:
        """The result of each block for one batch, of an engine that is `watched`."""
        with self._gate.turn(), denormals_as_zero():
            outputs = self._request.infer([image], share_inputs=True)
            return {block: np.array(outputs[place]) for block, place in self._blocks.items()}

    def _finish(self, output: Array) -> Array:
        return as_promised(output, self._artefact)

    def _release(self) -> None:
        self._request = None


def _capabilities(openvino: Any) -> list[str]:
    """What the CPU computes in, e.g. ["FP32", "BF16", "INT8"]."""
    return cast(list[str], openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _watch(model: Any, artefact: Artefact) -> dict[str, int]:
    """Make `model` give the results of its blocks, too; returns the place of each among the outputs."""
    ports = {name: port for node in model.get_ops() for port in node.outputs() for name in port.names}
    tensors = block_tensors(artefact, ports)
    model.add_outputs([tensor for tensor in tensors.values() if tensor not in model.output(0).names])
    places = {name: place for place, port in enumerate(model.outputs) for name in port.names}
    return {block: places[tensor] for block, tensor in tensors.items()}


def _port(port: Any) -> Port:
    kind = port.element_type.get_type_name()
    shape = [side.get_length() if side.is_static else None for side in port.partial_shape]
    return Port(min(port.names, default=""), _TYPES.get(kind, kind), shape)


def _mostly_quantised(model: Any) -> bool:
    """Whether more than half of the convolutions take what was rounded to int8, and scaled back."""
    rounded: list[bool] = []
    for node in model.get_ops():
        if node.get_type_name() == "Convolution":
            source = node.input_value(0).get_node()
            while source.get_type_name() in ("Convert", "Subtract", "Multiply"):
                source = source.input_value(0).get_node()
            rounded.append(source.get_type_name() == "FakeQuantize")
    return 2 * sum(rounded) > len(rounded)


def _mostly_int8(compiled: Any) -> bool:
    """Whether more than half of the convolutions that the compiled graph executes take int8."""
    convolutions = [
        information["runtimePrecision"].astype(str)
        for information in (node.rt_info for node in compiled.get_runtime_model().get_ops())
        if information["layerType"].astype(str) == "Convolution"
    ]
    return 2 * sum(kind in _INTEGERS for kind in convolutions) > len(convolutions)
