"""The Open Inference Protocol over HTTP, for any server that speaks ASGI: bodies, responses, a limit, and the page."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from importlib import resources
from typing import Any, TypeVar

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse

from agln_fast.errors import ConfigError, choose
from agln_fast.serving.protocol import OUTPUTS
from agln_fast.serving.wire import HEADER_LENGTH, Request, Response, read_binary, read_json, read_timeout

__all__ = ["BodyLimit", "is_file", "json_of", "page", "read_request", "refusal", "unless_gone", "write_response"]

T = TypeVar("T")

_BODY_S = 30.0  # for a body to come in
_LARGE = 1 << 20  # bytes that are parsed, or written, beside the event loop
_BODIES = 8  # of the largest size, that may be held at once
_POLICY = "default-src 'self'; img-src 'self' blob: data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


async def read_request(request: HttpRequest) -> Request:
    """JSON, JSON and binary tensors, or an image file alone with `?output=NAME`, once or more, and `?timeout=`.

    Raises:
        HTTPException: 415 for a body that is compressed, 413 and 408 as `BodyLimit`.
        ConfigError, ImageError: as `agln_fast.serving.wire.read_json`.
    """
    if request.headers.get("content-encoding", "identity") != "identity":
        raise HTTPException(415, "Content-Encoding: send the body as it is")
    body = await request.body()
    if is_file(request):
        names, timeout = request.query_params.getlist("output"), request.query_params.get("timeout")
        names = [choose("output", name, OUTPUTS) for name in names]
        return Request({"image": [body]}, tuple(names), timeout_s=read_timeout(timeout))
    length = request.headers.get(HEADER_LENGTH)
    return await _aside(len(body), lambda: _parse(body, length))


def _parse(body: bytes, length: str | None) -> Request:
    """`length`: of the JSON, where binary tensors follow it."""
    if length is None:
        return read_json(json_of(body))
    if not length.isdecimal() or len(length) > 10 or int(length) > len(body):
        raise ConfigError(f"{HEADER_LENGTH} {length[:20]}: the body has {len(body)} bytes")
    return read_binary(json_of(body[: int(length)]), body[int(length) :])


async def _aside(size: int, function: Callable[[], T]) -> T:
    """The result; in another thread where so many bytes would keep the others waiting."""
    return await asyncio.to_thread(function) if size > _LARGE else function()


async def unless_gone(request: HttpRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes. The body has been read.

    Raises:
        ClientDisconnect: it has gone.
    """
    running, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([running, gone], return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            raise ClientDisconnect
        return running.result()
    finally:
        running.cancel()
        gone.cancel()


async def _gone(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def write_response(response: Response, binary: frozenset[str], *, file: bool) -> HttpResponse:
    """JSON, with binary tensors behind it if there are any; for an image file whose one output is a file, that file."""
    times = asdict(response.times)
    stages = ", ".join(f"{key.removesuffix('_ms')};dur={times[key]}" for key in times if key.endswith("_ms"))
    headers = {"Server-Timing": stages}
    if file and len(response.outputs) == 1:
        [output] = response.outputs.values()
        if output.dtype == object:
            return HttpResponse(output[0], headers=headers, media_type="image/png")
    size = sum(array.nbytes for array in response.outputs.values())
    text, blobs = await _aside(size, lambda: _serialised(response, binary))
    if not blobs:
        return HttpResponse(text, headers=headers, media_type="application/json")
    headers[HEADER_LENGTH] = str(len(text))
    return HttpResponse(b"".join([text, *blobs]), headers=headers, media_type="application/octet-stream")


def _serialised(response: Response, binary: frozenset[str]) -> tuple[bytes, list[bytes]]:
    document, blobs = response.to_json(binary)
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY), blobs


def refusal(status: int, message: str, retry_after: int | None = None) -> HttpResponse:
    """What a request gets that gets no result; retry_after: seconds after which it may be sent again."""
    headers = {"Retry-After": str(retry_after)} if retry_after else {}
    if status in (408, 413):
        headers["Connection"] = "close"  # or what is left of the body would be read on
    return HttpResponse(orjson.dumps({"error": message}), status, headers, "application/json")


def is_file(request: HttpRequest) -> bool:
    """Whether it brings an image file alone."""
    return request.headers.get("content-type", "").lower().startswith("image/")


async def page(request: HttpRequest) -> HttpResponse:
    """Try the models in a browser."""
    text = (resources.files("agln_fast.serving") / "page.html").read_bytes()
    return HttpResponse(text, media_type="text/html", headers={"Content-Security-Policy": _POLICY})


class BodyLimit:
    """ASGI middleware. No body is larger than `most` bytes, takes half a minute to come, or was sent by a page of
    another origin; not many are held at once.
    """

    def __init__(self, app: Any, most: int) -> None:
        self._app, self._most, self._held = app, most, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if scope["method"] == "POST" and origin and origin.partition(b"://")[2] != headers.get(b"host"):
            await refusal(403, "a page of another origin asks")(scope, receive, send)
            return
        # One that does not say how long it is may be as long as any.
        length = int(headers.get(b"content-length", self._most if b"transfer-encoding" in headers else 0))
        if length > self._most:
            await refusal(413, self._message)(scope, receive, send)
            return
        if self._held + length > _BODIES * self._most:
            await refusal(503, "too many large requests at once", 1)(scope, receive, send)
            return
        taken, until = 0, asyncio.get_running_loop().time() + _BODY_S
        complete = False

        async def limited() -> Any:
            nonlocal taken, complete
            if complete:
                return await receive()  # whether the client is still there
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body did not come within {_BODY_S:.0f} s") from None
            taken += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if taken > self._most:
                raise HTTPException(413, self._message)
            return message

        self._held += length
        try:
            await self._app(scope, limited, send)
        finally:
            self._held -= length

    @property
    def _message(self) -> str:
        return f"a request has {self._most} bytes at most here"


def json_of(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise ConfigError(
            f"the body is no JSON ({error}); an image file needs Content-Type: image/jpeg or so"
        ) from None
