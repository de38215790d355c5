"""Bundles: whatever is changed, missing or foreign is noticed on opening."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from hand_made import hand_made_bundle

import agln_fast
from agln_fast.bundle import open_bundle, seal
from agln_fast.errors import BundleError
from agln_fast.manifest import Manifest


@pytest.fixture
def copy(bundle, tmp_path):
    return shutil.copytree(bundle.path, tmp_path / "copy.agln")


def test_a_bundle_opens_elsewhere(copy, bundle):
    opened = open_bundle(copy)
    assert opened.manifest == bundle.manifest
    with agln_fast.load(opened, "onnxruntime") as segment:
        assert segment(np.zeros((50, 60, 3), np.uint8)).labels.shape == (50, 60)


def test_manifest_survives_json(bundle):
    assert Manifest.from_dict(json.loads(json.dumps(bundle.manifest.to_dict()))) == bundle.manifest


@pytest.mark.parametrize("stretch", [16, pytest.param(1, marks=pytest.mark.slow)], ids=["sample", "all"])
def test_every_byte_of_the_small_files_counts(stretch, tmp_path):
    """All of the first hundred, and one at random of each `stretch` behind."""
    small = hand_made_bundle(tmp_path / "small.agln").path
    random = np.random.default_rng(0)
    for name in ("manifest.json", "SHA256SUMS"):
        file = small / name
        whole = file.read_bytes()
        assert len(whole) > 100
        behind = [int(random.integers(i, min(i + stretch, len(whole)))) for i in range(100, len(whole), stretch)]
        for i in [*range(100), *behind]:
            for flip in (0x01, 0x20):
                file.write_bytes(whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :])
                with pytest.raises(BundleError):
                    open_bundle(small)
        file.write_bytes(whole)
    assert open_bundle(small)


@pytest.mark.parametrize("name", ["model.onnx", "weights.safetensors", "reference.npz", "report.md"])
def test_bytes_of_all_other_files_count(name, copy):
    whole = bytearray((copy / name).read_bytes())
    for i in [*np.random.default_rng(0).integers(0, len(whole), 10).tolist(), 0, len(whole) - 1]:
        whole[i] ^= 1
        (copy / name).write_bytes(whole)
        with pytest.raises(BundleError, match=rf"{name} was changed after the build"):
            open_bundle(copy)
        whole[i] ^= 1


def test_truncated_and_missing_files_are_named(copy):
    data = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(data[:-1])
    with pytest.raises(BundleError, match=r"model\.onnx was changed"):
        open_bundle(copy)
    (copy / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx is missing"):
        open_bundle(copy)


def test_standard_tools_can_check_a_bundle(copy):
    subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=copy, check=True)


def test_what_is_no_bundle_is_told(tmp_path, bundle):
    with pytest.raises(BundleError, match="no such bundle"):
        open_bundle(tmp_path / "nothing.agln")
    with pytest.raises(BundleError, match=r"there is no manifest\.json"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="not a folder"):
        open_bundle(bundle.path / "report.md")


def _reseal(folder, change):
    values = json.loads((folder / "manifest.json").read_text())
    change(values)
    (folder / "manifest.json").write_text(json.dumps(values))


FOREIGN = {
    "newer schema": (
        lambda v: v.update(schema_version=3),
        r"schema 3, this one reads 2\); upgrade: pip install --upgrade agln-fast",
    ),
    "no schema": (lambda v: v.pop("schema_version"), "schema version 'None'"),
    "missing part": (lambda v: v.pop("engines"), "'engines' is a required property"),
    "unknown part": (lambda v: v.update(extra=1), r"breaks its schema at \$"),
    "way out": (lambda v: v["engines"][0].update(file="../../etc/passwd"), r"\$\.engines\[0\]\.file"),
    "absolute path": (lambda v: v["engines"][0].update(file="/etc/passwd"), r"\$\.engines\[0\]\.file"),
    "unlisted file": (lambda v: v["engines"][0].update(file="other.onnx"), "gives no hash for other.onnx"),
    "impossible size": (lambda v: v["contract"].update(height=1), "size 1x96"),
    "impossible model": (lambda v: v["model"].update(encoder="vgg"), "unknown encoder 'vgg'"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_manifests_are_refused(case, copy):
    change, message = FOREIGN[case]
    _reseal(copy, change)
    with pytest.raises(BundleError, match=message):
        open_bundle(copy)


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "null", "\xff\xfe"], ids=["empty", "cut", "deep", "null", "bytes"]
)
def test_damaged_manifests_are_refused(text, copy):
    (copy / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=r"manifest\.json is damaged|schema version 'None'"):
        open_bundle(copy)


def test_unknown_engines_are_corrected(bundle):
    with pytest.raises(BundleError, match="did you mean 'onnxruntime-fp32'"):
        bundle.engine("onnxruntime-fp31")
    assert bundle.engine("torch-fp32").backend == "torch"


def test_sealing_twice_gives_the_same_hashes(copy, bundle):
    for name in ("manifest.json", "SHA256SUMS"):
        (copy / name).unlink()
    assert seal(copy, replace(bundle.manifest, files={})).files == bundle.manifest.files
