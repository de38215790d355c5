"""What Triton's Python backend runs, without Triton: batches, and that a request's failure is its own."""

from __future__ import annotations

import io
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from fake_engine import fake_segmenter
from PIL import Image

import agln_fast
from agln_fast.engines.echo import colours
from agln_fast.errors import BackendError, ConfigError, ImageError
from agln_fast.serving.repositories.triton_model import TritonPythonModel, answer


def picture(value: int) -> np.ndarray:
    """(1, 64, 96, 3) of one colour."""
    return np.full((1, 64, 96, 3), value, np.uint8)


def encoded(*pictures: np.ndarray) -> np.ndarray:
    """BYTES as Triton's backend gives them."""
    files = np.empty(len(pictures), object)
    for index, each in enumerate(pictures):
        Image.fromarray(each[0]).save(file := io.BytesIO(), "PNG")
        files[index] = file.getvalue()
    return files


def answers(requests, function=colours, **contract):
    with fake_segmenter(function, **contract) as segment, ThreadPoolExecutor(2) as pool:
        return answer(segment.steps(), pool, requests)


def test_requests_share_batches_and_get_their_own_answers():
    batches = []
    requests = [({"pixels": np.concatenate([picture(k), picture(k + 1)])}, ["shares"]) for k in (0, 50, 200)]
    with fake_segmenter(max_batch=4) as segment, ThreadPoolExecutor(2) as pool:
        steps = segment.steps()
        watched = replace(steps, run=lambda batch: [batches.append(len(batch)), steps.run(batch)][1])
        found = answer(watched, pool, requests)
        alone = [segment(list(inputs["pixels"])) for inputs, _ in requests]
    assert batches == [4, 2]
    for outputs, results in zip(found, alone, strict=True):
        assert list(outputs) == ["shares"]
        wanted = [[result.shares.get(name, 0) for name in result.class_set.classes] for result in results]
        assert outputs["shares"] == pytest.approx(np.array(wanted))


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (({"image": np.array([b"garbage"], object)}, ["labels"]), ImageError),
        (({"image": encoded(picture(1), picture(2)[:, :40])}, ["labels"]), ConfigError),
        (({"pixels": picture(1), "image": encoded(picture(1))}, ["labels"]), ConfigError),
        (({}, ["labels"]), ConfigError),
        (({"pixels": picture(1)[..., :2]}, ["labels"]), ImageError),
    ],
    ids=["garbage", "labels of several sizes", "two inputs", "no input", "two colours"],
)
def test_a_bad_request_does_not_disturb_others(bad, error):
    good = {"image": encoded(picture(3))}, ["labels"]
    first, failed, last = answers([good, bad, good], max_batch=3)
    assert isinstance(failed, error)
    assert (first["labels"] == last["labels"]).all()
    assert first["labels"].shape == (1, 64, 96)


def test_an_engine_that_fails_fails_those_in_its_batch():
    def fail(frames):
        if (frames == 7).any():
            raise BackendError("out of memory")
        return colours(frames)

    requests = [({"pixels": picture(value)}, ["labels"]) for value in (1, 7, 2)]
    first, second, third = answers(requests, fail, max_batch=2)
    assert isinstance(first, BackendError)
    assert isinstance(second, BackendError)
    assert third["labels"].shape == (1, 64, 96)


class _Tensor:
    def __init__(self, name, array):
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class _Error(Exception):
    INVALID_ARG, INTERNAL = "invalid", "internal"

    def __init__(self, message, code):
        super().__init__(message)
        self.message, self.code = message, code


def _request(name, array, *outputs):
    return SimpleNamespace(inputs=lambda: [_Tensor(name, array)], requested_output_names=lambda: set(outputs))


@pytest.fixture
def model(bundle, tmp_path, monkeypatch):
    """The model as Triton opens it, with a stand-in for what Triton gives its Python processes."""

    def response(tensors=(), error=None):
        return SimpleNamespace(outputs={tensor.name(): tensor.as_numpy() for tensor in tensors}, error=error)

    backend = SimpleNamespace(Tensor=_Tensor, InferenceResponse=response, TritonError=_Error)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", backend)
    shutil.copytree(bundle.path, tmp_path / "street" / "1" / "street.agln")
    model = TritonPythonModel()
    place = {"model_repository": str(tmp_path / "street"), "model_version": "1"}
    model.initialize({**place, "model_instance_kind": "CPU", "model_instance_device_id": "0"})
    yield model
    model.finalize()


def test_the_model_answers_as_the_bundle_does(model, bundle):
    image = np.random.default_rng(0).integers(0, 256, (1, 70, 80, 3), np.uint8)
    garbage = _request("image", np.array([b"garbage"], object), "labels")
    good, bad = model.execute([_request("pixels", image, "labels", "shares"), garbage])
    with agln_fast.load(bundle) as segment:
        assert (good.outputs["labels"][0] == segment(image[0]).labels).all()
    assert set(good.outputs) == {"labels", "shares"}
    assert (bad.error.code, bad.outputs) == ("invalid", {})
    assert "not an image of a known format" in bad.error.message


def test_what_the_engine_cannot_do_is_not_the_clients_fault(model):
    model._segment.close()
    [failed] = model.execute([_request("pixels", picture(0), "labels")])
    assert failed.error.code == "internal"


def test_what_nobody_expects_is_in_the_log_alone(model, monkeypatch, capsys):
    def fail(source):
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(model, "_steps", SimpleNamespace(prepare=fail, most=1))
    [failed] = model.execute([_request("pixels", picture(0), "labels")])
    assert (failed.error.code, failed.error.message) == ("internal", "ZeroDivisionError: see the server's log")
    assert "a secret" in capsys.readouterr().err


def test_on_a_gpu_the_model_takes_the_one_that_it_is_given(monkeypatch, tmp_path):
    """And does not run elsewhere."""
    asked = []
    monkeypatch.setattr(
        "agln_fast.serving.repositories.triton_model.load",
        lambda bundle, device: asked.append((bundle.name, device)) or fake_segmenter(),
    )
    (tmp_path / "1" / "street.agln").mkdir(parents=True)
    place = {"model_repository": str(tmp_path), "model_version": "1"}
    for kind in ("GPU", "CPU"):
        model = TritonPythonModel()
        model.initialize({**place, "model_instance_kind": kind, "model_instance_device_id": "2"})
        model.finalize()
    assert asked == [("street.agln", "cuda:2"), ("street.agln", None)]
