"""Backend `openvino`: the exported graph on OpenVINO's CPU plugin, in exactly the precision asked for.

An int8 engine is an OpenVINO IR whose graph says itself what is quantised (`export.quantize`). The rest of it runs in
bf16 where the CPU has it, and in fp32 elsewhere.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar, cast

import numpy as np

from agln_fast.bundle import Bundle
from agln_fast.engines.base import Array, Backend, Port, as_promised, check_ports
from agln_fast.engines.denormals import denormals_as_zero
from agln_fast.errors import BackendError, MissingPackageError
from agln_fast.manifest import EngineRecord
from agln_fast.telemetry import import_quietly

__all__ = ["OpenVinoBackend"]

_HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_CAPABILITIES = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16", "int8": "INT8"}
_TYPES = {"u8": "uint8", "i32": "int32", "f32": "float32"}
_INTEGERS = ("i8", "u8")

_opened_in: int | None = None  # the process that opened the first engine


def _obstacle_to_fork() -> str | None:
    if _opened_in in (None, os.getpid()):
        return None
    return (
        "this process was forked from one that had opened an OpenVINO engine, whose threads are not here: open the "
        "first one after the fork, or start processes with spawn or forkserver (docs/concurrency.md)"
    )


class OpenVinoBackend(Backend):
    """Sets the precision hint and reads it back: OpenVINO left alone takes bf16 where the CPU has it."""

    name: ClassVar[str] = "openvino"

    @classmethod
    def obstacle(cls, engine: EngineRecord) -> str | None:
        if reason := _obstacle_to_fork():
            return reason
        try:
            openvino = import_quietly("openvino")
        except ImportError:
            return str(MissingPackageError("openvino", "openvino"))
        has = _capabilities(openvino)
        if _CAPABILITIES[engine.precision] not in has:
            return f"this CPU has no {engine.precision} arithmetic for OpenVINO (it has {', '.join(has)})"
        return None

    def __init__(self, bundle: Bundle, engine: EngineRecord, *, device: str | None, threads: int | None) -> None:
        if device not in (None, "cpu"):
            raise BackendError(f"openvino runs on device 'cpu' here, not on {device!r}")
        obstacle = self.obstacle(engine)
        if obstacle:
            raise BackendError(obstacle)
        from agln_fast.engines.onnx_file import parse_graph

        openvino = import_quietly("openvino")
        self.device = "cpu"
        self._bundle, self._engine = bundle, engine
        path, parts = str(bundle.path / engine.file), [bundle.read(name) for name in engine.files]
        if len(parts) == 1:
            parse_graph(parts[0], path)
        rest = "bf16" if "BF16" in _capabilities(openvino) else "fp32"
        hint = _HINTS[rest if engine.precision == "int8" else engine.precision]
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": hint,
            "CPU_DENORMALS_OPTIMIZATION": True,  # in its own threads
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        global _opened_in
        _opened_in = os.getpid()
        try:
            with denormals_as_zero():
                core = openvino.Core()
                compiled = core.compile_model(core.read_model(*parts), "CPU", settings)
        except RuntimeError as error:
            raise BackendError(f"openvino cannot open {path}: {str(error).splitlines()[-1]}") from None
        built = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if built != hint:
            raise BackendError(f"openvino would run {engine.name} in {built}, not in {engine.precision}")
        if engine.precision == "int8" and not _mostly_int8(compiled):
            raise BackendError(
                f"openvino would run the convolutions of {path} in {built}, not in int8: "
                "the file is not quantised, or not for this CPU; build it again with `agln-fast rebuild`"
            )
        ports = (list(map(_port, listed)) for listed in (compiled.inputs, compiled.outputs))
        check_ports(bundle, engine, *ports)
        self.precision = engine.precision
        self._request: Any = compiled.create_infer_request()

    def _run(self, image: Array) -> Array:
        # The request owns its output buffer and overwrites it in the next run.
        with denormals_as_zero():
            return np.array(self._request.infer([image], share_inputs=True)[0])

    def _finish(self, output: Array) -> Array:
        return as_promised(output, self._bundle, self._engine)

    def _release(self) -> None:
        self._request = None


def _capabilities(openvino: Any) -> list[str]:
    """What the CPU computes in, e.g. ["FP32", "BF16", "INT8"]."""
    return cast(list[str], openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def _port(port: Any) -> Port:
    kind = port.element_type.get_type_name()
    shape = [side.get_length() if side.is_static else None for side in port.partial_shape]
    return Port(min(port.names, default=""), _TYPES.get(kind, kind), shape)


def _mostly_int8(compiled: Any) -> bool:
    """Whether more than half of the convolutions that the compiled graph executes take int8."""
    convolutions = [
        information["runtimePrecision"].astype(str)
        for information in (node.rt_info for node in compiled.get_runtime_model().get_ops())
        if information["layerType"].astype(str) == "Convolution"
    ]
    return 2 * sum(kind in _INTEGERS for kind in convolutions) > len(convolutions)
