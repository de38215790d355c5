"""Every contestant gives the reference's labels, peers run the network as it is, and obstacles say what to do."""

from __future__ import annotations

import pickle
import shutil
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from agln_fast.bench.race import contestants as module
from agln_fast.bench.race import scaling
from agln_fast.bench.race.arguments import choose_device
from agln_fast.bench.race.cases import by_reason, choose_entries
from agln_fast.bench.race.contestants import contestant, contestants
from agln_fast.bench.race.measure import Entry
from agln_fast.bench.race.workshop import RaceWorkshop
from agln_fast.builder.build import build
from agln_fast.contract import IOContract
from agln_fast.deployment import DeployedNetwork
from agln_fast.engines import KINDS
from agln_fast.engines.openvino import OpenVino
from agln_fast.errors import BackendError, ConfigError
from agln_fast.plan.network import InferenceNetwork
from agln_fast.plan.plan import ALGEBRA, NO_PLAN, Plan
from agln_fast.runtime.references import make_reference, sample_frames

HERE = [
    (name, precision)
    for name, entry in contestants().items()
    for precision in entry.precisions
    if precision != "int8" and entry.obstacle(precision) is None
]
LOW = Plan(fold_batchnorm=True, low_resolution_labels=True)


@pytest.fixture(scope="module")
def network(small_network):
    return small_network()


@pytest.fixture(scope="module")
def workshop(network, tmp_path_factory):
    return RaceWorkshop(network, IOContract(64, 64), tmp_path_factory.mktemp("workshop"), threads=1)


@pytest.fixture(scope="module")
def references(network, workshop):
    return make_reference(network, workshop.contract, sample_frames(None, workshop.contract)[:2])


def _agreement(opened, references):
    return np.mean([opened.run(each.image) == each.labels for each in references])


@pytest.mark.parametrize(("name", "precision"), [case for case in HERE if not contestant(case[0]).compiles])
def test_labels_are_the_references_in_memory_and_from_the_pickle(name, precision, workshop, references):
    recipe, seconds = contestant(name).make(workshop, precision)
    assert seconds > 0
    assert all(file.stat().st_size > 0 for file in recipe.files)
    assert "1 thread" in recipe.settings
    least = 0.999 if precision == "fp32" else 0.9
    for each in (recipe, pickle.loads(pickle.dumps(recipe))):
        opened = each.open()
        assert _agreement(opened, references) >= least
        assert opened.run(references[0].image).dtype == np.uint8
        opened.close()
    assert (recipe.rewrites == NO_PLAN) == (not contestant(name).ours or name == "planned fused")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("torch.compile", "default"),
        ("torch.compile max-autotune", "max-autotune"),
        ("planned torch.compile", "default"),
    ],
)
def test_compiled_in_its_mode_with_frozen_weights(name, mode, workshop, references, monkeypatch):
    """The compiler itself takes a minute: it is stood in for by the network, and by what it is told."""
    told = []

    def compiled(network, **options):
        assert isinstance(network.network, InferenceNetwork) == name.startswith("planned")

        def run(image):
            told.append((options, torch._inductor.config.freezing, torch.is_inference_mode_enabled()))
            return network(image)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    recipe, _ = contestant(name).make(workshop, "fp32")
    assert "freezing" in recipe.settings
    assert (recipe.rewrites == NO_PLAN) == (name != "planned torch.compile")
    assert recipe.library == "torch._inductor.compile_fx"
    opened = recipe.open()
    assert _agreement(opened, references) >= 0.999
    opened.close()
    with pytest.raises(BackendError, match="closed"):
        opened.run(references[0].image)
    assert told[0] == ({"mode": mode, "dynamic": False}, True, True)
    assert not torch._inductor.config.freezing, "put back"


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="Dynamo of a CUDA build crashes without a GPU in the second thread: torch._C._ensureCUDADeviceGuardSet",
)
def test_one_network_after_the_other_is_compiled(workshop, references, monkeypatch):
    """Dynamo compiles a function eight times, and runs it eagerly from then on: as if it were compiled, it says."""
    compiled, graphs = torch.compile, []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda network, mode, dynamic: compiled(network, backend=count, dynamic=dynamic)
    )
    recipe, _ = contestant("torch.compile").make(workshop, "fp32")
    for number in range(1, 11):
        opened = recipe.open()
        assert _agreement(opened, references) >= 0.999
        opened.close()
        assert len(graphs) >= number


def _operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_peers_run_what_the_exporter_makes_of_the_reference_module(network, workshop, tmp_path):
    program = torch.onnx.export(
        DeployedNetwork(network, workshop.contract, 5).eval(),
        (torch.zeros(1, 64, 64, 3, dtype=torch.uint8),),
        dynamo=True,
        opset_version=22,
        verbose=False,
    )
    program.save(tmp_path / "plain.onnx")
    recipe, _ = contestant("openvino").make(workshop, "fp32")
    assert _operators(recipe.files[0]) == _operators(tmp_path / "plain.onnx")


def test_ours_run_what_build_makes(network, tmp_path):
    workshop = RaceWorkshop(network, IOContract(64, 64), tmp_path, threads=1, plan=ALGEBRA)
    recipe, _ = contestant("planned openvino").make(workshop, "fp32")
    bundle = build(network, tmp_path / "x", size=(64, 64), precision="fp32", plan=ALGEBRA, threads=1)
    assert recipe.rewrites == bundle.engine("openvino-fp32").plan == ALGEBRA
    assert _operators(recipe.files[0]) == _operators(bundle.path / bundle.engine("openvino-fp32").file)


@pytest.mark.openvino
def test_an_engine_of_low_resolution_is_timed_without_the_host(network, references, tmp_path):
    workshop = RaceWorkshop(network, IOContract(64, 64), tmp_path, threads=1, plan=LOW)
    recipe, _ = contestant("planned openvino").make(workshop, "fp32")
    opened = recipe.open()
    assert _agreement(opened, references) >= 0.999
    for _ in range(2):
        assert opened.engine(references[0].image).shape == (1, 5, 16, 16), "logits, a quarter of the side"
    opened.close()


def test_plans(network, tmp_path):
    chosen = {plan: RaceWorkshop(network, IOContract(64, 64), tmp_path, 1, plan=plan) for plan in ("none", LOW)}
    assert chosen["none"].chosen(KINDS["openvino"], "fp32")[0] == NO_PLAN
    assert chosen[LOW].chosen(KINDS["openvino"], "int8")[0] == LOW
    assert not chosen[LOW].chosen(KINDS["tensorrt"], "fp16")[0].low_resolution_labels
    auto = RaceWorkshop(network, IOContract(64, 64), tmp_path, 1)
    assert auto.chosen(KINDS["openvino"], "int8")[0] == auto.chosen(KINDS["openvino"], "bf16")[0] != NO_PLAN


def test_files_are_made_once(workshop):
    first, second = (contestant("openvino").make(workshop, precision) for precision in ("fp32", "bf16"))
    assert first[0].files == second[0].files == contestant("onnxruntime").make(workshop, "fp32")[0].files
    assert first[1] == second[1] > 0, "the seconds are those of the first time"


def test_int8_is_quantised(network, tmp_path, monkeypatch):
    monkeypatch.setattr("agln_fast.builder.pictures.CALIBRATION", 4)
    if contestant("planned openvino").obstacle("int8"):
        pytest.skip("needs NNCF, and a CPU with int8")
    recipe, _ = contestant("planned openvino").make(RaceWorkshop(network, IOContract(64, 64), tmp_path, 1), "int8")
    assert {file.suffix for file in recipe.files} == {".xml", ".bin"}
    assert recipe.library == "openvino"


@pytest.mark.parametrize(
    ("name", "precision", "device", "words"),
    [
        ("torch", "bf16", "cpu", "it runs in fp32"),
        ("openvino", "fp32", "cuda", "runs on cpu, not on cuda"),
        ("torch autocast", "fp16", "cpu", "on CPUs is bf16"),
    ],
)
def test_obstacles(name, precision, device, words):
    assert words in contestant(name).obstacle(precision, device)


def test_obstacles_of_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in contestant("torch").obstacle("fp32", "cuda:1")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C++ compiler" in contestant("torch.compile").obstacle("fp32")
    monkeypatch.setattr("agln_fast.engines.openvino.find_spec", lambda name: None)
    assert "agln-fast[int8]" in contestant("openvino").obstacle("int8")
    monkeypatch.setattr(OpenVino, "_obstacle", lambda self, precision, where: f"no {precision}")
    assert contestant("planned openvino").obstacle("bf16") == "no bf16"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "agln-fast[tensorrt]" in contestant("tensorrt").obstacle("fp16", "cuda")


def test_unknown_contestant():
    with pytest.raises(ConfigError, match="did you mean 'openvino'"):
        contestant("openvin")


def test_a_quick_run_leaves_out_what_is_slow_and_says_why():
    quick, waiting = choose_entries()
    full, _ = choose_entries(full=True)
    assert set(quick) < set(full)
    reasons = {entry.name: reason for entry, reason in waiting}
    assert "--full" in reasons["torch.compile fp32"] or "compiler" in reasons["torch.compile fp32"]
    assert "--full" in reasons["planned fused fp32"]
    known = {(entry.contestant, entry.precision) for entry in [*quick, *(entry for entry, _ in waiting)]}
    assert known == {(name, kind) for name, entry in contestants().items() for kind in entry.precisions}, (
        "nothing silently"
    )
    lines = by_reason(waiting)
    assert len(lines) == len(set(reasons.values())) < len(waiting)


def test_precisions_and_targets(monkeypatch):
    assert {entry.precision for entry in choose_entries(precision=["fp32", "bf16"])[0]} <= {"fp32", "bf16"}
    asked, _ = choose_entries(precision="int8")
    assert len(asked) == sum(contestant(name).obstacle("int8") is None for name in ("openvino", "planned openvino"))
    with pytest.raises(ConfigError, match="did you mean 'fp16'"):
        choose_entries(precision="fp1")
    monkeypatch.setattr(module.Contestant, "obstacle", lambda *_: None)
    named, waiting = choose_entries("cuda", targets=["cuda", "tensorrt"])
    assert {entry.contestant for entry in named} >= {"tensorrt", "planned tensorrt", "planned fused"}
    assert {reason for entry, reason in waiting if entry.contestant == "tensorrt-rtx"} == {
        "asked for with --target tensorrt-rtx"
    }


def test_device_of_the_targets():
    assert choose_device(["cpu"]) == "cpu"
    assert choose_device(["tensorrt", "cuda"]) == "cuda"
    assert choose_device(["cpu", "cuda"], "cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match="one after the other"):
        choose_device(["cpu", "cuda"])
    with pytest.raises(ConfigError, match="did you mean 'cuda'"):
        choose_device(["cud"])


def test_pytorch_flushes_denormals_in_all_its_threads(network, tmp_path):
    """Threads of OpenMP keep the mode of the thread that started them; ours keeps its own."""
    recipe, _ = contestant("torch").make(RaceWorkshop(network, IOContract(64, 64), tmp_path, threads=2), "fp32")
    threads = torch.get_num_threads()
    tiny = torch.full((4_000_000,), 1e-38)
    assert (tiny * 0.1).count_nonzero() == len(tiny), "threads are there, and keep denormals"
    opened = recipe.open()
    try:
        opened.run(np.zeros((1, 64, 64, 3), np.uint8))
        assert opened._thread.submit(lambda: (tiny * 0.1).count_nonzero()).result() == 0
        assert (tiny * 0.1).count_nonzero() == len(tiny)
    finally:
        opened.close()
        torch.set_num_threads(threads)


def test_a_compiled_network_is_scaled_with_the_plan_it_has(monkeypatch):
    monkeypatch.setattr(scaling, "best_plan", lambda base, backend, precision, options: (backend, precision))
    names = ["planned torch.compile", "planned openvino", "planned fused", "openvino"]
    plans = [scaling._with_plan(Entry(name, "fp32"), None, None).plan for name in names]
    assert plans == [("openvino", "fp32"), ("openvino", "fp32"), None, None]
