"""Backend `onnxruntime`: the exported graph on ONNX Runtime's CPU or CUDA execution provider."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, cast

import onnx

from agln_fast.backends.base import Array, Backend, as_promised
from agln_fast.backends.denormals import denormals_as_zero
from agln_fast.bundle import Bundle, EngineRecord
from agln_fast.contract import Precision
from agln_fast.errors import BackendError

__all__ = ["OnnxRuntimeBackend", "graph_precision"]

_PRECISIONS: dict[int, Precision] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def graph_precision(path: Path) -> Precision:
    """The one type that the weights of all convolutions of an ONNX file have.

    Raises:
        BackendError: not an ONNX file, no convolution in it, or convolutions of several types.
    """
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf raises several unrelated types
        raise BackendError(f"{path}: not an ONNX file ({type(error).__name__})") from None
    types = {initializer.name: initializer.data_type for initializer in graph.initializer}
    found = {types.get(node.input[1]) for node in graph.node if node.op_type == "Conv"}
    if len(found) != 1 or (kind := found.pop()) not in _PRECISIONS:
        raise BackendError(f"{path}: its convolutions are not of one floating-point type")
    return _PRECISIONS[cast(int, kind)]


def _obstacle_to_fp16() -> str | None:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return "onnxruntime has no fp16 convolution on x86 CPUs and would compute in fp32"
    return None


class OnnxRuntimeBackend(Backend):
    """Runs the ONNX file as it is typed: fp32, or fp16 where there are kernels for it (CUDA, Arm)."""

    name: ClassVar[str] = "onnxruntime"

    @classmethod
    def obstacle(cls, engine: EngineRecord) -> str | None:
        if find_spec("onnxruntime") is None:
            return "package onnxruntime is not installed: pip install onnxruntime"
        import onnxruntime

        if engine.precision not in _PRECISIONS.values():
            return f"onnxruntime has no {engine.precision} engines, which are for OpenVINO: take fp32 or fp16"
        if engine.precision == "fp16" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return _obstacle_to_fp16()
        return None

    def __init__(self, bundle: Bundle, engine: EngineRecord, *, device: str | None, threads: int | None) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise BackendError("package onnxruntime is not installed: pip install onnxruntime") from None

        self.device = device or "cpu"
        self._bundle, self._engine = bundle, engine
        kind, _, index = self.device.partition(":")
        provider = _PROVIDERS.get(kind)
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise BackendError(f"onnxruntime cannot use device {self.device!r}: it has {', '.join(available)}")
        path = bundle.path / engine.file
        self.precision = graph_precision(path)
        if kind == "cpu" and self.precision == "fp16" and (obstacle := _obstacle_to_fp16()):
            raise BackendError(obstacle)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")  # in its own threads
        if kind == "cuda":
            # Otherwise nodes without a CUDA kernel would quietly run on the CPU.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        providers: list[Any] = [(provider, {"device_id": index or "0"}) if kind == "cuda" else provider]
        try:
            with denormals_as_zero():
                session = onnxruntime.InferenceSession(path, options, providers=providers)
        except Exception as error:  # its exceptions have no common base
            raise BackendError(f"onnxruntime cannot open {path}: {str(error).splitlines()[0]}") from None
        if session.get_providers()[0] != provider:
            raise BackendError(f"onnxruntime could not start {provider} and would run on {session.get_providers()[0]}")
        self._session: Any = session
        self._input = session.get_inputs()[0].name

    def _run(self, image: Array) -> Array:
        with denormals_as_zero():
            output = self._session.run(None, {self._input: image})[0]
        return as_promised(output, self._bundle, self._engine)

    def _release(self) -> None:
        self._session = None
