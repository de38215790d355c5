"""A bundle of an older schema, or of this one, is built again from its own weights."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agln_fast
from agln_fast.builder.rebuild import read_recipe, rebuild
from agln_fast.bundle import Bundle
from agln_fast.errors import AglnError, BundleError, ConfigError

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def old(bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle, to be changed."""
    return Path(shutil.copytree(bundle.path, tmp_path / "old.agln"))


def rewrite_manifest(folder: Path, change: Change) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


def to_schema_1(values: dict[str, Any]) -> None:
    """What the first version wrote: one list of rewrites for all engines, nothing left out, no device."""
    values["schema_version"] = 1
    values["plan"] = []
    del values["left_out"]
    for engine in values["engines"]:
        del engine["plan"], engine["plan_chosen_by"], engine["verification"]["device"]


def engine(backend: str, precision: str, target: str, *capabilities: str) -> dict[str, Any]:
    return {
        "name": f"{backend}-{precision}",
        "backend": backend,
        "precision": precision,
        "target": target,
        "compute_capabilities": list(capabilities),
    }


def labels(path: Path, backend: str = "auto") -> np.ndarray:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    with agln_fast.load(path, backend) as segment:
        return segment(image).labels


def test_schema_1(old: Path, bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    def change(values: dict[str, Any]) -> None:
        to_schema_1(values)
        values["classes"] = ["road", "wall", "sky", "tree", "car"]
        values["palette"] = [[index, 2, 3] for index in range(5)]
        values["engines"].append(engine("mindspore", "fp32", "cpu"))

    rewrite_manifest(old, change)
    with pytest.raises(BundleError, match=rf"older schema 1, .*: agln-fast rebuild {old}$"):
        agln_fast.open_bundle(old)
    with caplog.at_level(logging.WARNING, "agln_fast.rebuild"):
        built = rebuild(old)
    assert built.path == old.with_name("old.rebuilt.agln")
    assert "left out: mindspore-fp32: this agln-fast has no backend 'mindspore'" in caplog.text
    manifest = built.manifest
    assert manifest.classes == ("road", "wall", "sky", "tree", "car")
    assert manifest.palette == tuple((index, 2, 3) for index in range(5))
    assert (manifest.model, manifest.contract) == (bundle.manifest.model, bundle.manifest.contract)
    assert {each.name for each in manifest.engines} == {each.name for each in bundle.manifest.engines}
    for backend in ("onnxruntime", "torch"):
        np.testing.assert_array_equal(labels(built.path, backend), labels(bundle.path, backend))


def test_this_schema_in_its_own_place(old: Path, bundle: Bundle) -> None:
    rewrite_manifest(old, lambda v: v.update(engines=[e for e in v["engines"] if e["backend"] in ("torch", "fused")]))
    (old / "model.onnx").unlink()
    built = rebuild(old, overwrite=True)
    assert built.path == old
    assert [each.name for each in built.manifest.engines] == ["fused-fp32", "torch-fp32"]
    np.testing.assert_array_equal(labels(old), labels(bundle.path, "torch"))


def test_data_that_engines_were_judged_by_is_missed(
    old: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no part of the bundle, and nothing else tells that the engines are others now."""
    accuracy = {"dataset": "street"}
    rewrite_manifest(old, lambda values: values["engines"][0].update(accuracy=accuracy))
    monkeypatch.setattr("agln_fast.builder.build.make_bundle", lambda options: options)
    with caplog.at_level(logging.WARNING, "agln_fast.rebuild"):
        rebuild(old)
        assert "its engines were judged on street, and now are by scenes" in caplog.text
        caplog.clear()
        rebuild(old, data="scenes")
        accuracy["dataset"] = "scenes"
        rewrite_manifest(old, lambda values: values["engines"][0].update(accuracy=accuracy))
        rebuild(old)
    assert "judged on" not in caplog.text


def test_an_existing_destination_stays(old: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in old.iterdir()}
    with pytest.raises(ConfigError, match="exists already"):
        rebuild(old, old)
    assert {file: file.read_bytes() for file in old.iterdir()} == before
    assert list(tmp_path.iterdir()) == [old]


def test_targets_keep_their_own_precisions(old: Path) -> None:
    engines = [
        engine("openvino", "bf16", "cpu"),
        engine("openvino", "fp32", "cpu"),
        engine("onnxruntime", "fp32", "cpu"),
        engine("tensorrt-rtx", "fp16", "tensorrt-rtx", "sm86", "sm89"),
        engine("fused", "fp16", "cuda"),
        engine("fused", "fp32", "cpu"),
        engine("torch", "fp32", "cpu"),
        engine("torch", "fp4", "cuda"),
        engine("openvino", "fp32", "npu"),
    ]
    rewrite_manifest(old, lambda values: values.update(engines=engines))
    recipe = read_recipe(old)
    assert recipe.options["precision"] == {"cpu": ("bf16", "fp32"), "tensorrt-rtx": ("fp16",), "cuda": ("fp16",)}
    assert recipe.options["compute_capabilities"] == ("sm86", "sm89")
    assert recipe.left_out == (
        "torch-fp4: this agln-fast has no precision 'fp4'",
        "openvino-fp32: this agln-fast has no target 'npu'",
    )


REFUSED: dict[str, tuple[Change, str]] = {
    "newer": (lambda v: v.update(schema_version=3), "upgrade: pip install --upgrade agln-fast"),
    "true is no version": (lambda v: v.update(schema_version=True), "not of agln-fast"),
    "no classes": (lambda v: v.pop("classes"), "'classes' is a required property"),
    "classes twice": (lambda v: v.update(classes=["a"] * 5), "stands there twice"),
    "colours missing": (lambda v: v["palette"].pop(), "5 classes and 4 colours"),
    "foreign model": (lambda v: v["model"].update(encoder="vgg"), "unknown encoder 'vgg'"),
    "impossible size": (lambda v: v["contract"].update(height=1), "size 1x96"),
    "engines of another kind": (lambda v: v.update(engines=[3]), r"\$\.engines\[0\]"),
    "capabilities of another kind": (lambda v: v["engines"][0].update(compute_capabilities=3), "compute_capabilities"),
    "a colour of floats": (
        lambda v: v["palette"].__setitem__(0, [128.0, 0, 0]),
        r"\$\.palette\[0\]\[0\]: 128\.0 is not",
    ),
    "weights without a hash": (
        lambda v: v.update(files={}),
        "gives no hash for weights.safetensors; build it from the",
    ),
    "changed weights": (
        lambda v: v["files"].update({"weights.safetensors": hashlib.sha256(b"").hexdigest()}),
        "weights.safetensors was changed after the build; copy the bundle again, or build it from the checkpoint",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rebuilt(case: str, old: Path) -> None:
    change, message = REFUSED[case]
    rewrite_manifest(old, change)
    with pytest.raises(AglnError, match=message) as caught:
        rebuild(old)
    assert isinstance(caught.value, BundleError)
    assert str(caught.value).startswith(f"{old}: ")
    assert str(caught.value).count(str(old)) == 1


def test_missing_weights(old: Path) -> None:
    (old / "weights.safetensors").unlink()
    with pytest.raises(BundleError, match=r"there is no weights\.safetensors to rebuild it from"):
        rebuild(old)
