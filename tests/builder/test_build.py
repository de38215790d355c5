"""Building bundles: everything asked for is there and verified, or nothing is left behind."""

from __future__ import annotations

import errno
import io
import os
import platform
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

import agln_fast
from agln_fast.artefact import LAYERS_FILE
from agln_fast.builder import build as build_module
from agln_fast.builder import tune as tune_module
from agln_fast.builder import workshop as workshop_module
from agln_fast.builder.options import BuildOptions
from agln_fast.builder.rebuild import read_recipe
from agln_fast.contract import parse_size
from agln_fast.data.scenes import Scenes
from agln_fast.engines import KINDS
from agln_fast.engines.echo import Echo, colours
from agln_fast.engines.openvino import OpenVino
from agln_fast.engines.tensorrt import TensorRTRTX
from agln_fast.errors import (
    BackendError,
    BuildError,
    CheckpointError,
    ConfigError,
    ImageError,
    VerificationError,
)
from agln_fast.export.plugins import obstacle
from agln_fast.manifest import Verification
from agln_fast.plan.fuse import fused_plan
from agln_fast.runtime.references import make_reference, sample_images
from agln_fast.runtime.verify import verify_engine

# A plan that takes no time to choose or to export.
FOLDED = agln_fast.Plan(fold_batchnorm=True)
PLAIN = {"size": (64, 64), "precision": "fp32", "plan": FOLDED}
# The engines of PyTorch alone.
WITHOUT_EXPORT = {"precision": "fp32", "targets": "cuda"}


def test_a_cpu_build_has_three_verified_engines(bundle):
    assert {engine.name for engine in bundle.manifest.engines} >= {"torch-fp32", "onnxruntime-fp32", "openvino-fp32"}
    for engine in bundle.manifest.engines:
        check = engine.verification
        if engine.backend == "openvino" and check.reason:
            continue
        assert check.status == "passed"
        assert check.agreement >= 0.999
        assert check.images == 4
        assert check.latency_ms > 0
    assert set(bundle.manifest.files) == {"model.onnx", "weights.safetensors", "reference.npz", "report.md"}
    report = (bundle.path / "report.md").read_text()
    assert all(engine.name in report for engine in bundle.manifest.engines)


@pytest.mark.tensorrt_rtx
@pytest.mark.parametrize(
    ("name", "precisions"),
    [
        ("fpn_resnet18", ["fp32", "fp16"]),
        ("agln_resnet18", ["fp16"]),
        ("agln_lite_resnet18", ["fp16"]),
        ("agln_release_resnet18", ["fp16"]),
    ],
)
def test_tensorrt_rtx_engines_of_every_network(name, precisions, small_network, tmp_path):
    """For four compute capabilities, without a GPU; labelled as not verified on this machine."""
    built = agln_fast.build(
        small_network(name),
        tmp_path / name,
        size=(64, 64),
        precision=precisions,
        targets="tensorrt-rtx",
        plan=FOLDED,
        kernels="none",
    )
    engines = {engine.name: engine for engine in built.manifest.engines}
    assert set(engines) == {*(f"tensorrt-rtx-{precision}" for precision in precisions), "fused-fp32", "torch-fp32"}
    for precision in precisions:
        engine = engines[f"tensorrt-rtx-{precision}"]
        assert engine.precision == precision
        assert engine.compute_capabilities == ("sm80", "sm86", "sm89", "sm120")
        assert engine.versions["tensorrt-rtx"]
        if not torch.cuda.is_available():
            assert engine.verification.status == "not verified on this machine"
            assert "CUDA" in engine.verification.reason
        plan = (built.path / engine.file).read_bytes()
        assert plan[:4] == b"vtrt"  # TensorRT-RTX's own magic: no header of ours before it
    assert not list(built.path.glob("*.onnx"))


@pytest.mark.tensorrt_rtx
@pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
def test_engines_with_and_without_our_kernels(small_network, tmp_path):
    """Both are in the bundle, and the library of the layers beside them; `rebuild` makes the same ones."""
    network = small_network("fpn_resnet18")
    options = {"size": (64, 64), "targets": "tensorrt-rtx", "plan": FOLDED, "compute_capabilities": ["sm89"]}
    built = agln_fast.build(network, tmp_path / "x", **options)
    engines = {engine.name: engine for engine in built.manifest.engines}
    assert list(engines)[:2] == ["tensorrt-rtx-fp16", "tensorrt-rtx-fp16-kernels"]
    ours, plain = engines["tensorrt-rtx-fp16-kernels"], engines["tensorrt-rtx-fp16"]
    assert ours.files == ("model.fp16.kernels.rtx.engine", LAYERS_FILE)
    assert plain.files == ("model.fp16.rtx.engine",)
    assert (ours.plan.kernels, plain.plan.kernels) == (True, False)
    assert ours.plan == fused_plan(network.config)
    assert ours.plan_chosen_by == "fixed"
    assert {*ours.files, *plain.files} <= set(built.manifest.files)
    assert read_recipe(built.path).options["kernels"] == "both"
    artefact = built.artefact(ours.name)
    assert artefact.read(artefact.files[1])[:4] == b"\x7fELF"


def test_which_engines_have_our_kernels(tmp_path, monkeypatch, caplog):
    def wanted(kernels, targets="tensorrt-rtx"):
        options = BuildOptions("x.pth", tmp_path / "x", targets=targets, precision="fp16", kernels=kernels)
        return [engine.name for engine in options.wanted if engine.target == targets]

    monkeypatch.setattr(TensorRTRTX, "check_make", lambda *_: None)
    monkeypatch.setattr("agln_fast.export.plugins.obstacle", lambda: None)
    plain, ours = "tensorrt-rtx-fp16", "tensorrt-rtx-fp16-kernels"
    assert [wanted(each) for each in ("auto", "both", "only", "none")] == [
        [plain, ours],
        [plain, ours],
        [ours],
        [plain],
    ]
    monkeypatch.setattr("agln_fast.export.plugins.obstacle", lambda: "install g++")
    assert wanted("auto") == [plain]
    assert "engines without kernels of ours: install g++" in caplog.text
    for refused, message in (
        ("some", "unknown kernels 'some'"),
        ("only", "only target tensorrt and tensorrt-rtx take"),
    ):
        with pytest.raises(ConfigError, match=message):
            wanted(refused, "cpu" if refused == "only" else "tensorrt-rtx")


@pytest.mark.tensorrt_rtx
def test_tensorrt_rtx_with_a_batch_range_in_bf16(small_network, tmp_path):
    built = agln_fast.build(
        small_network(), tmp_path / "x", size=(64, 64), precision="bf16", targets=["tensorrt-rtx"], batch=(1, 4),
        compute_capabilities=["sm86"], plan=FOLDED, kernels="none",
    )  # fmt: skip
    engine = built.engine("tensorrt-rtx-bf16")
    assert (engine.precision, engine.compute_capabilities) == ("bf16", ("sm86",))
    assert (built.manifest.contract.min_batch, built.manifest.contract.max_batch) == (1, 4)


def test_half_precision_on_the_cpu_never_means_float32(small_network, tmp_path):
    """x86 CPUs have no fp16 convolution in ONNX Runtime: the engine is there, and said not to run here."""
    built = agln_fast.build(
        small_network("fpn_resnet18"), tmp_path / "half", size=(64, 64), precision="fp16", plan=FOLDED
    )
    engine = built.engine("onnxruntime-fp16")
    assert engine.file == "model.fp16.onnx"
    if platform.machine() in ("x86_64", "AMD64"):
        assert engine.verification.status == "not verified on this machine"
        assert "would compute in fp32" in engine.verification.reason
        with pytest.raises(BackendError, match="would compute in fp32"):
            agln_fast.load(built, "onnxruntime")


def test_a_network_in_memory_is_neither_changed_nor_trusted_to_be_fp32(small_network, tmp_path):
    network = small_network("fpn_resnet18").half().train()
    built = agln_fast.build(network, tmp_path / "x", size=(64, 64), precision="fp32", plan=FOLDED)
    assert network.training
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float16}
    assert built.engine("onnxruntime-fp32").verification.agreement > 0.999


def test_logits_and_batches_are_verified_too(small_network, tmp_path):
    options = {"size": "64x64", "output": "logits", "batch": 3, "precision": "fp32", "plan": FOLDED}
    built = agln_fast.build(small_network("fpn_resnet18"), tmp_path / "x", **options)
    check = built.engine("onnxruntime-fp32").verification
    assert check.images == 6  # four pictures, filled up to two batches of three
    assert 0 < check.max_logit_error < 1e-2


def test_precision_auto_is_fp32_and_bf16_where_the_cpu_has_it(tmp_path, monkeypatch):
    def wanted(targets):
        options = BuildOptions("x.pth", tmp_path / "x", targets=targets, kernels="auto")
        return [(engine.kind.name, engine.precision) for engine in options.wanted]

    monkeypatch.setattr(TensorRTRTX, "check_make", lambda *_: None)
    monkeypatch.setattr(OpenVino, "_obstacle", lambda *_: None)
    monkeypatch.setattr("agln_fast.export.plugins.obstacle", lambda: "no compiler")
    weights = [("fused", "fp32"), ("torch", "fp32")]
    assert wanted("tensorrt-rtx") == [("tensorrt-rtx", "fp16"), *weights]
    cpu = [("openvino", "fp32"), ("onnxruntime", "fp32")]
    assert wanted("cpu") == [*cpu, ("openvino", "bf16"), *weights]
    assert KINDS["openvino"].graph_type("bf16") == "fp32"
    monkeypatch.setattr(OpenVino, "_obstacle", lambda *_: "no")
    assert wanted("cpu") == [*cpu, *weights]


def test_samples_of_the_user_are_used(small_network, tmp_path):
    Image.fromarray(sample_images(1, 80, 100)[0]).save(tmp_path / "a.png")
    Image.fromarray(sample_images(1, 90, 70)[0]).save(tmp_path / "b.png")
    built = agln_fast.build(small_network(), tmp_path / "x", size=(64, 64), samples=tmp_path, **WITHOUT_EXPORT)
    assert built.engine("torch-fp32").verification.images == 2


def test_class_sets(small_network, tmp_path):
    names = ["road", "sky", "car", "tree", "person"]
    built = agln_fast.build(small_network(), tmp_path / "named", size=(64, 64), classes=names, **WITHOUT_EXPORT)
    assert list(built.manifest.classes) == names
    with agln_fast.load(built, "torch") as segment:
        assert set(segment(np.zeros((64, 64, 3), np.uint8)).names) <= set(names)


def test_classes_that_do_not_fit_are_refused_before_anything_is_drawn(small_network, tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "sample_frames", lambda *_: pytest.fail("drawn"))
    for classes, count in (("pascal_voc", 21), (["road", "sky"], 2)):
        with pytest.raises(ConfigError, match=f"{count} names for a network of 5 classes"):
            agln_fast.build(small_network(), tmp_path / "x", size=(64, 64), classes=classes, precision="int8")
    assert not list(tmp_path.iterdir())


WRONG = {
    "target": ({"targets": ["tensorrt-rx"]}, "unknown target 'tensorrt-rx'; did you mean 'tensorrt-rtx'"),
    "precision": ({"precision": "fp8"}, "unknown precision 'fp8'"),
    "no target": ({"targets": []}, "give at least one precision, and one target"),
    "size": ({"size": "512"}, "size '512': give height x width"),
    "small size": ({"size": (16, 64)}, "size 16x64: each side must be from 32"),
    "layout": ({"layout": "bgr"}, "layout 'bgr'"),
    "class set": ({"classes": "ade20"}, "did you mean 'ade20k'"),
    "samples": ({"samples": "no/such/*.png"}, "no/such"),
    "wide batch": ({"batch": (1, 2, 3)}, r"batch \(1, 2, 3\): give a number"),
    "text batch": ({"batch": "many"}, "batch 'many': give a number"),
    "one side": ({"size": 64}, "size 64: needs two whole numbers"),
    "negative workspace": ({"workspace_bytes": -5}, "workspace of -5 bytes"),
    "idle capabilities": ({"compute_capabilities": ["sm86"]}, "compute capabilities are for target tensorrt-rtx"),
    "idle timing cache": ({"timing_cache": "x"}, "only target tensorrt has one"),
    "agreement": ({"min_agreement": 2}, "min_agreement 2: must be from 0 to 1"),
    "folder": ({"path": "no/such/folder/x"}, "there is no folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_choices_leave_nothing(case, small_network, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, message = WRONG[case]
    with pytest.raises((ConfigError, ImageError), match=message):
        agln_fast.build(small_network(), **{"path": "x", "size": (64, 64), **options})
    assert not os.listdir()


def test_a_bad_checkpoint_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError):
        agln_fast.build(tmp_path / "missing.pth", tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def swapped(monkeypatch):
    """A conversion bug: the classes of every ONNX file come out in another order."""
    real = workshop_module.export_onnx

    def export(network, *args, **kwargs):
        classifier = network.classifier[4]
        order = torch.tensor([1, 0, 2, 3, 4])
        with torch.no_grad():
            classifier.weight.copy_(classifier.weight[order])
            classifier.bias.copy_(classifier.bias[order])
        real(network, *args, **kwargs)
        with torch.no_grad():
            classifier.weight.copy_(classifier.weight[order])
            classifier.bias.copy_(classifier.bias[order])

    monkeypatch.setattr(workshop_module, "export_onnx", export)


def test_engines_that_all_disagree_are_no_bundle(swapped, small_network, tmp_path):
    with pytest.raises(VerificationError, match=r"agrees with the fp32 reference on \d+\.\d+% .* below the minimum"):
        agln_fast.build(small_network("fpn_resnet18"), tmp_path / "x", **PLAIN)
    assert not list(tmp_path.iterdir())
    built = agln_fast.build(small_network("fpn_resnet18"), tmp_path / "x", min_agreement=0.0, **PLAIN)
    assert built.engine("onnxruntime-fp32").verification.agreement < 0.999
    assert not built.manifest.left_out


@pytest.fixture
def one_disagrees(monkeypatch):
    """OpenVINO's engines give the next class."""
    from agln_fast.engines.openvino import OpenVinoEngine

    real = OpenVinoEngine.run
    monkeypatch.setattr(OpenVinoEngine, "run", lambda self, image: (real(self, image) + 1) % 5)


@pytest.mark.openvino
def test_one_engine_that_disagrees_is_left_out(one_disagrees, small_network, tmp_path):
    network = small_network("fpn_resnet18")
    built = agln_fast.build(network, tmp_path / "x", **PLAIN)
    assert [engine.name for engine in built.manifest.engines] == ["onnxruntime-fp32", "fused-fp32", "torch-fp32"]
    assert list(built.manifest.left_out) == ["openvino-fp32"]
    assert "below the minimum" in built.manifest.left_out["openvino-fp32"]
    assert {"model.onnx", "weights.safetensors"} < set(built.manifest.files)  # ONNX Runtime's, too
    with pytest.raises(VerificationError, match="openvino-fp32"):
        agln_fast.build(network, tmp_path / "y", strict=True, **PLAIN)
    assert not (tmp_path / "y.agln").exists()


@pytest.mark.openvino
def test_files_that_only_a_left_out_engine_has_are_not_delivered(one_disagrees, small_network, tmp_path):
    built = agln_fast.build(
        small_network("fpn_resnet18"),
        tmp_path / "x",
        size=(64, 64),
        precision=("fp32", "int8"),
        targets=("cpu",),
        plan=FOLDED,
    )
    assert set(built.manifest.left_out) == {"openvino-fp32", "openvino-int8"}
    assert set(built.manifest.files) == {"model.onnx", "weights.safetensors", "reference.npz", "report.md"}


def test_each_step_is_announced_with_its_number_and_time(small_network, tmp_path, capsys):
    console = Console(file=io.StringIO(), width=200)
    with Progress(console=console, disable=True) as progress:
        agln_fast.build(
            small_network("fpn_resnet18"), tmp_path / "x", size=(64, 64), precision="fp32", progress=progress
        )
    lines = console.file.getvalue().splitlines()
    numbers = [re.match(r"\[(\d+)/(\d+)\] ", line).groups() for line in lines]
    assert [int(number) for number, _ in numbers] == list(range(1, len(lines) + 1))
    assert {int(total) for _, total in numbers} == {len(lines)}
    for engine in ("openvino-fp32", "onnxruntime-fp32"):
        assert any(re.search(rf"choose the plan of {engine}, about \d+ s$", line) for line in lines)
        assert any(re.search(rf"compare {engine} with the reference, about \d+ s$", line) for line in lines)
    assert capsys.readouterr().out == ""


def test_an_existing_bundle_is_replaced_only_on_demand(small_network, tmp_path):
    first = agln_fast.build(small_network(), tmp_path / "x", size=(64, 64), **WITHOUT_EXPORT)
    with pytest.raises(ConfigError, match="exists already; choose another name, or replace it with --force"):
        agln_fast.build(small_network(), tmp_path / "x", size=(64, 64))
    second = agln_fast.build(small_network(), tmp_path / "x", size=(64, 96), overwrite=True, **WITHOUT_EXPORT)
    assert second.path == first.path
    assert second.manifest.contract.width == 96
    assert os.listdir(tmp_path) == ["x.agln"]
    (tmp_path / "mine.agln").mkdir()
    with pytest.raises(ConfigError, match="is no bundle, so it is not replaced"):
        agln_fast.build(small_network(), tmp_path / "mine", size=(64, 64), overwrite=True)


def test_a_failed_rebuild_keeps_the_old_bundle(small_network, tmp_path, monkeypatch):
    agln_fast.build(small_network(), tmp_path / "x", size=(64, 64), **WITHOUT_EXPORT)

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build_module, "write_report", full)
    with pytest.raises(BuildError, match=r"No space left on device.*; free some space"):
        agln_fast.build(small_network(), tmp_path / "x", size=(64, 64), overwrite=True, **WITHOUT_EXPORT)
    assert os.listdir(tmp_path) == ["x.agln"]
    assert agln_fast.open_bundle(tmp_path / "x.agln")


def test_a_network_in_memory_has_one_set_of_weights(small_network, tmp_path):
    with pytest.raises(ConfigError, match="weights 'ema': only a file holds several"):
        BuildOptions(small_network(), tmp_path / "x", weights="ema")
    BuildOptions("x.pth", tmp_path / "x", weights="ema")


def test_sizes():
    assert parse_size("480x640") == parse_size("480X640") == parse_size((480, 640)) == (480, 640)
    for wrong in ("480", "axb", "480x640x3", "-1x5"):
        with pytest.raises(ConfigError):
            parse_size(wrong)


def test_agreement_is_counted_and_weighted_by_hand(bundle):
    """Break the labels of known pixels: the record must show their share, and their share of the margin."""
    network = agln_fast.load_checkpoint(bundle.path / "weights.safetensors")
    (reference,) = make_reference(network, bundle.manifest.contract, sample_images(1, 64, 96))
    margin = reference.margin.copy()
    broken = reference.labels.copy()
    broken[0, :6] = (broken[0, :6] + 1) % 5
    check = verify_engine(bundle.artefact("torch-fp32"), [replace(reference, labels=broken)], minimum=0.0)
    assert check.agreement == pytest.approx(1 - 6 / 64)
    assert check.weighted_agreement == pytest.approx(1 - margin[0, :6].sum() / margin.sum(), rel=1e-4)
    with pytest.raises(VerificationError, match=r"90\.6250%"):
        verify_engine(bundle.artefact("torch-fp32"), [replace(reference, labels=broken)])
    assert isinstance(check, Verification)


@pytest.mark.parametrize("size", [(40, 50), (40, 600)], ids=["drawn", "enlarged"])
def test_generated_samples_are_scenes(size):
    """The first of the test split, drawn at up to 512 pixels a side."""
    drawn = tuple(min(side, 512) for side in size)
    for index, found in enumerate(sample_images(2, *size)):
        scene = Image.fromarray(Scenes("test", size=drawn)[index].image)
        expected = np.asarray(scene.resize(size[::-1], Image.Resampling.BILINEAR))
        assert np.abs(found.astype(int) - expected).max() <= 1
        assert expected.std() > 20


def test_latency_is_measured(bundle, monkeypatch):
    """By a clock that only moves in the engine."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def slow(frame):
        now[0] += 0.3
        return colours(frame, 5)

    monkeypatch.setitem(KINDS, "echo", Echo(slow))
    artefact = replace(bundle.artefact("torch-fp32"), kind="echo")
    network = agln_fast.load_checkpoint(bundle.path / "weights.safetensors")
    references = make_reference(network, bundle.manifest.contract, sample_images(1, 64, 96))
    assert verify_engine(artefact, references, minimum=0.0).latency_ms == pytest.approx(300)


def test_a_bundle_follows_the_umask(small_network, tmp_path):
    before = os.umask(0o027)
    try:
        built = agln_fast.build(small_network("fpn_resnet18"), tmp_path / "x", **PLAIN)
    finally:
        os.umask(before)
    assert built.path.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in built.path.iterdir()} == {0o640}


def test_what_cannot_be_the_name_of_a_bundle_is_told(small_network):
    for path in ("", ".", "/"):
        with pytest.raises(ConfigError, match="is no name for a bundle; give one such as"):
            agln_fast.build(small_network(), path, size=(64, 64))


@pytest.mark.tensorrt_rtx
def test_every_compute_capability_reaches_the_library(small_network, tmp_path, monkeypatch):
    import tensorrt_rtx

    seen = {}
    real = tensorrt_rtx.IBuilderConfig.set_compute_capability

    def spy(self, capability, index):
        seen[index] = capability.name
        return real(self, capability, index)

    monkeypatch.setattr(tensorrt_rtx.IBuilderConfig, "set_compute_capability", spy)
    agln_fast.build(
        small_network("fpn_resnet18"),
        tmp_path / "x",
        size=(64, 64),
        targets="tensorrt-rtx",
        plan=FOLDED,
        kernels="none",
    )
    assert seen == {0: "SM80", 1: "SM86", 2: "SM89", 3: "SM120"}


@pytest.mark.slow
def test_the_default_build_exports_three_graphs_and_races_for_seconds(tmp_path, monkeypatch):
    """What a build costs that nobody has waited for yet: 17 s on two quiet cores."""
    monkeypatch.setenv("AGLN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AGLN_FAST_TUNE_SECONDS")
    exports, races = [], []
    export, fastest = workshop_module.export_onnx, tune_module._Race.fastest

    def timed(race, plans):
        began = time.perf_counter()
        best = fastest(race, plans)
        races.append(time.perf_counter() - began)
        return best

    monkeypatch.setattr(workshop_module, "export_onnx", lambda *given: exports.append(given[-1]) or export(*given))
    monkeypatch.setattr(tune_module._Race, "fastest", timed)
    built = agln_fast.build("agln_nano", tmp_path / "x", size=(128, 128))
    planned = [engine for engine in built.manifest.engines if engine.plan_chosen_by == "timing"]
    assert 2 <= len(exports) == len(set(exports)) <= 3
    assert len(races) == len(planned) >= 2
    assert max(races) < tune_module.SHORT_S
    exports.clear()
    races.clear()
    again = agln_fast.build("agln_nano", tmp_path / "y", size=(128, 128))
    assert not races  # remembered
    assert len(exports) == len({engine.plan for engine in planned})
    assert [engine.plan for engine in again.manifest.engines] == [engine.plan for engine in built.manifest.engines]
