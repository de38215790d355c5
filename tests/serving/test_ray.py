"""Ray Serve without a cluster: arguments, batches by pixels, what a dying replica lost, and what HTTP says of it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from fake_engine import fake_segmenter
from server import png

from agln_fast.errors import BackendError, BundleError, ConfigError
from agln_fast.serving.line import Answer, Failure, Times
from agln_fast.serving.worker import Description

ray = pytest.importorskip("ray")

from ray import serve  # noqa: E402
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, ObjectLostError  # noqa: E402
from ray.exceptions import RayTaskError as TaskError  # noqa: E402
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError  # noqa: E402

from agln_fast.serving.ray import Arguments, app, ingress  # noqa: E402
from agln_fast.serving.ray.bundles import Bundles, Image, Model, places  # noqa: E402
from agln_fast.serving.ray.ingress import Ingress, web  # noqa: E402

LABELS = np.zeros((1, 2, 3), np.uint8)
GOOD = Answer(0, {"labels": LABELS}, Times(0.0, 1.0, 2.0, 3.0, 4))


def died() -> ActorDiedError:
    return ActorDiedError()


# ---------------------------------------------------------------------------------------------------------- arguments


def test_a_bundle_has_the_name_of_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Arguments(bundle="a/street.agln").bundles == {"street": str(tmp_path / "a" / "street.agln")}


@pytest.mark.parametrize(
    "given", [{"a": "/x.agln", "b": "/b.agln"}, "a=/x.agln,b=/b.agln", "a=/x.agln,/b.agln"], ids=["map", "text", "bare"]
)
def test_several_bundles_have_names(given):
    assert Arguments(bundles=given).bundles == {"a": "/x.agln", "b": "/b.agln"}


def test_arguments_can_be_written_down_and_read_again():
    arguments = Arguments(bundle="/x.agln", threads="2", gpus="0.5")
    assert (arguments.threads, arguments.gpus) == (2, 0.5)
    assert Arguments(**arguments.model_dump()) == arguments


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give bundle=PATH"),
        ({"bundle": "x", "bundels": "y"}, "bundels"),
        ({"bundle": "x", "threads": 0}, "threads"),
        ({"bundle": "x", "timeout_s": 0}, "timeout_s"),
    ],
    ids=["no bundle", "unknown", "no thread", "no time"],
)
def test_arguments_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        Arguments(**given)


def test_a_bundle_that_is_not_there_is_told_before_anything_is_started(tmp_path):
    with pytest.raises(BundleError, match=r"none\.agln"):
        app(Arguments(bundle=str(tmp_path / "none.agln")))


def test_the_application_has_room_for_the_batches_of_its_bundle(bundle):
    application = app(Arguments(bundle=str(bundle.path), cpus=2, min_replicas=2, max_replicas=5, queue=7, threads=1))
    engines = application._bound_deployment.init_args[1]._bound_deployment  # as `serve build` looks at it
    most = bundle.manifest.contract.max_batch
    assert engines.name == "Bundles"
    assert engines.max_ongoing_requests == 3 * most
    assert engines.max_queued_requests == 7
    assert engines.ray_actor_options["num_cpus"] == 2
    scaling = engines._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 2 * most)
    assert engines.user_config["threads"] == 1


@pytest.mark.parametrize(("allowed", "found"), [("0", "0"), ("1", "None")], ids=["quiet", "allowed"])
def test_a_cluster_that_is_started_for_the_application_reports_nothing(allowed, found):
    """`serve run` imports it first."""
    environment = {**os.environ, "AGLN_FAST_ALLOW_TELEMETRY": allowed}
    environment.pop("RAY_USAGE_STATS_ENABLED", None)
    program = "import os, agln_fast.serving.ray; print(os.environ.get('RAY_USAGE_STATS_ENABLED'))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [found]


# ------------------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    ("sides", "frame", "expected"),
    [
        ([(10, 10), (500, 500)], (64, 96), 2),
        ([(1024, 1024)], (64, 96), 1),
        ([(1024, 1025)], (64, 96), 2),
        ([(3000, 4000), (10, 10)], (64, 96), 9),
        ([(2048, 2048), (2048, 2049)], (2048, 2048), 3),
    ],
    ids=["small ones", "just small", "just two", "no more than a batch", "a large frame"],
)
def test_a_large_picture_takes_several_places_of_a_batch(sides, frame, expected):
    height, width = frame
    model = Model("m", fake_segmenter(height=height, width=width, max_batch=8))
    pictures = [Image(model, np.broadcast_to(np.uint8(0), (*size, 3))) for size in sides]
    assert places(pictures) == expected


class Replica:
    """`Bundles` outside of Ray: its engines echo, and wait until `gate` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None, **contract: object) -> None:
        self.gate = threading.Event()
        self.opened: list[dict[str, object]] = []
        context = SimpleNamespace(_deployment_config=SimpleNamespace(max_ongoing_requests=1000))
        monkeypatch.setattr(serve, "get_replica_context", lambda: context)
        monkeypatch.setattr(serve, "multiplexed", lambda load, max_num_models_per_replica: _once(load))

        def open_(_: Bundles, name: str):
            self.opened.append({"name": name, **self.bundles._options})
            self.segmenter = fake_segmenter(**contract)
            self.engine = self.segmenter._backend
            self.engine.error, run = error, self.engine.run
            self.engine.run = lambda batch: (self.gate.wait(), run(batch))[1]
            return self.segmenter

        monkeypatch.setattr(Bundles, "_open", open_)
        self.bundles = Bundles({"a": "/a.agln", "b": "/b.agln", "c": "/c.agln"}, 2)

    async def until(self, condition) -> None:
        limit = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < limit
            await asyncio.sleep(0.001)


def _once(load):
    loaded: dict[str, asyncio.Task] = {}

    async def once(name: str):
        if name not in loaded:
            loaded[name] = asyncio.ensure_future(load(name))
        return await loaded[name]

    return once


def picture(height: int = 64, width: int = 96) -> dict[str, np.ndarray]:
    return {"pixels": np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)}


def test_what_comes_while_the_engine_runs_is_the_next_batch(monkeypatch):
    """Ray alone would make a batch of each, behind one another."""

    async def steps() -> None:
        replica = Replica(monkeypatch, max_batch=4)
        await replica.bundles.reconfigure({})
        first = [asyncio.create_task(replica.bundles.segment("b", picture())) for _ in range(1)]
        await replica.until(lambda: replica.bundles._running == 1)
        first += [asyncio.create_task(replica.bundles.segment("b", picture()))]
        await replica.until(lambda: replica.bundles._running == 2)
        others = [asyncio.create_task(replica.bundles.segment("b", picture())) for _ in range(6)]
        await asyncio.sleep(0.3)
        assert replica.bundles._running == 2
        replica.gate.set()
        answers = await asyncio.gather(*first, *others)
        assert sorted(replica.engine.batches) == [1, 1, 2, 4]
        assert sorted(answer.times.batch_size for answer in answers) == [1, 1, 2, 2, 4, 4, 4, 4]

    asyncio.run(steps())


def test_ten_large_pictures_are_no_batch_with_ten_small_ones(monkeypatch):
    runs: list[list[int]] = []
    run = Model.run
    monkeypatch.setattr(
        Model, "run", lambda self, images: (runs.append([len(image) for image in images]), run(self, images))[1]
    )

    async def steps() -> None:
        replica = Replica(monkeypatch, max_batch=20)
        replica.gate.set()
        await replica.bundles.reconfigure({"wait_ms": 300})
        large = picture(2048, 2560)  # 5 places each
        requests = [replica.bundles.segment("b", large) for _ in range(10)]
        requests += [replica.bundles.segment("b", picture()) for _ in range(10)]
        answers = await asyncio.gather(*requests)
        assert all(answer.outputs["labels"].shape == (1, 2048, 2560) for answer in answers[:10])

    asyncio.run(steps())
    assert sorted(height for heights in runs for height in heights) == [64] * 10 + [2048] * 10
    assert all(5 * heights.count(2048) + heights.count(64) <= 20 for heights in runs)
    assert max(map(len, runs)) > 4


def test_a_batch_is_one_run_of_the_engine(monkeypatch):
    async def steps() -> None:
        replica = Replica(monkeypatch, max_batch=4)
        replica.gate.set()
        await replica.bundles.reconfigure({})
        pictures = np.stack([picture()["pixels"]] * 4)
        answer = await replica.bundles.segment("b", {"pixels": pictures}, ["labels", "shares"])
        assert answer.outputs["labels"].shape == (4, 64, 96)
        assert answer.outputs["shares"].shape == (4, 3)
        assert (answer.times.batch_size, replica.engine.batches) == (4, [4])
        assert all(value > 0 for value in (answer.times.decode_ms, answer.times.engine_ms, answer.times.encode_ms))

    asyncio.run(steps())


@pytest.mark.parametrize(
    ("error", "inputs", "outputs", "failure"),
    [
        (None, {"image": [b"no picture"]}, (), Failure(400, "10 bytes: is not an image of a known format")),
        (None, {"image": []}, (), Failure(400, "input 'image' has 0 images")),
        (None, picture(), ("lables",), Failure(400, "unknown output 'lables'")),
        (BackendError("out of memory"), picture(), (), Failure(500, "out of memory")),
        (RuntimeError("deep inside"), picture(), (), Failure(500, "RuntimeError: see the replica's log")),
    ],
    ids=["no picture", "no image", "unknown output", "engine", "unexpected"],
)
def test_a_replica_says_whose_fault_it_was(monkeypatch, error, inputs, outputs, failure):
    async def steps() -> None:
        replica = Replica(monkeypatch, error)
        replica.gate.set()
        await replica.bundles.reconfigure({})
        answer = await replica.bundles.segment("a", inputs, outputs)
        assert answer.outputs.status == failure.status
        assert answer.outputs.message.startswith(failure.message)
        assert replica.bundles._running == 0

    asyncio.run(steps())


def test_a_replica_opens_what_it_has_room_for_and_says_what_it_does_not_know(monkeypatch):
    async def steps() -> None:
        replica = Replica(monkeypatch)
        replica.gate.set()
        await replica.bundles.reconfigure({"threads": 1})
        assert [each["name"] for each in replica.opened] == ["a", "b"]
        assert await replica.bundles.segment("other", picture()) is None
        assert await replica.bundles.describe("other") is None
        about = await replica.bundles.describe("c")
        assert (about.engine, about.parameters()["size"]) == ("fake-fp32", [64, 96])
        await replica.bundles.reconfigure({"threads": 2})
        assert {(each["name"], each["threads"]) for each in replica.opened[3:]} == {("a", 2), ("b", 2), ("c", 2)}
        with pytest.raises(ConfigError, match="unknown key of user_config 'thread'"):
            await replica.bundles.reconfigure({"thread": 2})

    asyncio.run(steps())


def test_a_bundle_that_cannot_be_opened_is_the_servers_fault(monkeypatch):
    async def steps() -> None:
        replica = Replica(monkeypatch)

        def refuse(*_: object) -> None:
            raise BundleError("/a.agln: damaged")

        monkeypatch.setattr(Bundles, "_open", refuse)
        assert (await replica.bundles.segment("a", picture())).outputs == Failure(500, "/a.agln: damaged")
        assert await replica.bundles.describe("a") == Failure(500, "/a.agln: damaged")

    asyncio.run(steps())


def test_health_is_a_picture_through_each_engine_that_rested(monkeypatch):
    async def steps() -> None:
        replica = Replica(monkeypatch)
        replica.gate.set()
        await replica.bundles.reconfigure({})
        engine = replica.engine
        await replica.bundles.check_health()  # they have just been opened
        assert engine.batches == []
        await replica.bundles.check_health()
        assert engine.batches == [1]
        await replica.bundles.segment("b", picture())
        await replica.bundles.check_health()  # it has run meanwhile
        assert engine.batches == [1, 1]
        engine.error = BackendError("it is gone")
        with pytest.raises(BackendError, match="it is gone"):
            await replica.bundles.check_health()

    asyncio.run(steps())


# ------------------------------------------------------------------------------------------------------------ ingress


class Handle:
    """Of deployments whose replicas answer with `script`, one after the other, and then with the last one again."""

    def __init__(self, *script: object) -> None:
        self.script = list(script)
        self.asked: list[tuple[object, ...]] = []
        self.cancelled = 0

    def options(self, **_: object) -> Handle:
        return self

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *arguments: self._respond(method, arguments))

    def _respond(self, *asked: object) -> Response:
        self.asked.append(asked)
        return Response(self, self.script.pop(0) if len(self.script) > 1 else self.script[0])


class Response:
    def __init__(self, handle: Handle, answer: object) -> None:
        self._handle, self._answer = handle, answer

    def __await__(self):
        return self._get().__await__()

    async def _get(self) -> object:
        await asyncio.sleep(0 if self._answer != "never" else 60)
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer

    def cancel(self) -> None:
        self._handle.cancelled += 1


def ask(
    monkeypatch: pytest.MonkeyPatch,
    handle: Handle,
    method: str,
    path: str,
    body: bytes = b"",
    headers: dict[str, str] | None = None,
    *,
    timeout_s: float = 30.0,
    most: int = 1 << 20,
) -> tuple[int, dict[str, str], bytes]:
    """As Ray's proxy would: status, headers, body."""
    replica = Ingress(("street", "night"), handle, timeout_s)
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(servable_object=replica))
    path, _, query = path.partition("?")
    pairs = [(key.lower().encode(), value.encode()) for key, value in (headers or {}).items()]
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": pairs,
    }
    sent: list[dict] = []
    parts = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict:
        return parts.pop(0) if parts else await asyncio.sleep(60)

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(web(most)(scope, receive, send))
    answered = {key.decode(): value.decode() for key, value in sent[0]["headers"]}
    return sent[0]["status"], answered, b"".join(message.get("body", b"") for message in sent[1:])


INFER = "/v2/models/street/infer"
FILE = {"Content-Type": "image/png"}
PNG = png(picture()["pixels"])


def infer(monkeypatch, handle, path: str = INFER, **settings):
    return ask(monkeypatch, handle, "POST", path, PNG, FILE, **settings)


def test_an_answer_has_the_times_and_what_ray_took(monkeypatch):
    handle = Handle(GOOD)
    status, headers, body = infer(monkeypatch, handle, f"{INFER}?output=labels")
    document = json.loads(body)
    assert (status, document["model_name"]) == (200, "street")
    assert document["outputs"][0]["shape"] == [1, 2, 3]
    times = document["parameters"]
    assert (times["decode_ms"], times["engine_ms"], times["encode_ms"], times["batch_size"]) == (1, 2, 3, 4)
    assert times["queue_ms"] >= 0
    assert "engine;dur=2.0" in headers["server-timing"]
    assert handle.asked == [("segment", ("street", {"image": [PNG]}, ("labels",)))]


@pytest.mark.parametrize(
    "loss",
    [died(), ActorUnavailableError("away", b"0" * 16), NodeDiedError("node"), ObjectLostError("00" * 28, None, "")],
    ids=lambda error: type(error).__name__,
)
def test_what_a_dying_replica_lost_is_asked_again(monkeypatch, loss):
    handle = Handle(loss, loss, GOOD)
    assert infer(monkeypatch, handle)[0] == 200
    assert len(handle.asked) == 3
    assert len(set(map(str, handle.asked))) == 1


def test_what_kills_every_replica_is_not_tried_on_all_of_them(monkeypatch):
    handle = Handle(died())
    status, headers, body = infer(monkeypatch, handle)
    assert (status, len(handle.asked)) == (500, 3)
    assert "retry-after" not in headers  # or a balancer would send it again
    assert json.loads(body)["error"] == "3 replicas died with this request"


def test_a_full_queue_refuses_what_comes_but_not_what_it_took_once(monkeypatch):
    full = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    status, headers, _ = infer(monkeypatch, Handle(full, GOOD))
    assert (status, headers["retry-after"]) == (503, "1")
    handle = Handle(died(), full, full, GOOD)
    assert infer(monkeypatch, handle)[0] == 200
    assert len(handle.asked) == 4


def test_a_replica_of_another_version_is_passed_by(monkeypatch):
    handle = Handle(None, None, GOOD)
    assert infer(monkeypatch, handle)[0] == 200
    assert len(handle.asked) == 3


def test_a_late_request_is_cancelled(monkeypatch):
    handle = Handle("never")
    began = time.monotonic()
    status, _, body = infer(monkeypatch, handle, f"{INFER}?timeout=50000")
    assert (status, handle.cancelled) == (504, 1)
    assert json.loads(body)["error"] == "no answer within 0.05 s"
    assert infer(monkeypatch, Handle(died(), "never"), timeout_s=0.1)[0] == 504
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("answer", "status"),
    [
        (Answer(0, Failure(400, "no picture")), 400),
        (Answer(0, Failure(500, "the engine failed")), 500),
        (TaskError("segment", "trace", ZeroDivisionError("deep inside")), 500),
        (DeploymentUnavailableError("Bundles"), 503),
    ],
    ids=["bad input", "engine", "unexpected", "not deployed"],
)
def test_nothing_else_is_asked_again(monkeypatch, answer, status):
    handle = Handle(answer, GOOD)
    found, _, body = infer(monkeypatch, handle)
    assert (found, len(handle.asked)) == (status, 1)
    assert json.loads(body)["error"]
    assert b"deep inside" not in body


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status"),
    [
        ("POST", "/v2/models/strete/infer", b"x", FILE, 404),
        ("POST", INFER, b"{}", {}, 400),
        ("POST", INFER, b"no json", {}, 400),
        ("POST", INFER, b"{}", {"Content-Encoding": "gzip"}, 415),
        ("POST", INFER, b"x" * 1001, FILE, 413),
        ("POST", INFER, b"x", {**FILE, "Content-Length": "1001"}, 413),
        ("POST", f"{INFER}?timeout=soon", PNG[:900], FILE, 400),
        ("GET", INFER, b"", {}, 405),
        ("GET", "/v2/models/strete", b"", {}, 404),
        ("GET", "/v2/models/strete/ready", b"", {}, 404),
    ],
)
def test_what_makes_no_sense_reaches_no_replica(monkeypatch, method, path, body, headers, status):
    handle = Handle(GOOD)
    assert ask(monkeypatch, handle, method, path, body, headers, most=1000)[0] == status
    assert handle.asked == []


def test_the_server_tells_what_it_has(monkeypatch):
    handle = Handle(Description.of(fake_segmenter()))
    document = json.loads(ask(monkeypatch, handle, "GET", "/v2/models/night")[2])
    assert (document["name"], document["parameters"]["engine"]) == ("night", "fake-fp32")
    assert {"name": "shares", "datatype": "FP32", "shape": [-1, 3]} in document["outputs"]
    index = json.loads(ask(monkeypatch, handle, "POST", "/v2/repository/index", b"{}")[2])
    assert [model["name"] for model in index] == ["street", "night"]
    assert json.loads(ask(monkeypatch, handle, "GET", "/v2")[2])["name"] == "agln-fast"
    assert b"<!doctype html>" in ask(monkeypatch, handle, "GET", "/")[2].lower()


@pytest.mark.parametrize(
    ("answer", "ready"),
    [
        (True, 200),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), 200),
        (died(), 503),
        ("never", 503),
    ],
    ids=["idle", "busy", "dead", "silent"],
)
def test_ready_is_a_replica_that_answers(monkeypatch, answer, ready):
    monkeypatch.setattr(ingress, "_READY_S", 0.2)
    assert ask(monkeypatch, Handle(answer), "GET", "/v2/health/ready")[0] == ready
    assert ask(monkeypatch, Handle(answer), "GET", "/v2/health/live")[0] == 200


@pytest.mark.parametrize(
    ("answer", "status"), [(Description.of(fake_segmenter()), 200), (Failure(500, "damaged"), 500)], ids=["good", "bad"]
)
def test_a_model_is_ready_whose_engine_is_open(monkeypatch, answer, status):
    assert ask(monkeypatch, Handle(answer), "GET", "/v2/models/street/ready")[0] == status


@pytest.mark.parametrize(
    ("answer", "model", "kind"),
    [
        (Answer(0, Failure(400, "no picture")), "street", ConfigError),
        (GOOD, "strete", ConfigError),
        (GOOD, "", ConfigError),
        (Answer(0, Failure(500, "it failed")), "street", BackendError),
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), "street", BackendError),
        ("never", "street", TimeoutError),
    ],
    ids=["bad input", "unknown model", "which model", "engine", "busy", "late"],
)
def test_other_deployments_get_errors(answer, model, kind):
    replica = Ingress(("street", "night"), Handle(answer), 0.2)
    with pytest.raises(kind):
        asyncio.run(replica.segment({"image": [PNG]}, model=model))


def test_other_deployments_need_no_name_of_the_only_model():
    replica = Ingress(("street",), Handle(GOOD), 30.0)
    assert asyncio.run(replica.segment({"image": [PNG]}))["labels"] is LABELS
