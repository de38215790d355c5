"""What answers on a Ray cluster: HTTP and calls of other deployments in, requests to the replicas of `Bundles` out.

Ray does not repeat a request whose replica died while it ran. It is repeated here, on another one: a request changes
nothing, so it may run twice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import asdict, replace
from typing import Any

import orjson
from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from agln_fast import __version__
from agln_fast.errors import AglnError, BackendError, ConfigError
from agln_fast.serving.http import BodyLimit, is_file, page, read_request, refusal, write_response
from agln_fast.serving.line import Answer, Failure, Times
from agln_fast.serving.protocol import INPUTS, OUTPUTS, Array, Tensor, shape_of
from agln_fast.serving.ray.bundles import Inputs
from agln_fast.serving.wire import Request, Response
from agln_fast.serving.worker import Description

__all__ = ["Ingress", "web"]

_READY_S = 5.0
_PAUSE_S = 0.05  # before a request that was accepted once is tried again where there is no room, or not the bundle
_ATTEMPTS = 3  # a request at which replicas die is not tried on all of them
_LOST = (RayActorError, ObjectLostError, WorkerCrashedError, NodeDiedError)

log = logging.getLogger("ray.serve")


class Ingress:
    """A replica that answers over HTTP, and to other deployments of Ray by `segment`."""

    def __init__(self, names: Sequence[str], bundles: DeploymentHandle[Any], timeout_s: float) -> None:
        self._bundles, self._timeout_s = bundles, timeout_s
        self._of = {name: bundles.options(multiplexed_model_id=name) for name in names}

    async def segment(
        self, inputs: Inputs, outputs: Sequence[str] = (), model: str = "", timeout_s: float | None = None
    ) -> dict[str, Array]:
        """The protocol's outputs of a request; `model` may be left out where there is one.

        Raises:
            ConfigError: what the request brings or asks makes no sense, or there is no such model.
            BackendError: the engine failed, or too many requests wait.
            TimeoutError: it took too long.
        """
        name = model or (next(iter(self._of)) if len(self._of) == 1 else "")
        try:
            return (await self._answer(name, Request(inputs, tuple(outputs), timeout_s=timeout_s))).outputs
        except _RefusedError as error:
            kind = {400: ConfigError, 404: ConfigError, 504: TimeoutError}.get(error.status, BackendError)
            raise kind(str(error)) from None

    async def infer(self, request: HttpRequest) -> HttpResponse:
        asked = await read_request(request)
        response = await self._answer(request.path_params["name"], asked)
        return await write_response(response, asked.binary, file=is_file(request))

    async def metadata(self, request: HttpRequest) -> HttpResponse:
        name = request.path_params["name"]
        about = await self._describe(name)
        return _json(
            {
                "name": name,
                "versions": [],
                "platform": "agln-fast",
                "inputs": [_described(tensor, tensor.datatype, tensor.shape) for tensor in INPUTS.values()],
                "outputs": [_described(output, *shape_of(output, len(about.classes))) for output in OUTPUTS.values()],
                "parameters": about.parameters(),
            }
        )

    async def model_ready(self, request: HttpRequest) -> HttpResponse:
        await self._describe(request.path_params["name"])
        return HttpResponse()

    async def ready(self, request: HttpRequest) -> HttpResponse:
        """A replica answers, or is too busy to."""
        try:
            await self._call(self._bundles.alive, _READY_S)
        except _RefusedError as error:
            return HttpResponse(status_code=200 if error.retry_after else 503)
        return HttpResponse()

    async def live(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    async def server(self, request: HttpRequest) -> HttpResponse:
        return _json({"name": "agln-fast", "version": __version__, "extensions": ["binary_tensor_data"]})

    async def index(self, request: HttpRequest) -> HttpResponse:
        return _json([{"name": name, "version": "", "state": "READY", "reason": ""} for name in self._of])

    async def _answer(self, name: str, request: Request) -> Response:
        began = time.perf_counter()
        seconds = min(request.timeout_s or self._timeout_s, self._timeout_s)
        handle = self._handle(name).segment
        answer: Answer = await self._call(handle, seconds, name, request.inputs, request.outputs)
        if isinstance(answer.outputs, Failure):
            raise _RefusedError(answer.outputs.status, answer.outputs.message)
        times = answer.times
        spent = times.decode_ms + times.engine_ms + times.encode_ms
        waited = max(0.0, 1e3 * (time.perf_counter() - began) - spent)
        return Response(name, "", request.id, answer.outputs, _rounded(replace(times, queue_ms=waited)))

    async def _describe(self, name: str) -> Description:
        about: Description | Failure = await self._call(self._handle(name).describe, self._timeout_s, name)
        if isinstance(about, Failure):
            raise _RefusedError(about.status, about.message)
        return about

    def _handle(self, name: str) -> DeploymentHandle[Any]:
        if name not in self._of:
            raise _RefusedError(404, f"no model {name!r} here; known: {', '.join(self._of)}")
        return self._of[name]

    async def _call(self, handle: DeploymentHandle[Any], seconds: float, *arguments: Any) -> Any:
        """What a replica answers, or another one if it dies meanwhile."""
        deaths = 0
        try:
            async with asyncio.timeout(seconds):
                while True:
                    response: Any = handle.remote(*arguments)
                    try:
                        answer = await response
                        if answer is not None:
                            return answer
                    except asyncio.CancelledError:
                        response.cancel()
                        raise
                    except _LOST as error:
                        deaths += 1
                        log.warning("a replica died with a request, death %d: %s", deaths, error)
                        if deaths == _ATTEMPTS:
                            raise _RefusedError(500, f"{deaths} replicas died with this request") from None
                        continue
                    except BackPressureError:
                        if not deaths:
                            raise _RefusedError(503, "too many requests wait already", 1) from None
                    except DeploymentUnavailableError as error:
                        raise _RefusedError(503, error.message, 1) from None
                    except RayTaskError as error:
                        raise _RefusedError(500, f"{type(error.cause).__name__}: see the replica's log") from None
                    await asyncio.sleep(_PAUSE_S)
        except TimeoutError:
            raise _RefusedError(504, f"no answer within {seconds:g} s") from None


class _RefusedError(Exception):
    """A request that gets no result. status: of HTTP; retry_after: seconds after which it may be sent again."""

    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


def web(body_bytes: int) -> Starlette:
    model = "/v2/models/{name}"
    return Starlette(
        routes=[
            Route("/", page),
            Route("/v2", _to(Ingress.server)),
            Route("/v2/health/live", _to(Ingress.live)),
            Route("/v2/health/ready", _to(Ingress.ready)),
            Route("/v2/repository/index", _to(Ingress.index), methods=["POST"]),
            Route(model, _to(Ingress.metadata)),
            Route(f"{model}/ready", _to(Ingress.model_ready)),
            Route(f"{model}/infer", _to(Ingress.infer), methods=["POST"]),
        ],
        middleware=[Middleware(BodyLimit, most=body_bytes)],
    )


def _to(method: Callable[[Any, HttpRequest], Coroutine[Any, Any, HttpResponse]]) -> Any:
    """An endpoint that is a method of this replica."""

    async def endpoint(request: HttpRequest) -> HttpResponse:
        try:
            return await method(serve.get_replica_context().servable_object, request)
        except _RefusedError as error:
            return refusal(error.status, str(error), error.retry_after)
        except HTTPException as error:
            return refusal(error.status_code, error.detail)
        except AglnError as error:
            return refusal(400, str(error))

    return endpoint


def _json(document: Any) -> HttpResponse:
    return HttpResponse(orjson.dumps(document), media_type="application/json")


def _described(tensor: Tensor, datatype: str, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": datatype, "shape": shape}


def _rounded(times: Times) -> Times:
    return Times(**{name: round(value, 3) for name, value in asdict(times).items()})
