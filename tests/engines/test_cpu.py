"""The CPU backends: what they say they run is what runs, and they never fall back."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tracemalloc
from contextlib import suppress
from dataclasses import replace

import numpy as np
import onnx
import pytest

import agln_fast
from agln_fast.artefact import from_disk
from agln_fast.engines import KINDS, kind_of, network_kinds, open_engine
from agln_fast.engines.denormals import denormals_are_zero, denormals_as_zero
from agln_fast.engines.onnxruntime import OnnxRuntime
from agln_fast.engines.openvino import OpenVino
from agln_fast.errors import BackendError, BundleError, ConfigError
from agln_fast.export.onnx import export_onnx
from agln_fast.export.quantize import quantize_onnx
from agln_fast.runtime.segmenter import load_network

IMAGE = np.random.default_rng(0).integers(0, 256, (1, 64, 96, 3), np.uint8)


def _draft(bundle, engine, file, **changes):
    """An engine of the bundle in another file, of which nobody knows the hash."""
    return replace(bundle.artefact(engine), file=file, read=from_disk, **changes)


def test_every_kind_has_its_name():
    assert all(kind_of(name).name == name for name in KINDS)
    with pytest.raises(ConfigError, match="unknown backend 'onnx'; did you mean 'onnxruntime'"):
        kind_of("onnx")


@pytest.mark.parametrize(
    "name", ["torch-fp32", "onnxruntime-fp32", pytest.param("openvino-fp32", marks=pytest.mark.openvino)]
)
def test_results_belong_to_the_caller(name, bundle):
    """The second run must not write into what the first one returned."""
    with open_engine(bundle.artefact(name), threads=1) as backend:
        assert (backend.device, backend.precision) == ("cpu", "fp32")
        first = backend.run(IMAGE)
        kept = first.copy()
        backend.run(255 - IMAGE)
        assert np.array_equal(first, kept)
        assert first.flags.c_contiguous
    backend.close()


def test_onnxruntime_precision_is_read_from_the_file(bundle, small_network, tmp_path, monkeypatch):
    """An artefact that claims fp32 does not help an fp16 file past the check; Arm has kernels for it."""
    export_onnx(small_network(), tmp_path / "half.onnx", bundle.manifest.contract, "fp16")
    artefact = _draft(bundle, "onnxruntime-fp32", tmp_path / "half.onnx")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    with pytest.raises(BackendError, match="would compute in fp32"):
        open_engine(artefact)
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with open_engine(artefact) as backend:
        assert backend.precision == "fp16"


@pytest.mark.parametrize("threads", [0, 10**6])
def test_absurd_thread_counts_are_refused(threads, bundle):
    with pytest.raises(ConfigError, match=rf"threads {threads}: must be from 1 to"):
        open_engine(bundle.artefact("onnxruntime-fp32"), threads=threads)


def test_onnxruntime_refuses_what_it_cannot_open(bundle, tmp_path):
    (tmp_path / "model.onnx").write_bytes((bundle.path / "model.onnx").read_bytes()[:1000])
    with pytest.raises(BackendError, match=r"model\.onnx"):
        open_engine(_draft(bundle, "onnxruntime-fp32", tmp_path / "model.onnx"))


@pytest.mark.openvino
def test_openvino_never_runs_in_another_precision(bundle, monkeypatch):
    import openvino

    has = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    artefact = replace(bundle.artefact("openvino-fp32"), name="openvino-bf16", precision="bf16")
    if "BF16" in has:
        with open_engine(artefact) as backend:
            assert backend.precision == "bf16"
        return
    with pytest.raises(BackendError, match="this CPU has no bf16 arithmetic"):
        open_engine(artefact)
    # Asked past the check, OpenVINO would quietly take f32; reading the hint back notices.
    monkeypatch.setattr(OpenVino, "_obstacle", lambda *_: None)
    with pytest.raises(BackendError, match="openvino would run openvino-bf16 in f32"):
        open_engine(artefact)


@pytest.mark.openvino
def test_openvino_without_its_package_names_the_extra(bundle, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(BackendError, match=r'pip install "agln-fast\[openvino\]"'):
        open_engine(bundle.artefact("openvino-fp32"))


@pytest.mark.parametrize("threads", [1, 2])
def test_onnxruntime_gets_its_threads(threads, bundle):
    with open_engine(bundle.artefact("onnxruntime-fp32"), threads=threads) as backend:
        assert backend._session.get_session_options().intra_op_num_threads == threads


@pytest.mark.openvino
def test_onnxruntimes_threads_do_not_spin_after_a_run(bundle):
    """They would hold the cores that whoever comes next has need of."""
    with open_engine(bundle.artefact("onnxruntime-fp32")) as opened:
        options = opened._session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_openvino_gets_its_threads_and_its_precision(bundle, monkeypatch):
    import openvino

    seen = {}
    compile_model = openvino.Core.compile_model

    def spy(self, model, device, settings):
        seen.update(settings)
        return compile_model(self, model, device, settings)

    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    open_engine(bundle.artefact("openvino-fp32"), threads=1).close()
    assert (seen["INFERENCE_NUM_THREADS"], seen["INFERENCE_PRECISION_HINT"]) == (1, "f32")
    assert seen["CPU_DENORMALS_OPTIMIZATION"] is True


OTHER_CONTRACTS = {
    "height": {"height": 128},
    "batch": {"min_batch": 2, "max_batch": 2},
    "range": {"max_batch": 4},
    "output": {"output": "logits"},
    "layout": {"layout": "float_nchw"},
}


@pytest.mark.parametrize("case", OTHER_CONTRACTS)
@pytest.mark.parametrize("name", ["onnxruntime-fp32", pytest.param("openvino-fp32", marks=pytest.mark.openvino)])
def test_an_engine_is_what_the_manifest_says(name, case, bundle):
    """Otherwise every run would fail inside the library, or masks would be misread."""
    artefact = bundle.artefact(name)
    other = replace(artefact, contract=replace(artefact.contract, **OTHER_CONTRACTS[case]))
    with pytest.raises(BundleError, match=r"model\.onnx: (takes image|gives labels) .*, and the manifest says"):
        open_engine(other)


@pytest.mark.parametrize("name", ["torch-fp32", "fused-fp32"])
def test_weights_are_of_the_network_that_the_manifest_says(name, bundle):
    artefact = bundle.artefact(name)
    other = replace(artefact, model=replace(artefact.model, num_classes=6))
    with pytest.raises(BundleError, match=r"weights\.safetensors: holds the weights of another network"):
        open_engine(other)


@pytest.mark.parametrize("name", ["onnxruntime-fp32", pytest.param("openvino-fp32", marks=pytest.mark.openvino)])
def test_graphs_with_weights_elsewhere_are_refused(name, bundle, tmp_path):
    """Nobody has checked the hash of a file that only the graph refers to."""
    model = onnx.load(bundle.path / "model.onnx")
    onnx.save_model(
        model, tmp_path / "model.onnx", save_as_external_data=True, location="elsewhere.bin", size_threshold=0
    )
    assert (tmp_path / "elsewhere.bin").stat().st_size > 0
    with pytest.raises(BundleError, match="refused: some of its weights lie in another file"):
        open_engine(_draft(bundle, name, tmp_path / "model.onnx"))


@pytest.fixture(scope="module")
def int8(bundle, tmp_path_factory):
    """The bundle's graph quantised, in a folder with the graph as it is."""
    pytest.importorskip("nncf", reason="needs the package nncf")
    folder = tmp_path_factory.mktemp("int8")
    shutil.copy(bundle.path / "model.onnx", folder)
    quantize_onnx(folder / "model.onnx", folder / "model.int8.xml", [IMAGE, 255 - IMAGE])
    return _draft(bundle, "openvino-fp32", folder / "model.int8.xml", name="openvino-int8", precision="int8")


def _without(capability, monkeypatch):
    """OpenVINO's CPU loses a capability, as far as asking it tells."""
    backend = "agln_fast.engines.openvino._capabilities"
    has = {"FP32", "BF16", "INT8"} & set(_capabilities()) - {capability}
    monkeypatch.setattr(backend, lambda openvino: sorted(has))


def _capabilities():
    import openvino

    return openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.openvino
@pytest.mark.parametrize("capability", [None, "BF16"])
def test_openvino_runs_int8_and_the_rest_in_bf16_where_the_cpu_has_it(capability, int8, bundle, monkeypatch):
    import openvino

    seen = {}
    compile_model = openvino.Core.compile_model

    def spy(self, model, device, settings):
        seen.update(settings)
        return compile_model(self, model, device, settings)

    _without(capability, monkeypatch)
    monkeypatch.setattr(openvino.Core, "compile_model", spy)
    with open_engine(int8, threads=1) as backend:
        assert backend.precision == "int8"
        labels = backend.run(IMAGE)
    rest = "bf16" if capability is None and "BF16" in _capabilities() else "f32"
    assert seen["INFERENCE_PRECISION_HINT"] == rest
    with open_engine(bundle.artefact("openvino-fp32"), threads=1) as backend:
        assert 0.7 < (labels == backend.run(IMAGE)).mean() < 1


@pytest.mark.openvino
def test_openvino_int8_is_read_back(int8):
    """An artefact that claims int8 does not help a graph that is not quantised past the check."""
    with pytest.raises(
        BackendError, match=r"convolutions of .*model\.onnx in (bf16|f32), not in int8: the file is not"
    ):
        open_engine(replace(int8, file=int8.file.with_name("model.onnx")))


@pytest.mark.openvino
def test_openvino_int8_needs_a_cpu_that_has_it(int8, monkeypatch):
    _without("INT8", monkeypatch)
    with pytest.raises(BackendError, match=r"openvino-int8 cannot run here: this CPU has no int8 arithmetic .*FP32"):
        open_engine(int8)


@pytest.mark.parametrize("name", ["torch", "fused", "onnxruntime"])
def test_other_backends_have_no_int8(name, bundle, small_network):
    """Neither as an engine of a bundle nor, the first two, for a network in memory."""
    artefact = replace(bundle.artefact(f"{name}-fp32"), name=f"{name}-int8", precision="int8")
    with pytest.raises(BackendError, match=rf"{name}-int8 cannot run here: {name} has no int8"):
        open_engine(artefact)
    if name in network_kinds():
        with pytest.raises(ConfigError, match="known: fp32, fp16, bf16; int8 needs a bundle, and OpenVINO"):
            load_network(small_network(), backend=name, precision="int8")


def test_onnxruntime_takes_denormals_for_zeros(bundle):
    """Where attention is nearly one-hot its smallest weights are denormals, and products with them are slow."""
    with open_engine(bundle.artefact("onnxruntime-fp32"), threads=1) as backend:
        options = backend._session.get_session_options()
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"


_ENGINES = """
import sys
import torch
from agln_fast import open_bundle
from agln_fast.engines import open_engine
from agln_fast.engines.denormals import denormals_are_zero
import numpy as np

bundle = open_bundle(sys.argv[1])
torch.set_flush_denormal(sys.argv[3] == "True")
with open_engine(bundle.artefact(sys.argv[2]), threads=1) as backend:
    opened = denormals_are_zero()
    backend.run(np.zeros((1, 64, 96, 3), np.uint8))
    print(opened, denormals_are_zero())
"""


@pytest.mark.parametrize("before", [False, True], ids=["caller keeps them", "caller flushes them"])
@pytest.mark.parametrize("name", ["onnxruntime-fp32", "openvino-fp32", "torch-fp32", "fused-fp32"])
def test_engines_leave_the_arithmetic_of_the_caller_as_it_was(name, before, bundle):
    """In a process of its own: ONNX Runtime switches the mode of the thread that opens the first session."""
    if name.startswith("openvino"):
        pytest.importorskip("openvino")
    command = [sys.executable, "-c", _ENGINES, str(bundle.path), name, str(before)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [str(before)] * 2


def test_denormals_are_zero_for_a_while():
    assert not denormals_are_zero()
    with denormals_as_zero():
        assert denormals_are_zero()
        with suppress(RuntimeError), denormals_as_zero():
            raise RuntimeError
        assert denormals_are_zero()
    assert not denormals_are_zero()


@pytest.mark.filterwarnings("ignore:Specified provider:UserWarning")
def test_onnxruntime_never_falls_back_to_another_provider(bundle, monkeypatch):
    """The provider is listed but does not start: ONNX Runtime would go on with the CPU and say nothing."""
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    with pytest.raises(BackendError, match=r"onnxruntime c(annot open|ould not start)"):
        open_engine(bundle.artefact("onnxruntime-fp32"), device="cuda")


@pytest.mark.gpu
def test_torch_runs_on_the_gpu_as_on_the_cpu(bundle):
    with open_engine(bundle.artefact("torch-fp32"), device="cuda") as gpu:
        assert gpu.device == "cuda"
        on_gpu = gpu.run(IMAGE)
    with open_engine(bundle.artefact("torch-fp32")) as cpu:
        assert (on_gpu == cpu.run(IMAGE)).mean() > 0.999


def test_threads_come_from_the_environment(bundle, monkeypatch):
    seen = {}
    original = OnnxRuntime.open

    def spy(self, artefact, **asked):
        seen.update(asked)
        return original(self, artefact, **asked)

    monkeypatch.setattr(OnnxRuntime, "open", spy)
    monkeypatch.setenv("AGLN_FAST_THREADS", "1")
    agln_fast.load(bundle, "onnxruntime").close()
    assert seen["threads"] == 1
    agln_fast.load(bundle, "onnxruntime", threads=2).close()
    assert seen["threads"] == 2
    monkeypatch.setenv("AGLN_FAST_THREADS", "many")
    with pytest.raises(ConfigError, match="AGLN_FAST_THREADS='many': must be a positive whole number"):
        agln_fast.load(bundle, "onnxruntime")


def test_onnxruntime_does_not_keep_its_file(bundle):
    artefact = bundle.artefact("onnxruntime-fp32")
    open_engine(artefact).close()  # what is imported and remembered once
    tracemalloc.start()
    try:
        with open_engine(artefact):
            kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < artefact.file.stat().st_size / 2


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("no", name="onnxruntime"), 'is not installed: pip install "agln-fast\\[onnxruntime\\]"'),
        (ImportError("libonnxruntime.so: wrong ELF class"), "is installed but does not load: libonnxruntime.so: wrong"),
        (ModuleNotFoundError("No module named 'flatbuffers'", name="flatbuffers"), "does not load: No module named"),
    ],
    ids=["missing", "broken", "a part is missing"],
)
def test_onnxruntime_that_cannot_be_imported_is_an_obstacle(error, message, bundle, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr("agln_fast.engines.onnxruntime.import_quietly", fail)
    with pytest.raises(
        BackendError, match=f'engine onnxruntime-fp32 cannot run here: package "onnxruntime" .*{message}'
    ):
        open_engine(bundle.artefact("onnxruntime-fp32"))
