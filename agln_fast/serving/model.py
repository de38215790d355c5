"""A bundle as a model of MLServer: a bounded queue, deadlines, and the processes that the engine runs in.

MLServer's own batching is not used: it merges tensors of one shape, no queue of it can be full, it knows no deadline.
"""

from __future__ import annotations

import asyncio
import functools
import math
import time
from dataclasses import asdict, dataclass, fields
from typing import Any

from mlserver import MLModel, ModelSettings
from mlserver.errors import MLServerError
from mlserver.types import (
    Datatype,
    InferenceRequest,
    InferenceResponse,
    MetadataModelResponse,
    MetadataTensor,
    Parameters,
    ResponseOutput,
    TensorData,
)
from mlserver.utils import get_model_uri
from prometheus_client import Gauge, Histogram

from agln_fast.errors import AglnError, ConfigError
from agln_fast.serving.line import Failure, Times
from agln_fast.serving.protocol import INPUTS, OUTPUTS, shape_of
from agln_fast.serving.wire import Request, Response, read_tensor, read_timeout
from agln_fast.serving.worker import Engine, Worker

__all__ = ["BundleModel", "Limits", "RefusedError"]

_DRAIN_S = 30.0
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
_IMAGES = (1, 2, 4, 8, 16, 32, 64)


class RefusedError(MLServerError):  # type: ignore[misc]  # MLServer has no types
    """A request that gets no result. status_code: of HTTP; retry_after: seconds after which it may be sent again."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message, status)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Limits:
    """workers: processes, each with the engine. queue: requests that may wait or run at once; timeout_s: until a
    request is late, unless it says so itself; canary_s: seconds between two canaries, and what each may take."""

    workers: int = 1
    queue: int = 64
    timeout_s: float = 30.0
    canary_s: float = 5.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ConfigError(f"{name} {value}: must be above 0")


class BundleModel(MLModel):  # type: ignore[misc]
    """In `model-settings.json`: `parameters.uri` is the bundle, `parameters.extra` any fields of `Engine` and `Limits`.

    It becomes ready when every process has run the engine, and is not while none answers a canary.
    """

    def __init__(self, settings: ModelSettings) -> None:
        self._loaded = False
        self._workers: list[Worker] = []
        super().__init__(settings)
        extra = dict((settings.parameters.extra if settings.parameters else None) or {})
        known = {field.name: kind for kind in (Engine, Limits) for field in fields(kind) if field.name != "bundle"}
        if unknown := set(extra) - set(known):
            raise ConfigError(f"extra parameters {sorted(unknown)} of model {settings.name}; known: {sorted(known)}")
        self._limits = Limits(**{key: value for key, value in extra.items() if known[key] is Limits})
        self._engine = {key: value for key, value in extra.items() if known[key] is Engine}
        self._pace = 0.0  # seconds of the engine an image, lately
        self._metrics = _metrics()

    @property
    def ready(self) -> bool:
        return self._loaded and any(worker.healthy for worker in self._workers)

    @ready.setter
    def ready(self, value: bool) -> None:
        self._loaded = value

    @property
    def in_flight(self) -> int:
        """Requests that wait or run."""
        return sum(worker.in_flight for worker in self._workers)

    @property
    def pids(self) -> list[int]:
        """The processes that the engine runs in."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    async def load(self) -> bool:
        engine = Engine(await get_model_uri(self.settings), **self._engine)
        limits = self._limits
        self._workers = [
            Worker(engine, interval_s=limits.canary_s, limit_s=limits.canary_s) for _ in range(limits.workers)
        ]
        try:
            started = await asyncio.gather(*(worker.start() for worker in self._workers), return_exceptions=True)
            for outcome in started:
                if isinstance(outcome, BaseException):
                    raise RefusedError(500, str(outcome)) if isinstance(outcome, AglnError) else outcome
        except BaseException:  # also where the server is asked to end meanwhile
            await self.stop()
            raise
        labels = {"model": self.name, "version": self.version or ""}
        self._metrics.in_flight.labels(**labels).set_function(lambda: self.in_flight)
        self.inputs = [_described(tensor.name, tensor.datatype, tensor.shape) for tensor in INPUTS.values()]
        classes = len(self._description().classes)
        self.outputs = [_described(output.name, *shape_of(output, classes)) for output in OUTPUTS.values()]
        return True

    async def unload(self) -> bool:
        """What is in flight is answered first."""
        self._loaded = False
        await asyncio.gather(*(worker.drain(_DRAIN_S) for worker in self._workers))
        await self.stop()
        return True

    async def metadata(self) -> MetadataModelResponse:
        """Also what the classes are called, their colours, and which engine runs."""
        return MetadataModelResponse(
            name=self.name,
            versions=[self.version] if self.version else [],
            platform="agln-fast",
            inputs=self.inputs,
            outputs=self.outputs,
            parameters=Parameters(**self._description().parameters()),
        )

    @property
    def _alive(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.healthy] or self._workers

    def check_place(self) -> None:
        """
        Raises:
            RefusedError: 503, because the queue is full.
        """
        if self.in_flight >= self._limits.queue:
            wait = self.in_flight * self._pace / len(self._alive)
            raise RefusedError(503, f"{self._limits.queue} requests wait already", max(1, math.ceil(wait)))

    async def segment(self, request: Request) -> Response:
        """Answer a request, or refuse it.

        Raises:
            RefusedError: 400 for what it brings or asks, 500 when the engine failed, 503 when the queue is full or the
                engine's process has ended, 504 when it was late.
        """
        self.check_place()
        limits, alive = self._limits, self._alive
        deadline = time.monotonic() + min(request.timeout_s or limits.timeout_s, limits.timeout_s)
        worker = min(alive, key=lambda worker: worker.in_flight)
        answer = await worker.ask(request.inputs, request.outputs, deadline=deadline)
        if isinstance(answer.outputs, Failure):
            status = answer.outputs.status
            raise RefusedError(status, answer.outputs.message, 1 if status == 503 else None)
        times = answer.times
        self._pace += 0.1 * (1e-3 * times.engine_ms / times.batch_size - self._pace)
        version = self.version or ""
        self._metrics.observe(times, {"model": self.name, "version": version})
        return Response(self.name, version, request.id, answer.outputs, times)

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """For MLServer's own endpoints, where this model stands in a repository of `mlserver start`."""
        try:
            request = Request(
                {
                    tensor.name: read_tensor(tensor.name, Datatype(tensor.datatype).value, tensor.shape, tensor.data)
                    for tensor in payload.inputs
                },
                tuple(output.name for output in payload.outputs or ()),
                payload.id or "",
                read_timeout(getattr(payload.parameters, "timeout", None)),
            )
        except AglnError as error:
            raise RefusedError(400, str(error)) from None
        response = await self.segment(request)
        document, _ = response.to_json()
        return InferenceResponse(
            model_name=response.model,
            model_version=response.version or None,
            id=response.id,
            parameters=Parameters(**document["parameters"]),
            outputs=[
                ResponseOutput(
                    name=output["name"],
                    shape=list(output["shape"]),
                    datatype=output["datatype"],
                    parameters=Parameters(**output["parameters"]) if "parameters" in output else None,
                    data=TensorData(root=list(output["data"])),
                )
                for output in document["outputs"]
            ],
        )

    def _description(self) -> Any:
        return self._workers[0].description  # no property: MLServer looks at all of them before there is a worker

    async def stop(self) -> None:
        """End the processes; what is in flight gets 503."""
        await asyncio.gather(*(worker.stop() for worker in self._workers))


def _described(name: str, datatype: str, shape: tuple[int, ...]) -> MetadataTensor:
    return MetadataTensor(name=name, datatype=datatype, shape=list(shape))


class _Metrics:
    """Of all models of this process, in Prometheus' terms."""

    def __init__(self) -> None:
        names = ["model", "version"]

        def seconds(stage: str, doc: str) -> Histogram:
            return Histogram(f"agln_fast_{stage}_seconds", doc, names, buckets=_SECONDS)

        self._stages = {
            "queue_ms": seconds("queue", "From a request's arrival to its run, less its decoding."),
            "decode_ms": seconds("decode", "Decoding and resizing of a request's images."),
            "engine_ms": seconds("engine", "Runs of the engine that a request was in."),
            "encode_ms": seconds("encode", "From the engine's output to what the request asks for."),
        }
        self._batch = Histogram(
            "agln_fast_batch_images", "Images in the engine's run, of each request.", names, buckets=_IMAGES
        )
        self.in_flight = Gauge("agln_fast_in_flight", "Requests that wait or run.", names)

    def observe(self, times: Times, labels: dict[str, str]) -> None:
        """The times of a request that was answered."""
        for name, histogram in self._stages.items():
            histogram.labels(**labels).observe(1e-3 * getattr(times, name))
        self._batch.labels(**labels).observe(times.batch_size)


@functools.cache
def _metrics() -> _Metrics:
    return _Metrics()
