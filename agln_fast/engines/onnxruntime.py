"""Backend `onnxruntime`: the exported graph on ONNX Runtime's CPU or CUDA execution provider."""

from __future__ import annotations

import platform
from typing import Any, ClassVar

from agln_fast.bundle import Bundle
from agln_fast.engines.base import Array, Backend, Port, as_promised, check_ports
from agln_fast.engines.denormals import denormals_as_zero
from agln_fast.engines.onnx_file import PRECISIONS, graph_precision, parse_graph
from agln_fast.errors import BackendError, printable
from agln_fast.manifest import EngineRecord
from agln_fast.telemetry import import_quietly

__all__ = ["OnnxRuntimeBackend"]

_TYPES = {"tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(float)": "float32"}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def _import() -> Any:
    """
    Raises:
        BackendError: it is not installed, or does not load.
    """
    try:
        return import_quietly("onnxruntime")
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
            # It comes with agln-fast itself, without an extra.
            raise BackendError('package "onnxruntime" is not installed: pip install onnxruntime') from None
        raise BackendError(f'package "onnxruntime" is installed but does not load: {printable(error)}') from error


def _obstacle_to_fp16() -> str | None:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return "onnxruntime has no fp16 convolution on x86 CPUs and would compute in fp32"
    return None


class OnnxRuntimeBackend(Backend):
    """Runs the ONNX file as it is typed: fp32, or fp16 where there are kernels for it (CUDA, Arm)."""

    name: ClassVar[str] = "onnxruntime"

    @classmethod
    def obstacle(cls, engine: EngineRecord) -> str | None:
        try:
            onnxruntime = _import()
        except BackendError as error:
            return str(error)
        if engine.precision not in PRECISIONS.values():
            return f"onnxruntime has no {engine.precision} engines, which are for OpenVINO: take fp32 or fp16"
        if engine.precision == "fp16" and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            return _obstacle_to_fp16()
        return None

    def __init__(self, bundle: Bundle, engine: EngineRecord, *, device: str | None, threads: int | None) -> None:
        onnxruntime = _import()
        self.device = device or "cpu"
        self._bundle, self._engine = bundle, engine
        kind, _, index = self.device.partition(":")
        provider = _PROVIDERS.get(kind)
        available = onnxruntime.get_available_providers()
        if provider not in available:
            raise BackendError(f"onnxruntime cannot use device {self.device!r}: it has {', '.join(available)}")
        path, data = str(bundle.path / engine.file), bundle.read(engine.file)
        self.precision = graph_precision(parse_graph(data, path), path)
        if kind == "cpu" and self.precision == "fp16" and (obstacle := _obstacle_to_fp16()):
            raise BackendError(obstacle)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.set_denormal_as_zero", "1")  # in its own threads
        # Otherwise they spin for tens of milliseconds after a run, and whatever comes next has a core less.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if kind == "cuda":
            # Otherwise nodes without a CUDA kernel would quietly run on the CPU.
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        providers: list[Any] = [(provider, {"device_id": index or "0"}) if kind == "cuda" else provider]
        try:
            with denormals_as_zero():
                session = onnxruntime.InferenceSession(data, options, providers=providers)
            session._model_bytes = None  # it would keep them as long as it lives, to start again elsewhere
        except Exception as error:  # its exceptions have no common base
            raise BackendError(f"onnxruntime cannot open {path}: {str(error).splitlines()[0]}") from None
        if session.get_providers()[0] != provider:
            raise BackendError(f"onnxruntime could not start {provider} and would run on {session.get_providers()[0]}")
        ports = (
            [Port(port.name, _TYPES.get(port.type, port.type), port.shape) for port in listed]
            for listed in (session.get_inputs(), session.get_outputs())
        )
        check_ports(bundle, engine, *ports)
        self._session: Any = session
        self._input = session.get_inputs()[0].name

    def _run(self, image: Array) -> Array:
        with denormals_as_zero():
            output: Array = self._session.run(None, {self._input: image})[0]
        return output

    def _finish(self, output: Array) -> Array:
        return as_promised(output, self._bundle, self._engine)

    def _release(self) -> None:
        self._session = None
