"""Requests and responses over the wire, against clients of others: `tritonclient` writes and reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from agln_fast.errors import AglnError, ConfigError
from agln_fast.serving.line import Times
from agln_fast.serving.wire import Response, read_binary, read_json, read_tensor, read_timeout

utils = pytest.importorskip("tritonclient.utils")
http = pytest.importorskip("tritonclient.http")


def sent_by_tritonclient(name: str, datatype: str, array: np.ndarray, *, binary: bool, **request: object):
    """What `read_json` or `read_binary` makes of a request that tritonclient wrote."""
    tensor = http.InferInput(name, array.shape, datatype)
    tensor.set_data_from_numpy(array, binary_data=binary)
    body, length = http.InferenceServerClient.generate_request_body([tensor], **request)
    if length is None:
        return read_json(json.loads(body))
    return read_binary(json.loads(body[:length]), bytes(body[length:]))


@pytest.mark.parametrize("binary", [True, False])
def test_pixels_of_tritonclient(binary):
    picture = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    request = sent_by_tritonclient("pixels", "UINT8", picture, binary=binary, request_id="a", timeout=1500)
    np.testing.assert_array_equal(request.inputs["pixels"], picture)
    assert (request.id, request.timeout_s) == ("a", pytest.approx(1.5e-3))


def test_files_of_tritonclient():
    files = np.array([b"", b"\x00\xff" * 300, b"x"], object)
    request = sent_by_tritonclient("image", "BYTES", files, binary=True)
    assert request.inputs["image"] == files.tolist()


@pytest.mark.parametrize("binary", [True, False])
def test_which_outputs_come_as_binary_tensors(binary):
    outputs = [http.InferRequestedOutput("shares", binary_data=binary), http.InferRequestedOutput("labels")]
    request = sent_by_tritonclient("pixels", "UINT8", np.zeros((1, 1, 3), np.uint8), binary=True, outputs=outputs)
    assert request.outputs == ("shares", "labels")
    assert request.binary == frozenset({"labels", *(["shares"] if binary else [])})


def test_all_outputs_come_as_binary_tensors_where_that_is_asked():
    document = {"inputs": [], "outputs": [{"name": "shares"}], "parameters": {"binary_data_output": True}}
    assert read_json(document).binary == {"shares"}
    assert read_json({"inputs": [], "parameters": {"binary_data_output": True}}).binary == {"labels"}
    document["outputs"][0]["parameters"] = {"binary_data": False}
    assert read_json(document).binary == frozenset()


def _binary(size: object) -> dict:
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 3], "parameters": {"binary_data_size": size}}
    return {"inputs": [tensor]}


@pytest.mark.parametrize(
    ("size", "blobs", "message"),
    [
        (3, b"abcd", "1 bytes behind the last"),
        (4, b"abc", "binary_data_size 4: 3 bytes are left"),
        (-1, b"abc", "binary_data_size -1"),
        ("3", b"abc", "binary_data_size is '3'"),
        (2, b"ab", "says 3 values, and 2 came"),
    ],
)
def test_binary_tensors_of_another_size(size, blobs, message):
    with pytest.raises(ConfigError, match=message):
        read_binary(_binary(size), blobs)


@pytest.mark.parametrize(
    ("name", "datatype", "shape", "data", "message"),
    [
        ("pixels", "UINT8", [1], [256], "from 0 to 255"),
        ("pixels", "UINT8", [1], [-1], "from 0 to 255"),
        ("pixels", "UINT8", [1], [1.5], "whole numbers"),
        ("pixels", "UINT8", [2], [True, None], "whole numbers"),
        ("pixels", "UINT8", [2], [1], "says 2 values, and 1 came"),
        ("pixels", "INT8", [1], [1], "datatype 'INT8': needs UINT8"),
        ("image", "BYTES", [1], ["AA=A"], "base64"),
        ("image", "BYTES", [1], ["AAAA!"], "base64"),
        ("image", "BYTES", [2], ["AAAA"], "says 2 images, and 1 came"),
        ("image", "BYTES", [1], b"\x05\x00\x00\x00abc", "end too early"),
    ],
)
def test_tensors_that_are_refused(name, datatype, shape, data, message):
    with pytest.raises(ConfigError, match=message):
        read_tensor(name, datatype, shape, data)


def test_tritonclient_reads_the_answer():
    outputs = {
        "labels": np.arange(6, dtype=np.uint8).reshape(1, 2, 3),
        "runs": np.array([[1, 70_000], [0, 2]], np.int32),
        "shares": np.array([[0.25, 0.75]], np.float32),
        "labels_png": np.array([b"one", b""], object),
    }
    response = Response("m", "3", "id", outputs, Times(1, 2, 3, 4, 5))
    document, blobs = response.to_json(frozenset(outputs))
    text = json.dumps(document).encode()
    result = http.InferResult.from_response_body(b"".join([text, *blobs]), header_length=len(text))
    for name, array in outputs.items():
        np.testing.assert_array_equal(result.as_numpy(name), array)
        assert result.get_output(name)["datatype"] == utils.np_to_triton_dtype(array.dtype)
    assert document["parameters"] == {
        "queue_ms": 1,
        "decode_ms": 2,
        "engine_ms": 3,
        "encode_ms": 4,
        "batch_size": 5,
    }


@given(arrays.arrays(np.uint8, arrays.array_shapes(min_dims=3, max_dims=4, max_side=5)))
@settings(max_examples=30, deadline=None)
def test_whatever_shape_it_has(array):
    shape = list(array.shape)
    np.testing.assert_array_equal(read_tensor("pixels", "UINT8", shape, array.tobytes()), array)
    np.testing.assert_array_equal(read_tensor("pixels", "UINT8", shape, array.tolist()), array)
    np.testing.assert_array_equal(read_tensor("pixels", "UINT8", shape, array.ravel().tolist()), array)


_ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
_SHAPES = st.lists(st.integers(-3, 4) | st.just(2**63 - 1) | st.just(2**62), max_size=400)


def _valid() -> dict:
    return {
        "id": "a",
        "parameters": {"timeout": 5, "binary_data_output": True},
        "inputs": [
            {
                "name": "pixels",
                "datatype": "UINT8",
                "shape": [1, 1, 3],
                "data": [1, 2, 3],
                "parameters": {"content_type": "np"},
            }
        ],
        "outputs": [{"name": "labels", "parameters": {"binary_data": True}}],
    }


def _places(value: object, path: tuple = ()) -> list[tuple]:
    """Of everything in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in _places(inner, (*path, key)))]


@given(st.sampled_from(_places(_valid())[1:]), _ANYTHING | _SHAPES, st.binary(max_size=4))
@settings(max_examples=500, deadline=2000)
def test_a_request_with_anything_in_one_place_is_read_or_refused(place, value, blobs):
    """In a moment, and by the one kind of error with one line."""
    document = part = _valid()
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    for read in (lambda: read_json(document), lambda: read_binary(document, blobs)):
        try:
            request = read()
        except AglnError as error:
            assert len(str(error)) < 1000  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert set(request.inputs) <= {"pixels"}


def test_the_valid_request_is_read():
    request = read_json(_valid())
    np.testing.assert_array_equal(request.inputs["pixels"], [[[1, 2, 3]]])
    assert (request.id, request.outputs, request.binary) == ("a", ("labels",), {"labels"})


@pytest.mark.parametrize("shape", [[2**63 - 1] * 60_000, [0, 2**62, 3], [1] * 65, [], [True, 1, 3], [2**31, 1, 3]])
def test_shapes_without_bounds_are_refused_at_once(shape):
    with pytest.raises(ConfigError, match="needs 1 to 4 whole numbers"):
        read_tensor("pixels", "UINT8", shape, b"")


def test_an_input_that_comes_twice():
    document = _valid()
    document["inputs"] *= 2
    with pytest.raises(ConfigError, match="'pixels' comes twice"):
        read_json(document)


@given(st.binary(max_size=64), st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_whatever_bytes_are_sent(data, count):
    try:
        files = read_tensor("image", "BYTES", [count], data)
    except ConfigError:
        return
    assert b"".join(len(file).to_bytes(4, "little") + file for file in files) == data


@pytest.mark.parametrize(("given", "seconds"), [(None, None), (0, None), (1, 1e-6), ("2000000", 2.0), (2.5e6, 2.5)])
def test_timeouts_are_microseconds(given, seconds):
    assert read_timeout(given) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("given", ["soon", -1, float("nan"), float("inf"), 10**18, [], True])
def test_timeouts_that_make_no_sense(given):
    with pytest.raises(ConfigError, match="timeout"):
        read_timeout(given)
