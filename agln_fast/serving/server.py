"""`agln-fast serve`: MLServer with a front of our own.

MLServer brings the endpoints of health, metadata and repository, the versions of models, Prometheus, uvicorn and
gRPC. What a request for inference goes through is replaced: MLServer turns each value of a tensor into a Python object,
takes no binary tensors over HTTP, and answers 400 where a balancer needs 503.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import signal
import socket
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import grpc
import orjson
import uvicorn
from mlserver import ModelSettings, Settings
from mlserver.errors import MLServerError
from mlserver.grpc import dataplane_pb2 as pb
from mlserver.grpc.dataplane_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from mlserver.grpc.model_repository_pb2_grpc import add_ModelRepositoryServiceServicer_to_server
from mlserver.grpc.server import GRPCServer, ModelRepositoryServicer
from mlserver.grpc.servicers import InferenceServicer
from mlserver.handlers import DataPlane, ModelRepositoryHandlers
from mlserver.metrics import MetricsServer
from mlserver.registry import MultiModelRegistry
from mlserver.repository import ModelRepository
from mlserver.rest import RESTServer
from mlserver.settings import ModelParameters
from mlserver.types import RepositoryIndexRequest
from prometheus_client import Counter
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from agln_fast import __version__
from agln_fast.errors import AglnError, BackendError
from agln_fast.serving.http import BodyLimit, is_file, json_of, page, read_request, refusal, unless_gone, write_response
from agln_fast.serving.model import BundleModel, Limits, RefusedError
from agln_fast.serving.wire import Request, Response, read_protobuf

__all__ = ["Addresses", "Options", "Served", "serve"]

_CONTROL = ("/v2/repository/models/{model_name}/load", "/v2/repository/models/{model_name}/unload")
_LEFT_OUT = ("/infer", "/generate", "/infer_stream", "/generate_stream", "/ready", "/docs", "/dataplane.json")
"""Routes of MLServer: replaced, without sense for pictures, or pages that load scripts from elsewhere."""
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


log = logging.getLogger("agln_fast.serving")


@dataclass(frozen=True)
class Served:
    """A bundle by its name and version, and the fields of `Engine` for it."""

    bundle: str
    name: str
    version: str | None = None
    engine: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """host and ports, 0 for free ones; body_bytes: the largest request; drain_s: for what is in flight at the end;
    linger_s: before that, not ready any more but still serving, so that balancers notice; control: whether clients may
    load and unload."""

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 8081
    metrics_port: int = 8082
    limits: Limits = field(default_factory=Limits)
    body_bytes: int = 32 << 20
    drain_s: float = 30.0
    linger_s: float = 0.0
    control: bool = False


@dataclass(frozen=True)
class Addresses:
    """Where it answers."""

    http: str
    grpc: str
    metrics: str


async def serve(models: Sequence[Served], options: Options, announce: Callable[[Addresses], None]) -> None:
    """Serve until SIGTERM or SIGINT; `announce` is called when everything is ready. A second signal ends at once.

    Raises:
        BackendError, BundleError: a port that is in use, or a bundle that cannot be served.
    """
    with contextlib.ExitStack() as stack:
        ports = options.http_port, options.metrics_port
        sockets = [stack.enter_context(_listen(options.host, port)) for port in ports]
        server = _Server(options, sockets, [_settings(model, options.limits) for model in models])
        await server.run(announce)


def _settings(model: Served, limits: Limits) -> ModelSettings:
    extra = {**asdict(limits), **model.engine}
    parameters = ModelParameters(uri=model.bundle, version=model.version, extra=extra)
    return ModelSettings(name=model.name, implementation=BundleModel, parameters=parameters)


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else header and body are 40 ms apart
        return listener
    except OSError as error:
        raise BackendError(f"{_address(host, port)}: {error.strerror or error}; choose another host or port") from None


class _Server:
    """MLServer's parts put together, but for its order at the end, which ends the engines before the requests."""

    def __init__(self, options: Options, sockets: list[socket.socket], models: list[ModelSettings]) -> None:
        self._options, self._sockets, self._models = options, sockets, models
        self._end, self._at_once = asyncio.Event(), asyncio.Event()
        settings = Settings(
            debug=False,
            host=options.host,
            grpc_port=options.grpc_port,
            grpc_max_message_length=options.body_bytes,
            parallel_workers=0,
            gzip_enabled=False,
            server_name="agln-fast",
            server_version=__version__,
            extensions=["binary_tensor_data", *(["model_repository"] if options.control else [])],
        )
        self._registry = MultiModelRegistry()
        self._plane = _Plane(settings, self._registry)
        handlers = _Handlers(_Repository(models), self._registry)
        self._rest = _Rest(settings, self._plane, handlers)
        self._rest.prepare(sockets[0], options)
        self._grpc = _Grpc(settings, self._plane, handlers)
        self._grpc.prepare(options)
        self._metrics = _Metrics(settings)
        self._metrics.socket = sockets[1]
        logging.getLogger("mlserver").setLevel(logging.WARNING)

    async def run(self, announce: Callable[[Addresses], None]) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._asked_to_end)
        servers: list[Any] = [self._grpc, self._rest, self._metrics]
        running = [asyncio.create_task(server.start()) for server in servers]
        end, loading = asyncio.create_task(self._end.wait()), asyncio.create_task(self._load())
        try:
            await asyncio.wait([end, loading, *running], return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                ports = self._sockets[0].getsockname()[1], self._grpc.port, self._sockets[1].getsockname()[1]
                at = [_address(self._options.host, port) for port in ports]
                self._plane.open = True
                announce(Addresses(f"http://{at[0]}", at[1], f"http://{at[2]}/metrics"))
            done, _ = await asyncio.wait([end, *running], return_when=asyncio.FIRST_COMPLETED)
            for ended in done:
                ended.result()  # of a server that fell over
            await self._drain()
        finally:
            loading.cancel()
            await asyncio.gather(loading, return_exceptions=True)
            for server in servers:
                await server.stop()
            await asyncio.gather(*running, return_exceptions=True)
            for model in await self._registry.get_models():
                await model.stop()

    async def _load(self) -> None:
        for settings in self._models:
            try:
                await self._registry.load(settings)
            except MLServerError as error:
                raise BackendError(str(error)) from None

    async def _drain(self) -> None:
        """Not ready from now on; after a while nothing new is taken, and what is in flight is answered."""
        steps = [asyncio.create_task(self._serve_on()), asyncio.create_task(self._at_once.wait())]
        _, rest = await asyncio.wait(steps, return_when=asyncio.FIRST_COMPLETED)
        for step in rest:
            step.cancel()

    async def _serve_on(self) -> None:
        plane = self._plane
        plane.open = False
        await asyncio.sleep(self._options.linger_s)
        plane.refuses = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._options.drain_s):
                while plane.in_flight:
                    await asyncio.sleep(0.01)

    def _asked_to_end(self) -> None:
        (self._at_once if self._end.is_set() else self._end).set()


class _Plane(DataPlane):  # type: ignore[misc]
    """open: whether it is ready. refuses: whether nothing new is taken."""

    open = False
    refuses = False
    in_flight = 0

    async def ready(self) -> bool:
        """Not where every model was unloaded, either."""
        models = list(await self._model_registry.get_models())
        return self.open and bool(models) and all(model.ready for model in models)

    async def model_ready(self, name: str, version: str | None = None) -> bool:
        return self.open and await super().model_ready(name, version or None)

    async def place(self, name: str, version: str | None) -> BundleModel:
        """The model, which has place for a request: asked before a body is read and parsed.

        Raises:
            MLServerError: an unknown model, or one that takes no request now.
        """
        if self.refuses:
            raise RefusedError(503, "the server is about to end", 1)
        try:
            model: BundleModel = await self._model_registry.get_model(name, version or None)
        except MLServerError:
            if self.open:
                raise
            raise RefusedError(503, "the server is starting", 1) from None
        if not model.ready:
            raise RefusedError(503, f"model {model.name} is not ready", 1)
        model.check_place()
        return model

    async def segment(self, model: BundleModel, request: Request) -> Response:
        """
        Raises:
            RefusedError: as `BundleModel.segment`.
        """
        self.in_flight += 1
        try:
            return await model.segment(request)
        finally:
            self.in_flight -= 1


class _Handlers(ModelRepositoryHandlers):  # type: ignore[misc]
    """One load or unload after the other: two at once would leave processes behind."""

    def __init__(self, repository: _Repository, registry: MultiModelRegistry) -> None:
        super().__init__(repository, registry)
        self._turn = asyncio.Lock()

    async def load(self, name: str) -> bool:
        async with self._turn:
            return bool(await super().load(name))

    async def unload(self, name: str) -> bool:
        async with self._turn:
            return bool(await super().unload(name))


class _Repository(ModelRepository):  # type: ignore[misc]
    """The bundles that the server was started with: no request names a path."""

    def __init__(self, models: list[ModelSettings]) -> None:
        self._models = models

    async def find(self, name: str) -> list[ModelSettings]:
        found = [model for model in self._models if model.name == name]
        if not found:
            raise RefusedError(404, f"model {name} is none of this server's")
        return found

    async def list(self) -> list[ModelSettings]:
        return self._models


class _Uvicorn(uvicorn.Server):
    """Leaves signals to `_Server`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _uvicorn(app: Any) -> _Uvicorn:
    return _Uvicorn(
        uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", server_header=False, timeout_graceful_shutdown=5
        )
    )


class _Rest(RESTServer):  # type: ignore[misc]
    def prepare(self, listener: socket.socket, options: Options) -> None:
        """Put our routes before MLServer's, and limits before all of them."""
        self._socket = listener
        routes = self._app.router.routes
        kept = [
            route
            for route in routes
            if not route.path.endswith(_LEFT_OUT) and (options.control or route.path not in _CONTROL)
        ]
        models = ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
        routes[:] = [
            Route("/", page),
            Route("/v2/health/live", self._live),
            Route("/v2/health/ready", self._ready),
            Route("/v2/repository/index", self._index, methods=["POST"]),
            *(Route(f"{model}/ready", self._model_ready) for model in models),
            *(Route(f"{model}/infer", self._infer, methods=["POST"]) for model in models),
            *kept,
        ]
        self._app.add_exception_handler(HTTPException, lambda _, error: refusal(error.status_code, error.detail))
        self._app.add_middleware(BodyLimit, most=options.body_bytes)

    async def start(self) -> None:
        self._server = _uvicorn(self._app)
        await self._server.serve(sockets=[self._socket])

    async def stop(self, sig: int | None = None) -> None:
        self._server.should_exit = True

    async def _live(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    async def _ready(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(status_code=200 if await self._data_plane.ready() else 503)

    async def _model_ready(self, request: HttpRequest) -> HttpResponse:
        try:
            ready = await self._data_plane.model_ready(*_model(request))
        except MLServerError as error:
            return _error(error)
        return HttpResponse(status_code=200 if ready else 503)

    async def _index(self, request: HttpRequest) -> HttpResponse:
        """MLServer's own route refuses a request without a body, which is how tritonclient asks."""
        try:
            asked = json_of(await request.body() or b"{}")
            ready = asked.get("ready") if isinstance(asked, dict) else None
            found = await self._model_repository_handlers.index(RepositoryIndexRequest(ready=ready is True))
        except Exception as error:
            return _error(error)
        models = [model.model_dump(mode="json", exclude_none=True) for model in found.root]
        return HttpResponse(orjson.dumps(models), media_type="application/json")

    async def _infer(self, request: HttpRequest) -> HttpResponse:
        try:
            model = await self._data_plane.place(*_model(request))
            asked = await read_request(request)
            response = await unless_gone(request, self._data_plane.segment(model, asked))
            return await write_response(response, asked.binary, file=is_file(request))
        except ClientDisconnect:
            return HttpResponse(status_code=400)  # which nobody reads
        except Exception as error:
            return _error(error)


class _Grpc(GRPCServer):  # type: ignore[misc]
    def prepare(self, options: Options) -> None:
        """Listen. Raises BackendError where it cannot be."""
        # Without the option two servers could share a port, and nobody would notice.
        self._server = grpc.aio.server(
            options=[*self._get_options(), ("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 0)]
        )
        servicer = _Servicer(self._data_plane, self._model_repository_handlers)
        servicer.control = options.control
        add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
        if options.control:
            repository = ModelRepositoryServicer(self._model_repository_handlers)
            add_ModelRepositoryServiceServicer_to_server(repository, self._server)
        address = _address(options.host, options.grpc_port)
        try:
            self.port = self._server.add_insecure_port(address)
        except RuntimeError:
            raise BackendError(f"{address}: cannot be listened on; choose another host or port") from None

    async def start(self) -> None:
        await self._server.start()
        await self._server.wait_for_termination()

    async def stop(self, sig: int | None = None) -> None:
        await self._server.stop(grace=1.0)


class _Metrics(MetricsServer):  # type: ignore[misc]
    socket: socket.socket

    async def start(self) -> None:
        self._server = _uvicorn(self._app)
        await self._server.serve(sockets=[self.socket])

    async def stop(self, sig: int | None = None) -> None:
        self._server.should_exit = True


class _Servicer(InferenceServicer):  # type: ignore[misc]
    control = False

    async def ModelInfer(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        try:
            model = await self._data_plane.place(request.model_name, request.model_version)
            asked = read_protobuf(request)
            remaining = context.time_remaining()
            if remaining is not None:
                limit = max(1e-6, min(remaining, asked.timeout_s or remaining))
                asked = Request(asked.inputs, asked.outputs, asked.id, limit)
            return (await self._data_plane.segment(model, asked)).to_protobuf()
        except Exception as error:
            status, message, wait = _reason(error)
            if wait:
                context.set_trailing_metadata((("retry-after", str(wait)),))
            await context.abort(_STATUS.get(status, grpc.StatusCode.INTERNAL), message)

    async def ModelReady(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        try:
            return pb.ModelReadyResponse(ready=await self._data_plane.model_ready(request.name, request.version))
        except MLServerError as error:
            await context.abort(_STATUS.get(error.status_code, grpc.StatusCode.INTERNAL), str(error))

    async def RepositoryIndex(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        response = await super().RepositoryIndex(request, context)
        for model in response.models:
            model.state = model.state.removeprefix("State.")  # as the specification has it
        return response

    async def ModelStreamInfer(self, request_iterator: Any, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "a picture has one answer: use ModelInfer")

    async def RepositoryModelLoad(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        return await self._controlled(super().RepositoryModelLoad, request, context)

    async def RepositoryModelUnload(self, request: Any, context: grpc.aio.ServicerContext) -> Any:  # noqa: N802
        return await self._controlled(super().RepositoryModelUnload, request, context)

    async def _controlled(self, method: Any, request: Any, context: grpc.aio.ServicerContext) -> Any:
        if not self.control:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "started without --model-control")
        return await method(request, context)


def _model(request: HttpRequest) -> tuple[str, str | None]:
    return request.path_params["name"], request.path_params.get("version")


def _reason(error: Exception) -> tuple[int, str, int | None]:
    """Status of HTTP, message, and the seconds after which the request may be sent again; it is counted."""
    wait: int | None = None
    if isinstance(error, HTTPException):
        status, message = error.status_code, error.detail
    elif isinstance(error, MLServerError):
        status, message, wait = error.status_code, str(error), getattr(error, "retry_after", None)
    elif isinstance(error, AglnError):
        status, message = 400, str(error)
    else:
        status, message = 500, f"{type(error).__name__}: see the server's log"
        log.error("a request has failed", exc_info=error)
    _refused().labels(status=status).inc()
    return status, message, wait


def _error(error: Exception) -> HttpResponse:
    return refusal(*_reason(error))


@functools.cache
def _refused() -> Counter:
    return Counter("agln_fast_refused", "Requests that got no result, by the status of HTTP.", ["status"])
