"""A repository on a real Triton Inference Server, which `make test-triton` installs.

It has the Python backend alone. So the models of engines run there, too, by a stand-in for their backends that opens
the engine's file: their shapes, batches and pictures to warm up by are the server's to judge.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

import agln_fast
from agln_fast.bundle import Bundle
from agln_fast.data.scenes import Scenes
from agln_fast.runtime.segmenter import Segmenter
from agln_fast.serving.protocol import INPUTS, OUTPUTS
from agln_fast.serving.repositories import export_repository
from agln_fast.serving.repositories.triton import config_schema

ROOT = Path(__file__).parents[2]
TRITON = ROOT / os.environ.get("AGLN_FAST_TEST_TRITON", ".venv-triton")
START_S = 120.0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (TRITON / ".ready").exists(), reason="needs Triton Inference Server: make test-triton"),
]
STAND_IN = """
import json
from pathlib import Path

import onnxruntime
import triton_python_backend_utils as backend


class TritonPythonModel:
    def initialize(self, args):
        self.folder = Path(args["model_repository"], args["model_version"])
        self.session = onnxruntime.InferenceSession(self.folder / "model.onnx", providers=["CPUExecutionProvider"])
        self.output = self.session.get_outputs()[0].name

    def execute(self, requests):
        images = [backend.get_input_tensor_by_name(request, "image").as_numpy() for request in requests]
        with (self.folder / "seen.txt").open("a") as file:
            file.write(json.dumps([list(image.shape) for image in images]) + "\\n")
        results = [self.session.run([self.output], {"image": image})[0] for image in images]
        return [backend.InferenceResponse([backend.Tensor(self.output, result)]) for result in results]
"""


class Running(NamedTuple):
    """Where it answers by HTTP and gRPC, and its repository."""

    http: str
    grpc: str
    repository: Path


@pytest.fixture(scope="module")
def batches(small_checkpoint, tmp_path_factory) -> Bundle:
    """A bundle whose engines take one to four images."""
    path = tmp_path_factory.mktemp("batches") / "street.agln"
    return agln_fast.build(small_checkpoint, path, size=(64, 96), batch=(1, 4), precision="fp32")


@pytest.fixture(scope="module")
def triton(batches, tmp_path_factory) -> Iterator[Running]:
    from google.protobuf import text_format

    folder = tmp_path_factory.mktemp("triton")
    written = export_repository([("street", batches.path)], "triton", folder / "models")
    for model in written.models[1:]:
        place = folder / "models" / model.name
        config = text_format.Parse((place / "config.pbtxt").read_text(), config_schema().ModelConfig())
        config.backend, config.platform, config.default_model_filename = "python", "", "model.py"
        (place / "config.pbtxt").write_text(text_format.MessageToString(config))
        (place / "1" / "model.py").write_text(STAND_IN)
    log = folder / "log.txt"
    with log.open("w") as file:
        process, http, grpc = start(folder / "models", file)
    try:
        limit = time.monotonic() + START_S
        while not is_ready(http):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < limit, log.read_text()[-3000:]
            time.sleep(0.2)
        yield Running(http, grpc, folder / "models")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(START_S)
        finally:
            process.kill()


def start(repository: Path, log: Any) -> tuple[subprocess.Popen[bytes], str, str]:
    """The server's process, and where it will answer by HTTP and gRPC."""
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        http, grpc = one.getsockname()[1], other.getsockname()[1]
    [server] = TRITON.glob("lib/python*/site-packages/pytriton/tritonserver")
    ask = [TRITON / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
    libraries = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    command = [
        server / "bin" / "tritonserver",
        f"--model-repository={repository}",
        f"--backend-directory={server / 'backends'}",
        *(f"--{name}-address=127.0.0.1" for name in ("http", "grpc")),
        f"--http-port={http}",
        f"--grpc-port={grpc}",
        "--allow-metrics=false",
    ]
    # Its processes run the Python that is found first.
    found = {"PATH": f"{TRITON / 'bin'}:{os.environ['PATH']}", "LD_LIBRARY_PATH": libraries}
    process = subprocess.Popen(list(map(str, command)), env=os.environ | found, stdout=log, stderr=subprocess.STDOUT)
    return process, f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}"


def is_ready(http: str) -> bool:
    try:
        with urllib.request.urlopen(f"{http}/v2/health/ready", timeout=10) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def client(triton: Running) -> Iterator[Any]:
    import tritonclient.grpc

    with tritonclient.grpc.InferenceServerClient(triton.grpc) as opened:
        yield opened


@pytest.fixture(scope="module")
def segment(batches: Bundle) -> Iterator[Segmenter]:
    """By the engine that the server has, too."""
    with agln_fast.load(batches, "onnxruntime") as opened:
        yield opened


@pytest.fixture(scope="module")
def pictures() -> list[np.ndarray]:
    """Of several sizes."""
    return [Scenes("val", size=(60 + 7 * index, 112))[index].image for index in range(8)]


def jpeg(picture: np.ndarray) -> bytes:
    Image.fromarray(picture).save(file := io.BytesIO(), "JPEG")
    return file.getvalue()


def ask(client: Any, *outputs: str, model: str = "street", timeout: int | None = None, **inputs: Any) -> dict[str, Any]:
    """`image` are encoded pictures, all else arrays."""
    import tritonclient.grpc as protocol

    given = []
    for name, value in inputs.items():
        array = np.array(value, object).reshape(-1, 1) if name == "image" and isinstance(value, list) else value
        given.append(protocol.InferInput(name, list(array.shape), "BYTES" if array.dtype == object else "UINT8"))
        given[-1].set_data_from_numpy(array)
    wanted = [protocol.InferRequestedOutput(name) for name in outputs] or None
    answer = client.infer(model, given, outputs=wanted, timeout=timeout)
    return {output.name: answer.as_numpy(output.name) for output in answer.get_response().outputs}


def test_labels_are_those_of_the_bundle(client, segment, pictures):
    """Of encoded pictures and of pixels, several at once, of several sizes."""

    def agree(picture: np.ndarray) -> bool:
        data = jpeg(picture)
        encoded = ask(client, "labels", image=[data])["labels"]
        raw = ask(client, "labels", pixels=picture[np.newaxis])["labels"]
        return np.array_equal(encoded[0], segment(data).labels) and np.array_equal(raw[0], segment(picture).labels)

    before = client.get_inference_statistics("street").model_stats[0]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(agree, 4 * pictures))
    after = client.get_inference_statistics("street").model_stats[0]
    asked = after.inference_count - before.inference_count
    assert asked == 8 * len(pictures)
    assert after.execution_count - before.execution_count < asked  # some went together
    assert max(stats.batch_size for stats in after.batch_stats) <= 4


def test_a_bad_picture_is_refused_and_the_next_one_is_not(client, segment, pictures):
    import tritonclient.utils as protocol

    for data, message in ((b"garbage", "not an image of a known format"), (jpeg(pictures[0])[:200], "bytes")):
        with pytest.raises(protocol.InferenceServerException, match=message) as caught:
            ask(client, "labels", image=[data])
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        found = ask(client, "labels", pixels=pictures[0][np.newaxis])["labels"]
        assert np.array_equal(found[0], segment(pictures[0]).labels)


def test_all_outputs_are_there(client, segment, pictures):
    found = ask(client, image=[jpeg(pictures[1]), jpeg(pictures[1])])
    assert set(found) == set(OUTPUTS)
    result = segment(jpeg(pictures[1]))
    png = Image.open(io.BytesIO(found["labels_png"].reshape(-1)[1]))
    assert np.array_equal(np.array(png), result.labels)
    values, lengths = found["runs"].T
    assert np.array_equal(np.repeat(values, lengths).reshape(found["labels"].shape), found["labels"])
    shares = [result.shares.get(name, 0) for name in segment.class_set.classes]
    assert found["shares"] == pytest.approx(np.array([shares, shares]), abs=1e-6)
    assert Image.open(io.BytesIO(found["overlay_png"].reshape(-1)[0])).width >= pictures[1].shape[1]


def test_the_file_of_labels_names_the_largest_share(client, segment, pictures):
    import tritonclient.grpc as protocol

    given = protocol.InferInput("pixels", [1, *pictures[2].shape], "UINT8")
    given.set_data_from_numpy(pictures[2][np.newaxis])
    wanted = [protocol.InferRequestedOutput("shares", class_count=1)]
    named = client.infer("street", [given], outputs=wanted).as_numpy("shares")
    shares = segment(pictures[2]).shares
    assert [item.decode().split(":")[2] for item in named[0]] == [max(shares, key=shares.get)]


def test_a_request_that_is_late_is_not_run(client, pictures):
    import tritonclient.utils as protocol

    with pytest.raises(protocol.InferenceServerException, match="timeout expired"):
        ask(client, "labels", timeout=1, pixels=pictures[0][np.newaxis])


def test_metadata_are_the_protocols(client):
    found = client.get_model_metadata("street")
    assert {port.name: port.datatype for port in found.inputs} == {each.name: each.datatype for each in INPUTS.values()}
    assert {port.name: port.datatype for port in found.outputs} == {
        each.name: each.datatype for each in OUTPUTS.values()
    }
    told = client.get_model_config("street").config.parameters
    assert told["size"].string_value == "64x96"


@pytest.mark.parametrize("engine", ["onnxruntime-fp32", "openvino-fp32"])
def test_models_of_engines_take_the_contracts_tensors(client, triton, segment, engine):
    """Warmed up by pictures of the bundle, one and four at once."""
    seen = (triton.repository / f"street_{engine}" / "1" / "seen.txt").read_text().split("\n")
    batched = engine != "openvino-fp32"  # whose batches are the requests'
    assert seen[:2] == ["[[1, 64, 96, 3]]", f"[{', '.join(4 * ['[1, 64, 96, 3]'])}]" if batched else "[[4, 64, 96, 3]]"]
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 96, 3), np.uint8)
    found = ask(client, model=f"street_{engine}", image=images)
    wanted = np.stack([result.labels for result in segment(list(images))])
    [labels] = found.values()
    assert labels.shape == wanted.shape
    assert (labels == wanted).mean() > 0.999


def test_a_bundle_that_was_damaged_is_not_served(triton, tmp_path):
    shutil.copytree(triton.repository / "street", tmp_path / "models" / "street")
    weights = tmp_path / "models" / "street" / "1" / "street.agln" / "model.onnx"
    weights.write_bytes(weights.read_bytes()[:-1])
    with (tmp_path / "log.txt").open("w") as file:
        process, _, _ = start(tmp_path / "models", file)
    try:
        assert process.wait(START_S) != 0
    finally:
        process.kill()
    assert "model.onnx was changed after the build" in (tmp_path / "log.txt").read_text()
