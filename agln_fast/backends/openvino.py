"""Backend `openvino`: the exported graph on OpenVINO's CPU plugin, in exactly the precision asked for."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import numpy as np

from agln_fast.backends.base import Array, Backend
from agln_fast.bundle import Bundle, EngineRecord
from agln_fast.errors import BackendError, MissingPackageError

__all__ = ["OpenVinoBackend"]

_HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_CAPABILITIES = {"fp32": "FP32", "fp16": "FP16", "bf16": "BF16"}


class OpenVinoBackend(Backend):
    """Sets the precision hint and reads it back: OpenVINO left alone takes bf16 where the CPU has it."""

    name: ClassVar[str] = "openvino"

    @classmethod
    def obstacle(cls, engine: EngineRecord) -> str | None:
        try:
            import openvino
        except ImportError:
            return str(MissingPackageError("openvino", "openvino"))
        has = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if _CAPABILITIES[engine.precision] not in has:
            return f"this CPU has no {engine.precision} arithmetic for OpenVINO (it has {', '.join(has)})"
        return None

    def __init__(self, bundle: Bundle, engine: EngineRecord, *, device: str | None, threads: int | None) -> None:
        if device not in (None, "cpu"):
            raise BackendError(f"openvino runs on device 'cpu' here, not on {device!r}")
        obstacle = self.obstacle(engine)
        if obstacle:
            raise BackendError(obstacle)
        import openvino

        self.device = "cpu"
        path = bundle.path / engine.file
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _HINTS[engine.precision],
        }
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            compiled = openvino.Core().compile_model(path, "CPU", settings)
        except RuntimeError as error:
            raise BackendError(f"openvino cannot open {path}: {str(error).splitlines()[-1]}") from None
        built = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        if built != _HINTS[engine.precision]:
            raise BackendError(f"openvino would run {engine.name} in {built}, not in {engine.precision}")
        self.precision = engine.precision
        self._request: Any = compiled.create_infer_request()

    def run(self, image: Array) -> Array:
        # The request owns its output buffer and overwrites it in the next run.
        return cast(Array, np.array(self._request.infer([image], share_inputs=True)[0]))

    def close(self) -> None:
        self._request = None
