"""Manifests that were made to break something: whatever stands in one, it is refused, or it means what it says."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import pytest
from hand_made import constant_network, hand_made_bundle

import agln_fast
from agln_fast import manifest as manifest_module
from agln_fast.builder.rebuild import read_recipe
from agln_fast.bundle import open_bundle, seal
from agln_fast.cli.inspect import inspect
from agln_fast.errors import AglnError, BundleError
from agln_fast.export.onnx import export_onnx
from agln_fast.manifest import Manifest, parse_manifest

_T = TypeVar("_T")
CRAFTED = 1000

ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 257, 2**31, 2**63, 10**400, 0.5, 128.0, -0.0, 1e-320, 1e308),
    *(float("nan"), float("inf"), -float("inf")),
    *("", "0", "a\x1b[2Jb", "a\nb", "\ud800", "\u202e", "\x00", "[/x]", "[red]", "ä" * 300, "x" * 100_000),
    *(
        "../x",
        "/etc/passwd",
        "a//b",
        "model.onnx\n",
        "graph.xml",
        "fp16",
        "int8",
        "openvino",
        "onnxruntime",
        "tensorrt",
    ),
    *([], [[]], [None], [1, 2, 3], ["none", "rows"], [["none"], "none", "none"], [0.5, float("nan"), 0.5]),
    *({}, {"a": 1}, {"": {}}, {"file": []}, "labels", "logits"),
]


BACKENDS = ("torch", "fused", "onnxruntime")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """With an engine that has a graph, too."""
    bundle = hand_made_bundle(tmp_path_factory.mktemp("made") / "made.agln", label=1)
    manifest = bundle.manifest
    export_onnx(constant_network(1), bundle.path / "model.onnx", manifest.contract)
    graph = replace(manifest.engines[0], name="onnxruntime-fp32", backend="onnxruntime", file="model.onnx")
    for name in ("manifest.json", "SHA256SUMS"):
        (bundle.path / name).unlink()
    return replace(bundle, manifest=seal(bundle.path, replace(manifest, engines=(*manifest.engines, graph))))


def _places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in inner for place in _places(part, (*at, key)))]


def _mutate(values: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Something somewhere is another value, gone, there twice, or has a companion."""
    values = copy.deepcopy(values)
    *path, last = rng.choice(_places(values)[1:])
    parent: Any = values
    for key in path:
        parent = parent[key]
    kind = rng.choice(["replace"] * 6 + ["scale", "remove", "double", "wrap", "add"])
    if kind == "scale" and type(parent[last]) in (int, float):
        parent[last] *= rng.choice([-1, 0, 2, 1.5, 1e6])
    elif kind == "remove":
        del parent[last]
    elif kind == "double" and isinstance(parent, list):
        parent.append(parent[last])
    elif kind == "wrap":
        parent[last] = rng.choice([[parent[last]], {last: parent[last]}])
    elif kind == "add" and isinstance(parent, dict):
        parent[rng.choice(["extra", "", "\x1b]0;x\x07", "\udc80", "mean", "x" * 5000])] = rng.choice(ODD)
    else:
        parent[last] = rng.choice(ODD)
    return values


def _put(folder, text: bytes) -> None:
    """Make `text` the manifest, and the sums right."""
    (folder / "manifest.json").write_bytes(text)
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = [line for line in lines if not line.endswith("  manifest.json")]
    sums.append(f"{hashlib.sha256(text).hexdigest()}  manifest.json")
    (folder / "SHA256SUMS").write_text("".join(f"{line}\n" for line in sorted(sums, key=lambda line: line[66:])))


def _holds(read: Any, written: Any) -> bool:
    """Whether all that was written is there again, of the same type; what was left out, or is null, has its default."""
    if isinstance(written, dict):
        return isinstance(read, dict) and all(key in read and _holds(read[key], part) for key, part in written.items())
    if isinstance(written, list):
        return len(read) == len(written) and all(map(_holds, read, written))
    return written is None or (type(read) is type(written) and read == written)


def _outcome(act: Callable[[], _T]) -> _T | AglnError:
    """What `act` returns, or how it refuses, in one line that can be printed; all else that it raises is raised."""
    try:
        return act()
    except AglnError as error:
        refusal = error
    assert len(str(refusal)) < 1500
    assert str(refusal).isprintable()
    return refusal


@pytest.mark.slow
def test_no_manifest_raises_what_is_no_error_of_ours(made, capsys):
    """Neither on opening, nor in what comes after it: `inspect`, `load`, a run; nor in `rebuild`."""
    values, rng = made.manifest.to_dict(), random.Random(0)
    image, accepted, inspected, ran = np.zeros((40, 50, 3), np.uint8), 0, 0, Counter()
    for _ in range(CRAFTED):
        crafted = _mutate(values, rng)
        _put(made.path, json.dumps(crafted).encode())
        recipe = _outcome(lambda: read_recipe(made.path))
        if not isinstance(recipe, AglnError):
            colours = recipe.options["classes"].palette
            assert all(type(value) is int for colour in colours for value in colour)
        bundle = _outcome(lambda: open_bundle(made.path))
        if isinstance(bundle, AglnError):
            continue
        assert _holds(bundle.manifest.to_dict(), crafted), crafted
        accepted += 1
        if accepted % 2:
            continue
        inspected += _outcome(lambda: inspect(str(made.path))) is None
        backend = BACKENDS[accepted // 2 % 3]
        segment = _outcome(lambda backend=backend: agln_fast.load(made.path, backend))
        if not isinstance(segment, AglnError):
            contract = segment.contract
            if contract.max_batch * contract.height * contract.width < 10**6:
                assert segment(image).names == [bundle.manifest.classes[1]]
                ran[backend] += 1
            segment.close()
    assert inspected > CRAFTED / 40
    assert all(ran[backend] > CRAFTED / 200 for backend in BACKENDS), ran
    capsys.readouterr()


def _class(name: str) -> Callable[[Any], None]:
    return lambda v: v["classes"].__setitem__(0, name)


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "integer as a float": (lambda v: v["contract"].update(height=128.0), r"\$\.contract\.height: 128\.0 is not of"),
    "version as a float": (lambda v: v.update(schema_version=2.0), r"schema version '2\.0': it is not of agln-fast"),
    "mean that is no number": (lambda v: v["contract"].update(mean=[0.5, math.nan, 0.5]), "NaN is no number"),
    "infinite batch": (lambda v: v["contract"].update(max_batch=1e308), r"\$\.contract\.max_batch"),
    "absurd batch": (lambda v: v["contract"].update(max_batch=10**9), r"batch 1\.\.1000000000: needs"),
    "more digits than a float": (
        lambda v: v["contract"].update(mean=[10**400, 0, 0]),
        "mean needs three numbers from 0",
    ),
    "nested lists in a plan": (lambda v: v["engines"][0]["plan"].update(mix_before_upsample=[[]] * 3), "torch-fp32: m"),
    "classes without outputs": (lambda v: v["classes"].append("sixth"), "5 colours"),
    "outputs without classes": (lambda v: v["model"].update(num_classes=6), "names 5 classes for 6 outputs"),
    "a class twice": (_class("class 1"), "'class 1' stands there twice"),
    "an escape sequence": (_class("\x1b[31m"), r"the text '\\x1b\[31m', which cannot be shown"),
    "half a character": (_class("\ud800"), r"\\ud800"),
    "a name that is a space": (_class(" "), "class name ' ' cannot be printed"),
    "markup": (lambda v: v["engines"][0].update(name="[/x]"), r"\$\.engines\[0\]\.name: '\[/x\]' does not match"),
    "an engine twice": (lambda v: v["engines"].append(v["engines"][0]), "names an engine twice"),
    "agreement above one": (lambda v: v["engines"][0]["verification"].update(agreement=1.5), r"verification"),
    "a file without a hash": (lambda v: v["files"].pop("model.onnx"), "gives no hash for model.onnx"),
    "a hash of the hashes": (lambda v: v["files"].update({"SHA256SUMS": "0" * 64}), r"\$\.files"),
    "graph without weights": (lambda v: v["files"].update({"weights.xml": "0" * 64}), "weights.xml is missing"),
    "very deep": (lambda v: v.update(model=json.loads("[" * 900 + "]" * 900)), "too deep in each other"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_sense_is_named(case, made):
    change, message = WRONG[case]
    values = made.manifest.to_dict()
    change(values)
    _put(made.path, json.dumps(values).encode())
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(made.path)
    assert str(caught.value).isprintable()


TEXTS = {
    "a name twice": lambda text: text.replace(b'"engines"', b'"classes"', 1),
    "infinity": lambda text: text.replace(b"2.5", b"Infinity", 1),
    "infinity in digits": lambda text: text.replace(b"2.5", b"1e999", 1),
    "a number of 5,000 digits": lambda text: text.replace(b"2.5", b"9" * 5000, 1),
    "another encoding": lambda text: text.replace(b"class 0", "Straße".encode("latin-1"), 1),
    "a byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "many megabytes": lambda text: text + b" " * 2**24,
}


@pytest.mark.parametrize("case", TEXTS)
def test_what_is_no_plain_json_is_damaged(case, made):
    text = json.dumps(made.manifest.to_dict()).encode()
    assert TEXTS[case](text) != text
    _put(made.path, TEXTS[case](text))
    with pytest.raises(BundleError, match=r"manifest\.json is damaged") as caught:
        open_bundle(made.path)
    assert str(caught.value).isprintable()


MOST = 32_767


def _many(change: Callable[[dict[str, Any]], Any], values: dict[str, Any]) -> bytes:
    change(values)
    return json.dumps(values, indent=2).encode()


def _named(count: int) -> dict[str, str]:
    return {f"name-{index}": "x" for index in range(count)}


LONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "colours": (lambda v: v.update(palette=[[1, 2, 3]] * 100_000), r"\$\.palette"),
    "odd colours": (lambda v: v.update(palette=[[1.5, 2, 3]] * MOST), r"\$\.palette\[0\]\[0\]"),
    "odd classes": (lambda v: v.update(classes=[""] * MOST), r"\$\.classes\[0\]"),
    "classes twice": (
        lambda v: v.update(classes=[*map(str, range(MOST - 1)), "0"], palette=[[1, 2, 3]] * MOST),
        "'0' stands there twice",
    ),
    "engines": (lambda v: v.update(engines=v["engines"] * 1000), r"\$\.engines"),
    "capabilities": (
        lambda v: v["engines"][0].update(compute_capabilities=[f"sm{index}" for index in range(10, 9999)] * 20),
        "compute_capabilities",
    ),
    "versions": (lambda v: v["engines"][0].update(versions=_named(200_000)), "versions"),
    "left out": (lambda v: v.update(left_out=_named(200_000)), "left_out"),
    "created with": (lambda v: v.update(created_with=_named(200_000)), "created_with"),
    "files": (lambda v: v.update(files=_named(200_000)), "files"),
    "parts of a model": (lambda v: v.update(model={**v["model"], **_named(200_000)}), "unknown field"),
    "a list in a model": (lambda v: v["model"].update(encoder=["x"] * 500_000), "encoder"),
    "rewrites": (lambda v: v["engines"][0].update(plan=_named(200_000)), "unknown rewrite"),
    "a list in a plan": (lambda v: v["engines"][0]["plan"].update(mix_before_upsample=["x"] * 500_000), "mix_before"),
    "other things": (lambda v: v.update(_named(200_000)), "Additional properties"),
}


@pytest.mark.parametrize("case", LONG)
def test_what_is_long_is_refused_at_once(case, made):
    """Time of the processor, because others may use it, too."""
    change, message = LONG[case]
    _put(made.path, _many(change, made.manifest.to_dict()))
    began = time.process_time()
    with pytest.raises(BundleError, match=message) as caught:
        open_bundle(made.path)
    assert time.process_time() - began < 5
    assert len(str(caught.value)) < 1500


def test_as_many_classes_as_there_can_be_are_read_at_once(made):
    values = made.manifest.to_dict()
    values["model"]["num_classes"] = MOST
    values["classes"] = [f"{index:-<180}" for index in range(MOST)]
    values["palette"] = [[index % 256, 255, 128] for index in range(MOST)]
    text = (json.dumps(values, indent=2) + "\n").encode()
    began = time.process_time()
    assert len(Manifest.from_dict(parse_manifest(text)).classes) == MOST
    assert time.process_time() - began < 5


@pytest.mark.parametrize("part", ["line", "rgb"])
def test_what_is_surely_right_is_so_by_the_schema(part):
    schema = manifest_module._schema()["$defs"][part]
    validator, surely_right = manifest_module._validator()(schema), manifest_module._SURELY_RIGHT[f"#/$defs/{part}"]
    odd = [*ODD, "x" * 200, "x" * 201, [0, 0, 255], [0, 0, 256], [-1, 0, 0], [0, 0], [0.0, 1, 2], [True, 0, 0]]
    for item in odd:
        assert surely_right(item) == validator.is_valid(item), item


def test_nothing_is_sealed_that_would_not_open(made, tmp_path):
    with pytest.raises(BundleError, match="cannot be shown"):
        seal(tmp_path, replace(made.manifest, left_out={"openvino-int8": "two\nlines"}))
    assert not os.listdir(tmp_path)
