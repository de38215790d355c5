"""What a load balancer asks a server of the Open Inference Protocol over HTTP, and one picture for each model."""

from __future__ import annotations

import base64
import http.client
import io
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
from PIL import Image

from agln_fast.errors import ConfigError

__all__ = ["Check", "ask_all"]

_LIMIT_S = 30.0


@dataclass(frozen=True)
class Check:
    """A question, whether the answer was good, what it was, and after how many milliseconds it came."""

    question: str
    good: bool
    answer: str
    milliseconds: float


def ask_all(url: str) -> Iterator[Check]:
    """Whether it lives, is ready, what it is and has; of each model whether it is ready, and a picture segmented.

    Where nothing answers the first question, no more are asked.

    Raises:
        ConfigError: `url` is no address of HTTP.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # no port, no address
        good = False
    if not good:
        raise ConfigError(f"{url}: give the address of a server, e.g. http://127.0.0.1:8080")
    alive, _ = _ask(url, "alive", "GET", "/v2/health/live")
    yield alive
    if not alive.good:
        return
    yield _ask(url, "ready", "GET", "/v2/health/ready")[0]
    check, server = _ask(url, "server", "GET", "/v2", kind=dict)
    yield check if not check.good else _with(check, f"{server.get('name')} {server.get('version')}")
    check, index = _ask(url, "models", "POST", "/v2/repository/index", {}, kind=list)
    models = [model for model in index or [] if isinstance(model, dict) and model.get("name")]
    yield check if not check.good else _with(check, ", ".join(map(_called, models)) or "none", good=bool(models))
    for model in models:
        yield from _ask_model(url, model)


def _ask_model(url: str, model: dict[str, Any]) -> Iterator[Check]:
    path = f"/v2/models/{quote(model['name'], safe='')}"
    if model.get("version"):
        path += f"/versions/{quote(model['version'], safe='')}"
    name = _called(model)
    yield _ask(url, f"{name}: ready", "GET", f"{path}/ready")[0]
    check, about = _ask(url, f"{name}: metadata", "GET", path, kind=dict)
    inputs = [tensor["name"] for tensor in (about or {}).get("inputs") or []]
    yield check if not check.good else _with(check, f"inputs {', '.join(inputs)}", good="image" in inputs)
    check, answer = _ask(url, f"{name}: a picture", "POST", f"{path}/infer", _request(about), kind=dict)
    if check.good:
        outputs = {output["name"]: output for output in answer.get("outputs", ())}
        total = sum(outputs["shares"]["data"]) if "shares" in outputs else 0.0
        engine = (answer.get("parameters") or {}).get("engine_ms", "?")
        check = _with(check, f"shares sum to {total:.3f}, engine {engine} ms", good=abs(total - 1) < 1e-3)
    yield check


def _request(about: dict[str, Any] | None) -> dict[str, Any]:
    """A PNG of the engine's size, of no meaning."""
    size = ((about or {}).get("parameters") or {}).get("size") or [128, 128]
    ramp = np.linspace(0, 255, size[0] * size[1] * 3).astype(np.uint8).reshape(size[0], size[1], 3)
    Image.fromarray(ramp).save(file := io.BytesIO(), "PNG")
    data = [base64.b64encode(file.getvalue()).decode()]
    image = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"content_type": "base64"}, "data": data}
    return {"inputs": [image], "outputs": [{"name": "shares"}]}


def _called(model: dict[str, Any]) -> str:
    version = model.get("version")
    return f"{model.get('name')}:{version}" if version else str(model.get("name"))


def _with(check: Check, answer: str, *, good: bool = True) -> Check:
    return Check(check.question, good, answer, check.milliseconds)


def _ask(
    url: str, question: str, method: str, path: str, body: Any = None, *, kind: type[Any] | None = None
) -> tuple[Check, Any]:
    """`kind`: of the JSON in a good answer; None for none. Other JSON is a bad answer."""
    parts, began = urlsplit(url), time.perf_counter()
    secure = parts.scheme == "https"
    connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(parts.netloc, timeout=_LIMIT_S)
    document = None
    try:
        headers = {} if body is None else {"Content-Type": "application/json"}
        text = None if body is None else json.dumps(body)
        connection.request(method, parts.path.rstrip("/") + path, text, headers)
        response = connection.getresponse()
        data, good = response.read(), response.status == 200
        answer = f"{response.status} {response.reason}"
        if data and (kind is not None or not good):
            document = json.loads(data)
        if good and kind is not None and type(document) is not kind:
            good, answer = False, f"{answer}: not what the protocol says"
        if not good and isinstance(document, dict) and document.get("error"):
            answer += f": {document['error']}"
    except (OSError, http.client.HTTPException, ValueError) as error:
        good, answer = False, str(error) or type(error).__name__
    finally:
        connection.close()
    return Check(question, good, answer, 1e3 * (time.perf_counter() - began)), document
