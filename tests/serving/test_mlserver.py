"""A repository under plain `mlserver start`, in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from importlib.util import find_spec

import numpy as np
import pytest

import agln_fast
from agln_fast.serving.repositories import export_repository

START_S = 120.0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mlserver") is None, reason="needs the package mlserver")
@pytest.mark.skipif(find_spec("tritonclient") is None, reason="needs the package tritonclient")
def test_mlserver_serves_its_repository(bundle, picture, tmp_path):
    import tritonclient.grpc as protocol

    written = export_repository([("street", bundle.path)], "mlserver", tmp_path / "models")
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        http, grpc, metrics = (each.getsockname()[1] for each in sockets)
    ports = {"HTTP_PORT": http, "GRPC_PORT": grpc, "METRICS_PORT": metrics, "HOST": "127.0.0.1"}
    environment = os.environ | {f"MLSERVER_{name}": str(value) for name, value in ports.items()}
    command = [sys.executable, "-c", "from mlserver.cli import main; main()", *written.start[1:]]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        with protocol.InferenceServerClient(f"127.0.0.1:{grpc}") as client:
            limit, ready = time.monotonic() + START_S, False
            while not ready:
                assert process.poll() is None, (tmp_path / "log.txt").read_text()[-3000:]
                assert time.monotonic() < limit
                with suppress(protocol.InferenceServerException):
                    ready = client.is_model_ready("street")
                time.sleep(0.2)
            given = protocol.InferInput("pixels", [1, *picture.shape], "UINT8")
            given.set_data_from_numpy(picture[np.newaxis])
            labels = client.infer("street", [given]).as_numpy("labels")
        with agln_fast.load(bundle) as segment:
            assert np.array_equal(labels[0], segment(picture).labels)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            assert process.wait(START_S) == 0  # also though MLServer unloads nothing at its end
        finally:
            process.kill()
