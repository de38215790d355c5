"""A server as a user starts it, in a process of its own, and a few ways to ask it."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

FAULTS = Path(__file__).parent / "serving" / "faults"
"""Where Python finds, by PYTHONPATH, what makes the engines of a server fail."""

_colours = runpy.run_path(str(FAULTS / "colours.py"))
RAISE, BREAK, DIE, SLOW = (_colours[name] for name in ("RAISE", "BREAK", "DIE", "SLOW"))
"""First pixels of pictures at which an engine raises, raises from then on, ends its process, or takes 0.7 s."""

START_S, ANSWER_S = 60.0, 60.0  # on a machine that does something else, too


class Server:
    """process; http, grpc, metrics: its addresses."""

    def __init__(self, *arguments: object, **variables: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(FAULTS)} | variables
        ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
        command = [sys.executable, "-m", "agln_fast.cli", "serve", *map(str, arguments), *ports, "--json"]
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(self.process.stderr.read())
        addresses = json.loads(line)
        self.http, self.grpc, self.metrics = (addresses[key] for key in ("http", "grpc", "metrics"))

    def ask(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in small letters, and body."""
        connection = http.client.HTTPConnection(urlsplit(self.http).netloc, timeout=ANSWER_S)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            return response.status, {key.lower(): value for key, value in response.getheaders()}, response.read()

    def infer(self, document: Any, model: str = "small") -> tuple[int, Any]:
        """Status, and the JSON object that answers a JSON object."""
        status, _, body = self.ask("POST", f"/v2/models/{model}/infer", json.dumps(document).encode())
        return status, json.loads(body)

    def picture(self, picture: np.ndarray, query: str = "?output=shares") -> int:
        """Status of a picture's segmentation."""
        path, kind = f"/v2/models/small/infer{query}", {"Content-Type": "image/png"}
        return self.ask("POST", path, png(picture), kind)[0]

    @property
    def is_ready(self) -> bool:
        return self.ask("GET", "/v2/health/ready")[0] == 200

    @property
    def workers(self) -> list[int]:
        """The processes of the engines: those that import the module of the worker."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]

    def end(self) -> int:
        """As a supervisor would. Returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(START_S)
        finally:
            self.process.kill()
            self.process.communicate()


def png(picture: np.ndarray) -> bytes:
    Image.fromarray(picture).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def until(condition: Callable[[], bool]) -> None:
    """Wait for it, on a machine of any speed."""
    limit = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.02)
