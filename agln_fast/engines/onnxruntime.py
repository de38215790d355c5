"""Kind `onnxruntime`: the exported graph on ONNX Runtime's CPU or CUDA execution provider."""

from __future__ import annotations

import platform
from collections.abc import Collection, Generator, Iterable
from dataclasses import replace
from typing import Any

from agln_fast.artefact import Artefact
from agln_fast.engines.base import Array, Engine, EngineKind, Port, Workbench, as_promised, block_tensors, check_ports
from agln_fast.engines.denormals import denormals_as_zero
from agln_fast.errors import BackendError, MissingPackageError, printable
from agln_fast.plan.plan import ALGEBRA, NO_PLAN, Plan
from agln_fast.precision import Precision
from agln_fast.telemetry import import_quietly

__all__ = ["OnnxRuntime", "OnnxRuntimeEngine"]

_TYPES = {"tensor(uint8)": "uint8", "tensor(int32)": "int32", "tensor(float)": "float32"}
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntime(EngineKind):
    """Runs the ONNX file as it is typed: fp32, or fp16 where there are kernels for it (CUDA, Arm)."""

    name = "onnxruntime"
    precisions = ("fp32", "fp16")  # it has no bf16 convolution on CPUs
    devices = ("cpu", "cuda")
    package = extra = "onnxruntime"
    plans = "timing"
    start = replace(ALGEBRA, pixel_major_attention=True)  # its convolutions keep channels adjacent
    settings = "ORT_ENABLE_ALL, denormals as zero"

    def missing(self) -> str | None:
        try:
            import_quietly("onnxruntime")
        except (ImportError, OSError) as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "onnxruntime":
                return str(MissingPackageError("onnxruntime", self.extra))
            return f'package "onnxruntime" is installed but does not load: {printable(error)}'
        return None

    def _obstacle(self, precision: Precision, where: str) -> str | None:
        available = import_quietly("onnxruntime").get_available_providers()
        if _PROVIDERS[where] not in available:
            return f"onnxruntime cannot use device {where!r}: it has {', '.join(available)}"
        return _obstacle_to_fp16() if (precision, where) == ("fp16", "cpu") else None

    def make(
        self, bench: Workbench, precision: Precision, plan: Plan = NO_PLAN, floating: Collection[str] = ()
    ) -> Artefact:
        return self.artefact(bench, precision, plan, bench.graph(precision, plan))

    def open(self, artefact: Artefact, *, device: str | None = None, threads: int | None = None) -> Engine:
        return OnnxRuntimeEngine(artefact, device or self.default_device(), threads)

    def blocks(
        self, artefact: Artefact, images: Iterable[Array], *, device: str | None = None, threads: int | None = None
    ) -> Generator[dict[str, Array], None, None]:
        from agln_fast.export.blocks import more_outputs, tensors_of

        data = artefact.read(artefact.file)
        tensors = block_tensors(artefact, tensors_of(data))
        watched = more_outputs(data, tensors.values())
        shown = replace(artefact, read=lambda _: watched)
        with OnnxRuntimeEngine(shown, device or self.default_device(), threads, only_output=False) as engine:
            for image in images:
                outputs = engine.run_all(image)
                yield {block: outputs[tensor] for block, tensor in tensors.items()}


def _obstacle_to_fp16() -> str | None:
    if platform.machine().lower() in ("x86_64", "amd64"):
        return "onnxruntime has no fp16 convolution on x86 CPUs and would compute in fp32"
    return None


class OnnxRuntimeEngine(Engine):
    """Says of its file itself what it computes in."""

    name = "onnxruntime"

    def __init__(self, artefact: Artefact, device: str, threads: int | None, *, only_output: bool = True) -> None:
        """`only_output`: the graph gives what the contract says, and nothing after it."""
        from agln_fast.engines.onnx_file import graph_precision, parse_graph

        onnxruntime = import_quietly("onnxruntime")
        self._artefact, self.device = artefact, device
        kind, _, index = device.partition(":")
        provider = _PROVIDERS[kind]
        path, data = str(artefact.file), artefact.read(artefact.file)
        self.precision = graph_precision(parse_graph(data, path), path)
        if (self.precision, kind) == ("fp16", "cpu") and (obstacle := _obstacle_to_fp16()):
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
            for listed in (session.get_inputs(), session.get_outputs()[: None if only_output else 1])
        )
        check_ports(artefact, *ports)
        self._session: Any = session
        self._input = session.get_inputs()[0].name

    def _run(self, image: Array) -> Array:
        with denormals_as_zero():
            output: Array = self._session.run(None, {self._input: image})[0]
        return output

    def run_all(self, image: Array) -> dict[str, Array]:
        """Every output of the graph for one batch, by its name."""
        with self._gate.turn(), denormals_as_zero():
            outputs = self._session.run(None, {self._input: image})
        return dict(zip((port.name for port in self._session.get_outputs()), outputs, strict=True))

    def _finish(self, output: Array) -> Array:
        return as_promised(output, self._artefact)

    def _release(self) -> None:
        self._session = None
