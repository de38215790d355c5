"""A kind of engine is stated once: one that is defined in this file is known everywhere. And the double."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from jsonschema import Draft202012Validator

import agln_fast
from agln_fast.artefact import Artefact
from agln_fast.bench.race.contestants import contestants
from agln_fast.bench.race.measure import Case, Entry, Options, measure
from agln_fast.builder.options import BuildOptions
from agln_fast.builder.rebuild import read_recipe
from agln_fast.builder.tune import tune
from agln_fast.bundle import Bundle
from agln_fast.engines import KINDS, Engine, EngineKind, open_engine, targets
from agln_fast.engines.base import Array, Workbench
from agln_fast.engines.echo import Echo, colours
from agln_fast.errors import BackendError, ConfigError
from agln_fast.manifest import _schema
from agln_fast.plan.plan import NO_PLAN, Plan
from agln_fast.precision import PRECISIONS, Precision

IMAGE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


class Second(EngineKind):
    """ONNX Runtime once more, by all that it does by default; for a target of its own, too."""

    name = "second"
    precisions = ("fp32",)
    package = extra = "onnxruntime"
    plans = "timing"
    settings = "as it comes"

    def suits(self, plan: Plan, precision: Precision) -> Plan:
        return NO_PLAN

    def make(self, bench: Workbench, precision: Precision, plan: Plan = NO_PLAN) -> Artefact:
        return self.artefact(bench, precision, plan, bench.graph(precision, plan))

    def open(self, artefact: Artefact, *, device: str | None = None, threads: int | None = None) -> Engine:
        return SecondEngine(artefact)


class SecondEngine(Engine):
    name, device, precision = "second", "cpu", "fp32"

    def __init__(self, artefact: Artefact) -> None:
        self._session: Any = onnxruntime.InferenceSession(artefact.read(artefact.file))

    def _run(self, image: Array) -> Array:
        return self._session.run(None, {"image": image})[0]

    def _release(self) -> None:
        self._session = None


@pytest.fixture(scope="module")
def second():
    """The kind, as long as this file's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(KINDS, "second", Second())
        yield


@pytest.fixture(scope="module")
def built(second, small_network, tmp_path_factory) -> Bundle:
    path = tmp_path_factory.mktemp("built") / "x"
    return agln_fast.build(small_network(), path, size=(64, 64), precision="fp32", plan="none")


def test_build_and_load(built):
    record = built.engine("second-fp32")
    assert (record.backend, record.file, record.target) == ("second", "model.onnx", "cpu")
    assert record.versions == {"onnxruntime": onnxruntime.__version__}
    assert record.verification.status == "passed"
    assert record.verification.agreement > 0.999
    with agln_fast.load(built.path, "second") as one, agln_fast.load(built.path, "onnxruntime") as other:
        assert np.array_equal(one(IMAGE).labels, other(IMAGE).labels)


def test_verify_and_eval(built, cli):
    code, out, _ = cli("verify", built.path, "--json")
    assert code == 0
    assert json.loads(out)["engines"]["second-fp32"]["status"] == "passed"
    code, _, err = cli("eval", built.path, "--backend", "second", "--precision", "bf16")
    assert code == 5
    assert "no second engine in bf16" in err


def test_tune(second, small_network, tmp_path, monkeypatch):
    monkeypatch.setenv("AGLN_FAST_CACHE", str(tmp_path))
    tuning = tune(small_network("fpn_resnet18"), "second", (64, 64), budget_s=1e-3, threads=1)
    assert (tuning.backend, tuning.chosen_by) == ("second", "timing")
    with pytest.raises(ConfigError, match=r"known: cpu, .*second"):
        tune(small_network("fpn_resnet18"), "third")


def test_bench(second):
    entries = [Entry("second", "fp32"), Entry("planned second", "fp32")]
    assert [contestants()[entry.contestant].ours for entry in entries] == [False, True]
    options = Options(threads=1, warmup=0, iters=1, frames=1, memory=False, accuracy=False)
    for row in measure([Case("fpn_nano", (64, 64), 1, 5)], entries, options).rows:
        assert row.agreement > 0.999
        assert row.settings == "as it comes, 1 thread"


def test_doctor(second, cli):
    rows = {row["what"]: row for row in json.loads(cli("doctor", "--json")[1])}
    assert rows["second"] == {"what": "second", "found": onnxruntime.__version__, "advice": ""}


def test_rebuild(built):
    assert read_recipe(built.path).options["precision"] == {"cpu": ("fp32",)}
    assert read_recipe(built.path).left_out == ()


def test_a_target_of_its_own(second, tmp_path, monkeypatch):
    monkeypatch.setattr(Second, "target", "npu")
    assert targets() == ["cpu", "cuda", "npu", "tensorrt", "tensorrt-rtx"]
    options = BuildOptions("x.pth", tmp_path / "x", targets="npu")
    assert [engine.name for engine in options.wanted] == ["second-fp32", "fused-fp32", "torch-fp32"]
    with pytest.raises(ConfigError, match="precision 'int8' is for target cpu, tensorrt, tensorrt-rtx, not for npu"):
        BuildOptions("x.pth", tmp_path / "x", targets="npu", precision="int8")


def test_where_nobody_knows_it_the_others_run(built, monkeypatch):
    monkeypatch.delitem(KINDS, "second")
    with agln_fast.load(built.path) as segment:
        assert segment.engine.name != "second-fp32"
    with pytest.raises(BackendError, match="second-fp32 cannot run here: this agln-fast has no backend 'second'"):
        open_engine(agln_fast.open_bundle(built.path).artefact("second-fp32"))


def test_the_schema_knows_every_kind_and_precision():
    engine = _schema()["properties"]["engines"]["items"]["properties"]
    assert engine["precision"]["enum"] == list(PRECISIONS)
    validator = Draft202012Validator(engine["backend"])
    assert all(map(validator.is_valid, KINDS))
    assert not any(map(validator.is_valid, ["", "Torch", "a b", "\x1b[31m", 3]))


@pytest.mark.parametrize("name", KINDS)
def test_its_extra_installs_its_package(name):
    kind = KINDS[name]
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert any(needed.startswith(f"{kind.package}>=") for needed in project["optional-dependencies"][kind.extra])


_WITHOUT = """
import sys
sys.modules["torch"] = None
from agln_fast.builder.options import BuildOptions
from agln_fast.engines import KINDS
print(KINDS["torch"].obstacle("fp32"), KINDS["fused"].obstacle("fp32"), sep="\\n")
print(*[engine.name for engine in BuildOptions("x.pth", sys.argv[1], precision="fp32").wanted])
"""


def test_kinds_are_known_without_pytorch(tmp_path):
    command = [sys.executable, "-c", _WITHOUT, str(tmp_path / "x")]
    *obstacles, wanted = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert obstacles == ['package "torch" is not installed: pip install "agln-fast[build]"'] * 2
    assert wanted == "openvino-fp32 onnxruntime-fp32 fused-fp32 torch-fp32"


def test_the_double_shows_the_picture(bundle, monkeypatch):
    """Through all that is real: classes are the colours, and what was asked of it is kept."""
    echo = Echo()
    monkeypatch.setitem(KINDS, "echo", echo)
    one = open_engine(_echoing(bundle))
    image = np.zeros((1, 64, 96, 3), np.uint8)
    for label, columns in enumerate((slice(0, 32), slice(32, 64), slice(64, 96))):
        image[:, :, columns, label] = 200
    assert np.array_equal(one.run(image), image.argmax(3))
    assert echo.opened[0].batches == [1]
    with pytest.raises(BackendError, match=r"image of shape \(2, "):
        one.run(image.repeat(2, 0))
    one.close()
    assert echo.opened[0].closed


def test_the_double_fails_as_it_is_told(bundle, monkeypatch):
    monkeypatch.setitem(KINDS, "echo", Echo(obstacle="this machine is too old"))
    with pytest.raises(BackendError, match="echo-fp32 cannot run here: this machine is too old"):
        open_engine(_echoing(bundle))
    monkeypatch.setitem(KINDS, "echo", Echo(error=BackendError("it caught fire")))
    with open_engine(_echoing(bundle)) as engine, pytest.raises(BackendError, match="it caught fire"):
        engine.run(np.zeros((1, 64, 96, 3), np.uint8))


def test_the_double_has_as_many_classes_as_the_network():
    frame = np.array([[[5, 6, 7]]], np.uint8)
    assert colours(frame, 2)[:, 0, 0].tolist() == [5, 6]
    assert colours(frame, 4)[:, 0, 0].tolist() == [5, 6, 7, -1]


def _echoing(bundle: Bundle) -> Artefact:
    return replace(bundle.artefact("torch-fp32"), name="echo-fp32", kind="echo")
