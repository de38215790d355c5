"""Ray Serve on a cluster of two raylets: right answers while instances die and others take their place."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from server import FAULTS, RAISE, SLOW, START_S, png, until

import agln_fast
from agln_fast.errors import ConfigError
from agln_fast.serving.check import ask_all
from agln_fast.serving.repositories import export_repository

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.cluster]

NAMESPACE, LIMIT_S = "serve", 120.0
LARGEST = 100 << 20  # bytes of the store of a raylet
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "10",
    "PYTHONPATH": str(FAULTS),
}
WATCHFUL = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 4}


class Cluster:
    """Two raylets with two CPUs each, and what was deployed there. http: HOST:PORT."""

    def __init__(self) -> None:
        from ray import serve
        from ray.cluster_utils import Cluster as Raylets

        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.http = f"127.0.0.1:{self.port}"
        head = {"num_cpus": 2, "object_store_memory": LARGEST, "include_dashboard": False, "_system_config": WATCHFUL}
        self.raylets = Raylets(initialize_head=True, head_node_args=head)
        self.second = self.raylets.add_node(num_cpus=2, object_store_memory=LARGEST)
        ray.init(address=self.raylets.address, namespace=NAMESPACE, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": self.port, "location": "HeadOnly"})

    def deploy(self, **arguments: Any) -> None:
        """Two replicas that take a raylet each; again, while others run, in their place."""
        from ray import serve

        from agln_fast.serving.ray import Arguments, app

        fixed = {"cpus": 2, "threads": 1, "min_replicas": 2, "max_replicas": 2}
        serve.run(app(Arguments(**{**fixed, **arguments})), name="test", route_prefix="/")

    def replicas(self, deployment: str = "Bundles") -> dict[int, str]:
        """The node of each process that is alive."""
        actors = ray._private.state.actors().values()
        return {
            actor["Pid"]: actor["Address"]["NodeID"]
            for actor in actors
            if actor["State"] == "ALIVE" and actor["ActorClassName"] == f"ServeReplica:test:{deployment}"
        }

    def end(self) -> None:
        from ray import serve

        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()
        self.raylets.shutdown()

    def ask(self, method: str, path: str, body: bytes = b"", kind: str = "image/png") -> tuple[int, Any, bytes]:
        """Status, headers, body."""
        connection = http.client.HTTPConnection(self.http, timeout=LIMIT_S)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Content-Type": kind})
            response = connection.getresponse()
            return response.status, response.headers, response.read()

    def runs(self, file: bytes, model: str = "small") -> tuple[int, np.ndarray | None]:
        """Status and labels of an image file."""
        status, _, body = self.ask("POST", f"/v2/models/{model}/infer?output=runs", file)
        if status != 200:
            return status, None
        [output] = json.loads(body)["outputs"]
        ids, lengths = np.reshape(output["data"], (-1, 2)).T
        return status, np.repeat(ids, lengths)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="ray.", dir="/tmp")  # addresses of sockets are short
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**QUIET, "RAY_TMPDIR": folder}.items():
            patch.setenv(name, value)
        running = None
        try:
            running = Cluster()
            yield running
        finally:
            if running is not None:
                running.end()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def other(small_checkpoint, tmp_path_factory) -> Path:
    """The same network behind another size, in batches of up to four."""
    path = tmp_path_factory.mktemp("other") / "other.agln"
    agln_fast.build(small_checkpoint, path, size=(32, 48), batch=(1, 4), precision="fp32")
    return path


@pytest.fixture(scope="module")
def deployed(cluster, bundle, other) -> Cluster:
    bundles = {"small": str(bundle.path), "other": str(other)}
    cluster.deploy(bundles=bundles, backend="onnxruntime", models_per_replica=1)
    return cluster


@pytest.fixture(scope="module")
def expected(bundle, other, picture) -> dict[str, np.ndarray]:
    found = {}
    for name, path in (("small", bundle.path), ("other", other)):
        with agln_fast.load(path, "onnxruntime", threads=1) as segment:
            found[name] = segment(picture).labels
    return found


class Load:
    """Clients that ask again and again, until they are told to end; a picture is right if its labels are."""

    def __init__(self, cluster: Cluster, file: bytes, labels: np.ndarray, clients: int = 4) -> None:
        self.statuses: list[int | str] = []
        self.wrong = 0
        self._end = threading.Event()
        arguments = cluster, file, labels.ravel()
        self._threads = [threading.Thread(target=self._ask, args=arguments) for _ in range(clients)]

    def _ask(self, cluster: Cluster, file: bytes, labels: np.ndarray) -> None:
        while not self._end.is_set():
            try:
                status, found = cluster.runs(file)
            except (OSError, http.client.HTTPException) as error:
                self.statuses.append(type(error).__name__)
                continue
            self.statuses.append(status)
            self.wrong += found is not None and not np.array_equal(found, labels)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def go_on(self, answers: int = 20) -> None:
        """Until there are so many more."""
        enough = len(self.statuses) + answers
        until(lambda: len(self.statuses) >= enough)

    def check(self) -> None:
        assert set(self.statuses) == {200}
        assert self.wrong == 0


def slow(picture: np.ndarray) -> np.ndarray:
    changed = picture.copy()
    changed[0, 0] = SLOW
    return changed


def test_answers_are_the_segmenters(deployed, picture, expected):
    for model, labels in expected.items():
        status, found = deployed.runs(png(picture), model)
        assert status == 200
        np.testing.assert_array_equal(found, labels.ravel())
    pixels = {"name": "pixels", "datatype": "UINT8", "shape": picture.shape, "data": picture.ravel().tolist()}
    body = json.dumps({"id": "7", "inputs": [pixels]}).encode()
    status, headers, body = deployed.ask("POST", "/v2/models/small/infer", body, "application/json")
    document = json.loads(body)
    [output] = document["outputs"]
    assert (status, document["id"], output["shape"]) == (200, "7", [1, *picture.shape[:2]])
    np.testing.assert_array_equal(output["data"], expected["small"].ravel())
    assert all(document["parameters"][f"{stage}_ms"] > 0 for stage in ("queue", "decode", "engine", "encode"))
    assert "server-timing" in headers


def test_a_load_balancer_gets_good_answers(deployed):
    checks = list(ask_all(f"http://{deployed.http}"))
    assert [check.question for check in checks if not check.good] == []
    assert len(checks) == 10


def test_other_deployments_ask_by_a_handle(deployed, picture, expected):
    from ray import serve

    handle = serve.get_app_handle("test")
    inputs = {"pixels": np.stack([picture] * 3)}
    outputs = handle.segment.remote(inputs, ["labels", "labels_png"], model="other").result(timeout_s=LIMIT_S)
    np.testing.assert_array_equal(outputs["labels"], [expected["other"]] * 3)
    assert len(outputs["labels_png"]) == 3
    with pytest.raises(ConfigError, match="no model 'nothing'"):
        handle.segment.remote(inputs, model="nothing").result(timeout_s=LIMIT_S)


def test_what_fails_fails_alone_and_ends_no_replica(deployed, picture):
    before = deployed.replicas()
    bad = picture.copy()
    bad[0, 0] = RAISE
    status, _, body = deployed.ask("POST", "/v2/models/small/infer", png(bad))
    assert (status, json.loads(body)["error"]) == (500, "RuntimeError: see the replica's log")
    assert deployed.ask("POST", "/v2/models/small/infer", b"garbage")[0] == 400
    assert deployed.ask("POST", "/v2/models/small/infer?timeout=100000", png(slow(picture)))[0] == 504
    assert deployed.runs(png(picture))[0] == 200
    assert deployed.replicas() == before


def test_more_bundles_than_a_replica_holds_take_turns(deployed, picture, expected):
    """Also while one that has to go is in use."""
    results: list[tuple[str, int, np.ndarray | None]] = []

    def ask(model: str) -> None:
        results.extend((model, *deployed.runs(png(picture), model)) for _ in range(5))

    threads = [threading.Thread(target=ask, args=(model,)) for model in ("small", "other") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [status for _, status, _ in results] == [200] * 20
    assert all(np.array_equal(found, expected[model].ravel()) for model, _, found in results)


def test_an_instance_that_is_killed_loses_no_request(deployed, picture, expected, bundle):
    file = png(slow(picture))  # it is in the engine most of the time
    with agln_fast.load(bundle, "onnxruntime", threads=1) as segment:
        labels = segment(slow(picture)).labels
    until(lambda: len(deployed.replicas()) == 2)
    assert len(set(deployed.replicas().values())) == 2
    with Load(deployed, file, labels) as load:
        load.go_on(4)
        killed = next(iter(deployed.replicas()))
        os.kill(killed, signal.SIGKILL)
        load.go_on(8)
        until(lambda: len(deployed.replicas().keys() - {killed}) == 2)
        load.go_on(8)
    load.check()


def test_a_new_version_takes_over_without_a_gap(deployed, picture, expected, bundle, other):
    before = deployed.replicas()
    with Load(deployed, png(picture), expected["small"]) as load:
        load.go_on()
        deployed.deploy(bundles={"small": str(bundle.path), "new": str(other)}, backend="torch")
        load.go_on()
        status, found = deployed.runs(png(picture), "new")
    load.check()
    assert status == 200
    assert np.mean(found == expected["other"].ravel()) > 0.99
    assert not before.keys() & deployed.replicas().keys()
    about = json.loads(deployed.ask("GET", "/v2/models/small")[2])
    assert about["parameters"]["engine"] == "torch-fp32"


def test_a_raylet_that_is_killed_loses_no_request(deployed, picture, expected):
    """But what its own ingress holds: this one's clients ask the other node's."""
    until(lambda: set(deployed.replicas("Ingress").values()) == set(deployed.replicas().values()))
    with Load(deployed, png(picture), expected["small"]) as load:
        load.go_on()
        deployed.raylets.remove_node(deployed.second, allow_graceful=False)
        load.go_on()
        until(lambda: len(deployed.replicas()) == 1)
        load.go_on()
    load.check()
    deployed.second = deployed.raylets.add_node(num_cpus=2, object_store_memory=LARGEST)
    until(lambda: len(deployed.replicas()) == 2)


def test_the_exported_file_is_served_and_changed_in_place(deployed, picture, expected, bundle, tmp_path):
    from ray import serve

    serve.delete("test")
    written = export_repository([("small", bundle.path)], "ray", tmp_path / "models")
    path = tmp_path / "models" / "serve.yaml"
    assert written.start == ("serve", "run", str(path))
    config = yaml.safe_load(path.read_text())
    [application] = config["applications"]
    application["name"] = "test"
    application["args"] |= {"queue": 1, "max_replicas": 1, "cpus": 2}
    [deployment] = application["deployments"]
    deployment["user_config"] |= {"backend": "onnxruntime", "threads": 1}

    def run() -> None:
        path.write_text(yaml.safe_dump(config))
        command = Path(sys.executable).parent / "serve"
        subprocess.run(
            [command, "run", "--non-blocking", "--address", deployed.raylets.address, path],
            check=True,
            capture_output=True,
            timeout=LIMIT_S,
        )

    run()
    until(lambda: deployed.ask("GET", "/v2/models/small/ready")[0] == 200)
    _, found = deployed.runs(png(picture))
    np.testing.assert_array_equal(found, expected["small"].ravel())

    statuses: list[tuple[int, Any]] = []
    threads = [
        threading.Thread(
            target=lambda: statuses.append(deployed.ask("POST", "/v2/models/small/infer", png(slow(picture)))[:2])
        )
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for status, _ in statuses} == {200, 503}
    assert all(headers["retry-after"] == "1" for status, headers in statuses if status == 503)

    deployment["user_config"]["backend"] = "torch"
    run()
    limit = time.monotonic() + START_S
    while json.loads(deployed.ask("GET", "/v2/models/small")[2])["parameters"]["engine"] != "torch-fp32":
        assert time.monotonic() < limit
        time.sleep(0.2)
    assert len(deployed.replicas()) == 1
