"""`agln-fast serve` over its sockets: answers are the segmenter's, and whatever goes wrong, the next one is right."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from server import BREAK, DIE, RAISE, SLOW, Server, png, until

import agln_fast

grpc = pytest.importorskip("tritonclient.grpc")
http = pytest.importorskip("tritonclient.http")


@pytest.fixture(scope="module")
def expected(bundle, picture):
    with agln_fast.load(bundle, "onnxruntime", threads=1) as segment:
        return segment(picture)


def with_first(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    changed = picture.copy()
    changed[0, 0] = colour
    return changed


def image_input(*files: bytes) -> dict:
    data = [base64.b64encode(file).decode() for file in files]
    return {"name": "image", "datatype": "BYTES", "shape": [len(files)], "data": data}


def pixels_input(picture: np.ndarray, **changes: object) -> dict:
    values = {"name": "pixels", "datatype": "UINT8", "shape": list(picture.shape), "data": picture.ravel().tolist()}
    return {**values, **changes}


def client(server: Server, module):
    url = urlsplit(server.http).netloc if module is http else server.grpc
    return module.InferenceServerClient(url)


def tensor(module, name: str, array: np.ndarray, datatype: str):
    value = module.InferInput(name, array.shape, datatype)
    value.set_data_from_numpy(array)
    return value


@pytest.mark.parametrize("module", [grpc, http])
@pytest.mark.parametrize("kind", ["image", "pixels"])
def test_stock_clients_get_what_the_segmenter_gives(server, module, kind, picture, expected):
    sent = (
        tensor(module, "pixels", picture[np.newaxis], "UINT8")
        if kind == "pixels"
        else tensor(module, "image", np.array([png(picture)], object), "BYTES")
    )
    names = ["labels", "labels_png", "runs", "overlay_png", "shares"]
    outputs = [module.InferRequestedOutput(name) for name in names]
    answer = client(server, module).infer("small", [sent], outputs=outputs)
    np.testing.assert_array_equal(answer.as_numpy("labels"), expected.labels[np.newaxis])
    labels = Image.open(io.BytesIO(answer.as_numpy("labels_png")[0]))
    np.testing.assert_array_equal(labels, expected.labels)
    assert labels.getpalette()[:3] == list(expected.class_set.palette[0])
    ids, lengths = answer.as_numpy("runs").T
    np.testing.assert_array_equal(np.repeat(ids, lengths), expected.labels.ravel())
    assert (ids[1:] != ids[:-1]).all()
    np.testing.assert_array_equal(Image.open(io.BytesIO(answer.as_numpy("overlay_png")[0])), expected.overlay())
    counts = np.bincount(expected.labels.ravel(), minlength=5)
    np.testing.assert_allclose(answer.as_numpy("shares"), [counts / counts.sum()], rtol=1e-6)


@pytest.mark.parametrize("module", [grpc, http])
def test_labels_are_what_a_request_gets_that_names_no_output(server, module, picture, expected):
    answer = client(server, module).infer("small", [tensor(module, "pixels", picture, "UINT8")])
    np.testing.assert_array_equal(answer.as_numpy("labels"), [expected.labels])


def test_json_alone_will_do(server, picture, expected):
    status, answer = server.infer({"id": "7", "inputs": [pixels_input(picture)], "outputs": [{"name": "labels"}]})
    [output] = answer["outputs"]
    assert (status, answer["id"], answer["model_name"]) == (200, "7", "small")
    assert (output["datatype"], output["shape"]) == ("UINT8", [1, 80, 112])
    np.testing.assert_array_equal(np.reshape(output["data"], output["shape"])[0], expected.labels)
    times = answer["parameters"]
    assert times["batch_size"] == 1
    assert all(0 < times[key] < 1e5 for key in ("queue_ms", "decode_ms", "engine_ms", "encode_ms"))


def test_a_file_alone_will_do(server, picture, expected):
    path, kind = "/v2/models/small/infer?output=labels_png", {"Content-Type": "image/png"}
    status, headers, body = server.ask("POST", path, png(picture), kind)
    assert (status, headers["content-type"]) == (200, "image/png")
    assert re.fullmatch(r"queue;dur=.*, decode;dur=.*, engine;dur=.*, encode;dur=.*", headers["server-timing"])
    np.testing.assert_array_equal(Image.open(io.BytesIO(body)), expected.labels)


def test_several_images_of_several_sizes(server, picture, expected):
    other = np.ascontiguousarray(picture[:40])
    inputs = [image_input(png(picture), png(other))]
    status, answer = server.infer({"inputs": inputs, "outputs": [{"name": "labels_png"}, {"name": "runs"}]})
    files, runs = answer["outputs"]
    assert status == 200
    np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(files["data"][0]))), expected.labels)
    assert sum(np.reshape(runs["data"], runs["shape"])[:, 1]) == 120 * 112
    assert server.infer({"inputs": inputs})[0] == 400  # labels of two sizes are no array


def test_what_it_says_of_itself(server, bundle):
    _, _, body = server.ask("GET", "/v2")
    assert json.loads(body)["extensions"] == ["binary_tensor_data"]
    _, _, body = server.ask("GET", "/v2/models/small")
    about = json.loads(body)
    assert [each["name"] for each in about["inputs"]] == ["image", "pixels"]
    assert {each["name"]: each["shape"] for each in about["outputs"]}["shares"] == [-1, 5]
    assert about["parameters"]["classes"] == list(bundle.manifest.classes)
    assert (about["parameters"]["size"], about["parameters"]["backend"]) == ([64, 96], "onnxruntime")
    assert client(server, grpc).get_model_metadata("small").platform == "agln-fast"
    assert client(server, grpc).is_server_ready()
    _, _, body = server.ask("POST", "/v2/repository/index", b"{}")
    assert json.loads(body) == [{"name": "small", "state": "READY", "reason": ""}]


def huge_png() -> bytes:
    """20,000 x 10,000 pixels promised in its header."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


SMALL = np.zeros((4, 4, 3), np.uint8)

BAD = {
    "garbage": [image_input(b"no image at all")],
    "truncated": [image_input(png(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))[:400])],
    "200 megapixels": [image_input(huge_png())],
    "no bytes": [image_input(b"")],
    "a path": [{**image_input(b""), "data": ["/etc/passwd"]}],
    "no base64": [{**image_input(b""), "data": ["ÿ"]}],
    "shape": [pixels_input(SMALL, shape=[4, 4, 4])],
    "two channels": [pixels_input(SMALL[..., :2])],
    "negative shape": [pixels_input(SMALL, shape=[-4, -4, 3])],
    "no numbers in the shape": [pixels_input(SMALL, shape=["4", 4, 3])],
    "datatype": [pixels_input(SMALL, datatype="FP32")],
    "values": [pixels_input(SMALL, data=[300] * 48)],
    "halves": [pixels_input(SMALL, data=[0.5] * 48)],
    "ragged": [pixels_input(SMALL, data=[[1, 2], [3]])],
    "name": [pixels_input(SMALL, name="picture")],
    "two inputs": [pixels_input(SMALL), image_input(png(SMALL))],
    "no input": [],
    "no picture": [pixels_input(np.zeros((0, 4, 4, 3), np.uint8))],
    "no pixel": [pixels_input(np.zeros((1, 0, 4, 3), np.uint8))],
    "too many": [pixels_input(np.zeros((65, 1, 1, 3), np.uint8))],
}


@pytest.mark.parametrize("inputs", BAD.values(), ids=BAD.keys())
def test_a_bad_request_is_told_so_and_the_next_one_is_fine(server, inputs, picture):
    status, answer = server.infer({"inputs": inputs})
    assert status == 400
    assert len(answer["error"]) > 10
    assert "\n" not in answer["error"]
    assert server.picture(picture) == 200


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"{}", {}, 400),
        (b'{"inputs": 3}', {}, 400),
        (b'{"inputs": [{"name": "image"}]}', {}, 400),
        (json.dumps({"inputs": [pixels_input(SMALL)], "outputs": [{"name": "mask"}]}).encode(), {}, 400),
        (json.dumps({"inputs": [pixels_input(SMALL)], "parameters": {"timeout": "soon"}}).encode(), {}, 400),
        (json.dumps({"inputs": [pixels_input(SMALL)], "parameters": {"timeout": -5}}).encode(), {}, 400),
        (b"{}", {"Inference-Header-Content-Length": "900"}, 400),
        (b"{}", {"Inference-Header-Content-Length": "many"}, 400),
        (b"{}", {"Inference-Header-Content-Length": "9" * 5000}, 400),
        (b"{}", {"Origin": "http://elsewhere.example"}, 403),
        (json.dumps({"inputs": [pixels_input(SMALL, shape=[2**63 - 1] * 60_000)]}).encode(), {}, 400),
        (
            b'{"inputs":[{"name":"pixels","datatype":"UINT8","shape":[1,1,3],"parameters":{"binary_data_size":9}}]}abc',
            {"Inference-Header-Content-Length": "102"},
            400,
        ),
        (b"{}", {"Content-Encoding": "gzip"}, 415),
    ],
)
def test_a_bad_body(server, body, headers, status, picture):
    assert server.ask("POST", "/v2/models/small/infer", body, headers)[0] == status
    assert server.picture(picture) == 200


def test_a_body_too_large_is_refused_before_it_comes(server, picture):
    host = urlsplit(server.http)
    with socket.create_connection((host.hostname, host.port), timeout=30) as connection:
        head = f"POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {(32 << 20) + 1}\r\n\r\nabc"
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(1000), b""))  # until it is closed
    assert answer.startswith(b"HTTP/1.1 413")
    assert server.picture(picture) == 200


def test_a_body_without_a_length_is_limited_too(server, picture):
    host = urlsplit(server.http)
    with socket.create_connection((host.hostname, host.port)) as connection:
        head = "POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode())
        piece = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        connection.settimeout(30)
        for _ in range(32):
            connection.sendall(piece)
        connection.sendall(b"1\r\nx\r\n")  # one too many; nothing is under way any more when the answer comes
        answer = connection.recv(100)
    assert answer.startswith(b"HTTP/1.1 413")
    assert server.picture(picture) == 200


def test_what_stock_clients_and_probes_ask(server):
    over_grpc, over_http = client(server, grpc), client(server, http)
    assert over_grpc.is_server_live()
    assert over_http.is_server_live()
    assert over_grpc.is_model_ready("small")
    assert over_http.is_model_ready("small")
    with pytest.raises(grpc.InferenceServerException) as caught:
        over_grpc.is_model_ready("other")
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    assert over_grpc.get_model_repository_index(as_json=True)["models"] == [{"name": "small", "state": "READY"}]
    assert [model["name"] for model in over_http.get_model_repository_index()] == ["small"]
    assert over_grpc.get_server_metadata().name == "agln-fast"
    for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/small/ready"):
        assert server.ask("HEAD", path)[0] == 200
    status, _, body = server.ask("GET", "/v2/nothing")
    assert (status, list(json.loads(body))) == (404, ["error"])


@pytest.mark.parametrize("path", ["/v2/models/other/infer", "/v2/models/small/versions/9/infer"])
def test_an_unknown_model(server, path):
    body = json.dumps({"inputs": [pixels_input(SMALL)]}).encode()
    assert server.ask("POST", path, body)[0] == 404


def test_nobody_may_load_or_unload_unless_it_is_allowed(server, picture):
    for action in ("load", "unload"):
        assert server.ask("POST", f"/v2/repository/models/small/{action}", b"{}")[0] == 404
    with pytest.raises(grpc.InferenceServerException, match="model-control"):
        client(server, grpc).unload_model("small")
    assert server.picture(picture) == 200


@pytest.mark.parametrize(
    ("model", "name", "datatype", "array", "status"),
    [
        ("small", "image", "BYTES", np.array([b"garbage"], object), "INVALID_ARGUMENT"),
        ("small", "pixels", "FP32", np.zeros((4, 4, 3), np.float32), "INVALID_ARGUMENT"),
        ("small", "picture", "UINT8", SMALL, "INVALID_ARGUMENT"),
        ("small", "pixels", "UINT8", np.zeros((4, 4), np.uint8), "INVALID_ARGUMENT"),
        ("other", "pixels", "UINT8", SMALL, "NOT_FOUND"),
    ],
)
def test_a_bad_request_over_grpc(server, model, name, datatype, array, status, picture):
    with pytest.raises(grpc.InferenceServerException) as caught:
        client(server, grpc).infer(model, [tensor(grpc, name, array, datatype)])
    assert caught.value.status() == f"StatusCode.{status}"
    assert server.picture(picture) == 200


def test_a_message_too_large_over_grpc(server, picture):
    large = np.zeros((3400, 3400, 3), np.uint8)
    with pytest.raises(grpc.InferenceServerException) as caught:
        client(server, grpc).infer("small", [tensor(grpc, "pixels", large, "UINT8")])
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    assert server.picture(picture) == 200


def test_clients_that_go_in_the_midst(server, picture):
    body, host = png(with_first(picture, SLOW)), urlsplit(server.http)
    for sent in (len(body) // 2, len(body)):
        connection = socket.create_connection((host.hostname, host.port))
        head = (
            f"POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body[:sent])
        connection.close()
    gone = client(server, grpc)
    outcome = threading.Event()
    call = gone.async_infer(
        "small", [tensor(grpc, "pixels", with_first(picture, SLOW), "UINT8")], lambda result, error: outcome.set()
    )
    call.cancel()
    assert outcome.wait(30)
    assert server.picture(picture) == 200
    until(lambda: in_flight(server) == 0)


def test_what_a_client_has_left_behind_is_not_run(server, picture):
    """The first keeps the engine busy; of the ten behind it none is waited for any more."""
    body, host = png(with_first(picture, SLOW)), urlsplit(server.http)
    until(lambda: in_flight(server) == 0)
    connections = []
    for _ in range(11):
        connection = socket.create_connection((host.hostname, host.port))
        head = (
            f"POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        connections.append(connection)
    until(lambda: in_flight(server) > 5)
    for connection in connections:
        connection.close()
    began = time.monotonic()
    assert server.picture(picture) == 200
    assert time.monotonic() - began < 5  # ten slow ones take seven seconds


def metrics(server: Server) -> str:
    url = urlsplit(server.metrics)
    connection = HTTPConnection(url.netloc, timeout=30)
    connection.request("GET", url.path)
    return connection.getresponse().read().decode()


def value(server: Server, name: str) -> float:
    return sum(float(number) for number in re.findall(rf"^{re.escape(name)}\{{[^}}]*\}} (\S+)$", metrics(server), re.M))


def in_flight(server: Server) -> float:
    return value(server, "agln_fast_in_flight")


def test_two_hundred_connections_that_never_send(server, picture):
    host = urlsplit(server.http)
    idle = [socket.create_connection((host.hostname, host.port)) for _ in range(200)]
    try:
        idle[0].sendall(b"POST /v2/models/small/infer HTTP/1.1\r\nHost: x\r\nContent-Le")
        assert server.picture(picture) == 200
        assert client(server, grpc).infer("small", [tensor(grpc, "pixels", picture, "UINT8")]) is not None
    finally:
        for connection in idle:
            connection.close()


def test_an_engine_that_raises_once(server, picture):
    assert server.picture(with_first(picture, RAISE)) == 500
    assert server.picture(picture) == 200


def test_what_is_late_is_not_run(server, picture):
    runs = value(server, "agln_fast_engine_seconds_count")
    slow = threading.Thread(target=server.picture, args=(with_first(picture, SLOW),))
    slow.start()
    until(lambda: in_flight(server) == 1)
    began = time.monotonic()
    assert server.picture(picture, "?timeout=50000") == 504
    assert time.monotonic() - began < 0.6  # and not when the slow one is through
    with pytest.raises(grpc.InferenceServerException) as caught:
        client(server, grpc).infer("small", [tensor(grpc, "pixels", picture, "UINT8")], timeout=50_000)
    assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    slow.join()
    assert server.picture(picture) == 200
    assert value(server, "agln_fast_engine_seconds_count") == runs + 2


def test_an_engine_that_always_raises_is_not_ready_and_started_again(bundle, picture):
    """Whether requests come or not."""
    server = Server(f"small={bundle.path}", "--backend", "onnxruntime", "--threads", 1, "--canary-s", 0.3)
    try:
        [before] = server.workers
        assert server.picture(with_first(picture, BREAK)) == 500
        until(lambda: server.picture(picture) == 503)  # before that 500
        until(lambda: server.workers not in ([], [before]))
        until(lambda: server.is_ready)
        assert server.picture(picture) == 200
    finally:
        assert server.end() == 0


def test_garbage_is_no_sign_of_life(server, picture):
    [worker] = server.workers
    os.kill(worker, signal.SIGSTOP)
    try:
        until(lambda: not server.is_ready)
    finally:
        os.kill(worker, signal.SIGCONT)
    until(lambda: server.is_ready)
    assert server.picture(picture) == 200


def test_many_images_do_not_hold_up_one(server, picture):
    files = [png(with_first(picture, SLOW)) for _ in range(8)]
    document = {"inputs": [image_input(*files)], "outputs": [{"name": "shares"}]}
    with ThreadPoolExecutor(2) as pool:
        many = [pool.submit(server.infer, document) for _ in range(2)]
        until(lambda: in_flight(server) == 2)
        began = time.monotonic()
        assert server.picture(picture) == 200
        assert time.monotonic() - began < 8  # sixteen slow ones take eleven seconds
        assert [status for status, _ in (each.result() for each in many)] == [200, 200]


def test_too_many_pixels_together(bundle, picture):
    large = np.zeros((500, 500, 3), np.uint8)
    server = Server(f"small={bundle.path}", "--backend", "onnxruntime", "--threads", 1, AGLN_FAST_MAX_PIXELS="600000")
    try:
        assert server.infer({"inputs": [image_input(png(large))]})[0] == 200
        status, answer = server.infer({"inputs": [image_input(*[png(large)] * 3)]})
        assert (status, "750000 pixels together" in answer["error"]) == (400, True)
    finally:
        assert server.end() == 0


def test_a_process_takes_no_other_bundle_than_before(bundle, small_checkpoint, picture, tmp_path):
    """Clients rely on its classes and shapes, until they are told to load it."""
    place = tmp_path / "small.agln"
    shutil.copytree(bundle.path, place)
    server = Server(place, "--backend", "onnxruntime", "--threads", 1, "--model-control")
    try:
        [before] = server.workers
        options = {"size": (32, 64), "precision": "fp32", "plan": agln_fast.Plan(fold_batchnorm=True)}
        agln_fast.build(small_checkpoint, place, overwrite=True, **options)
        os.kill(before, signal.SIGKILL)
        until(lambda: server.picture(picture) == 503)
        until(lambda: server.workers not in ([], [before]))
        until(lambda: server.workers == [])  # it was looked at, and ended
        assert server.picture(picture) == 503
        assert server.ask("POST", "/v2/repository/models/small/load", b"{}")[0] == 200
        assert server.picture(picture) == 200
        _, _, body = server.ask("GET", "/v2/models/small")
        assert json.loads(body)["parameters"]["size"] == [32, 64]
    finally:
        server.process.kill()
        _, told = server.process.communicate()
    assert "another bundle lies there now" in told


def test_a_process_that_dies_is_started_again(server, picture):
    [before] = server.workers
    status, headers, _ = server.ask(
        "POST", "/v2/models/small/infer", png(with_first(picture, DIE)), {"Content-Type": "image/png"}
    )
    assert (status, int(headers["retry-after"]) >= 1) == (503, True)
    until(lambda: server.is_ready)
    assert server.picture(picture) == 200
    assert server.workers != [before]


def test_a_killed_process_is_started_again(server, picture):
    [before] = server.workers
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(server.picture, with_first(picture, SLOW)) for _ in range(4)]
        until(lambda: in_flight(server) == 4)
        os.kill(before, signal.SIGKILL)
        assert [each.result() for each in asked] == [503] * 4
    until(lambda: server.is_ready)
    assert server.picture(picture) == 200


def test_a_stalled_process_is_not_ready_and_alive(server, picture):
    [worker] = server.workers
    os.kill(worker, signal.SIGSTOP)
    try:
        until(lambda: not server.is_ready)
        assert server.ask("GET", "/v2/health/live")[0] == 200
        assert server.ask("GET", "/v2/models/small/ready")[0] == 503
        assert not client(server, grpc).is_server_ready()
        assert server.picture(picture) == 503
    finally:
        os.kill(worker, signal.SIGCONT)
    until(lambda: server.is_ready)
    assert server.picture(picture) == 200
    assert server.workers == [worker]


def test_one_that_stays_stalled_is_killed(server, picture):
    [worker] = server.workers
    os.kill(worker, signal.SIGSTOP)
    until(lambda: worker not in server.workers)
    until(lambda: server.is_ready)
    assert server.picture(picture) == 200


def test_a_full_queue_says_when_to_come_again(bundle, picture):
    server = Server(f"small={bundle.path}", "--backend", "onnxruntime", "--threads", 1, "--queue", 2)
    try:
        body, kind = png(with_first(picture, SLOW)), {"Content-Type": "image/png"}
        with ThreadPoolExecutor(6) as pool:
            path = "/v2/models/small/infer?output=shares"
            asked = [pool.submit(server.ask, "POST", path, body, kind) for _ in range(6)]
            answers = [each.result() for each in asked]
        assert sorted(status for status, _, _ in answers) == [200] * 2 + [503] * 4
        assert all(int(headers["retry-after"]) >= 1 for status, headers, _ in answers if status == 503)
        assert value(server, "agln_fast_refused_total") == 4
        assert server.picture(picture) == 200
    finally:
        assert server.end() == 0


def test_sigterm_lets_it_finish(bundle, picture):
    server = Server(f"small={bundle.path}", "--backend", "onnxruntime", "--threads", 1, "--linger-s", 1)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.picture, with_first(picture, SLOW))
        until(lambda: in_flight(server) == 1)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: not server.is_ready)
        assert server.ask("GET", "/v2/health/live")[0] == 200
        assert server.picture(picture) == 200  # while balancers notice
        assert asked.result() == 200
    assert server.process.wait(60) == 0
    assert server.process.stderr.read() == ""
    server.process.communicate()


def test_a_signal_while_it_loads_ends_it(bundle):
    names = [f"{name}={bundle.path}" for name in "abcdef"]
    command = [sys.executable, "-m", "agln_fast.cli", "serve", *names, "--backend", "onnxruntime", "--json"]
    ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0"]
    process = subprocess.Popen([*command, *ports], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    until(lambda: bool(children.read_text().split()))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (0, "", "")


def test_a_second_signal_ends_it_at_once(bundle, picture):
    server = Server(f"small={bundle.path}", "--backend", "onnxruntime", "--threads", 1, "--linger-s", 600)
    server.process.send_signal(signal.SIGINT)
    until(lambda: not server.is_ready)
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
    server.process.communicate()


def test_no_process_is_left_when_the_server_is_killed(bundle):
    server = Server(f"small={bundle.path}", "--backend", "onnxruntime", "--threads", 1)
    workers = server.workers
    assert len(workers) == 1
    server.process.kill()
    server.process.communicate()
    until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))


def test_several_bundles_and_versions(bundle, picture):
    path = bundle.path
    server = Server(f"a:1={path}", f"a:2={path}", f"b={path}", "--backend", "onnxruntime", "--threads", 1)
    try:
        body, kind = png(picture), {"Content-Type": "image/png"}
        for model, version in (("a", "2"), ("a/versions/1", "1"), ("a/versions/2", "2"), ("b", "")):
            status, _, answer = server.ask("POST", f"/v2/models/{model}/infer", body, kind)
            assert (status, json.loads(answer)["model_version"]) == (200, version)
        _, _, index = server.ask("POST", "/v2/repository/index", b"{}")
        assert [(each["name"], each.get("version")) for each in json.loads(index)] == [
            ("a", "1"),
            ("a", "2"),
            ("b", None),
        ]
    finally:
        assert server.end() == 0


def test_a_bundle_that_was_damaged_never_becomes_ready(bundle, picture, tmp_path):
    copy = tmp_path / "small.agln"
    shutil.copytree(bundle.path, copy)
    server = Server(copy, "--backend", "onnxruntime", "--threads", 1, "--model-control")
    try:
        file = copy / bundle.engine("onnxruntime-fp32").file
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        status, _, body = server.ask("POST", "/v2/repository/models/small/load", b"{}")
        assert status == 500
        assert "small.agln" in json.loads(body)["error"]
        assert server.picture(picture) == 200  # what was loaded before goes on
    finally:
        assert server.end() == 0
    command = [
        sys.executable,
        "-m",
        "agln_fast.cli",
        "serve",
        str(copy),
        "--backend",
        "onnxruntime",
        "--http-port",
        "0",
    ]
    ended = subprocess.run([*command, "--grpc-port", "0", "--metrics-port", "0"], capture_output=True, text=True)
    assert ended.returncode == 5
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1


def test_loads_and_unloads_come_one_after_the_other(bundle, picture):
    server = Server(f"small={bundle.path}", "--backend", "onnxruntime", "--threads", 1, "--model-control")
    try:
        path = "/v2/repository/models/small"
        with ThreadPoolExecutor(4) as pool:
            asked = [
                pool.submit(server.ask, "POST", f"{path}/{what}", b"{}") for what in ("load", "unload", "load", "load")
            ]
            assert {each.result()[0] for each in asked} <= {200, 404}
        server.ask("POST", f"{path}/load", b"{}")
        assert server.picture(picture) == 200
        assert len(server.workers) == 1
        server.ask("POST", f"{path}/unload", b"{}")
        assert not server.is_ready
    finally:
        assert server.end() == 0


def test_names_with_and_without_a_version(bundle, cli):
    code, _, err = cli("serve", f"a:2={bundle.path}", f"a={bundle.path}")
    assert (code, "a comes with versions and without" in err) == (2, True)
    code, _, err = cli("serve", bundle.path, bundle.path)
    assert (code, "several bundles are called small" in err) == (2, True)


def test_unloaded_and_loaded_again(bundle, picture):
    server = Server(f"small={bundle.path}", "--backend", "onnxruntime", "--threads", 1, "--model-control")
    try:
        [before] = server.workers
        assert server.ask("POST", "/v2/repository/models/small/unload", b"{}")[0] == 200
        assert server.picture(picture) == 404
        assert server.workers == []
        client(server, grpc).load_model("small")
        assert server.picture(picture) == 200
        assert server.workers != [before]
    finally:
        assert server.end() == 0


def test_a_port_in_use(bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for option in ("--http-port", "--grpc-port", "--metrics-port"):
            ports = {"--http-port": 0, "--grpc-port": 0, "--metrics-port": 0} | {option: port}
            arguments = [str(part) for pair in ports.items() for part in pair]
            command = [sys.executable, "-m", "agln_fast.cli", "serve", bundle.path, "--backend", "onnxruntime"]
            ended = subprocess.run([*command, *arguments], capture_output=True, text=True)
            assert ended.returncode == 6
            assert f"127.0.0.1:{port}" in ended.stderr
            assert ended.stderr.count("\n") == 1


def test_check_asks_everything(server, cli):
    code, out, _ = cli("serve", "--check", server.http, "--json")
    asked = {row["question"]: row for row in json.loads(out)}
    assert code == 0
    assert all(row["good"] for row in asked.values())
    assert list(asked)[:4] == ["alive", "ready", "server", "models"]
    assert "small: a picture" in asked
    code, out, err = cli("serve", "--check", "http://127.0.0.1:9")
    assert code == 6
    assert "alive" in err
    assert cli("serve", "--check", "nowhere")[0] == 2


def test_check_sees_a_model_that_is_not_ready(server, cli):
    [worker] = server.workers
    os.kill(worker, signal.SIGSTOP)
    try:
        until(lambda: not server.is_ready)
        code, _, err = cli("serve", "--check", server.http)
    finally:
        os.kill(worker, signal.SIGCONT)
    assert code == 6
    assert "ready" in err
    until(lambda: server.is_ready)


def test_the_page_stands_at_the_root(server):
    status, headers, body = server.ask("GET", "/")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/html")
    assert b"agln-fast" in body
