"""The fused backend: the reference's labels, a bounded set of programs, static buffers that are never stale."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import agln_fast
from agln_fast.bench.kernels.calls import CALLS, Case
from agln_fast.contract import IOContract
from agln_fast.engines import fused, fused_network
from agln_fast.engines.fused import Fused
from agln_fast.engines.fused_network import FusedEngine
from agln_fast.engines.torch_network import NetworkEngine, exact_float32
from agln_fast.errors import BackendError, ConfigError
from agln_fast.kernels.registration import OPS
from agln_fast.models.blocks import resize
from agln_fast.plan import fuse
from agln_fast.plan.convolution import FusedConv2d, choose_convolutions
from agln_fast.runtime.networks import load_network
from agln_fast.runtime.segmenter import runnable_engines

LABELS = IOContract(64, 96, max_batch=4)
LOGITS = IOContract(64, 96, max_batch=4, output="logits")
AGLN = ["agln", "agln_lite", "agln_straight", "agln_straight_lite", "agln_minus", "agln_minus_gap", "agln_minus_sg"]


def images(batch=1, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (batch, 64, 96, 3), np.uint8)


@pytest.mark.parametrize(
    "name", ["fpn_resnet18", "fcn8s_resnet18", "fcn_concat_resnet18c", "agln_resnet18", "agln_lite_resnet18"]
)
def test_labels_are_those_of_the_reference(name, small_network):
    network = small_network(name)
    with FusedEngine(network, LABELS, device="cpu") as ours, NetworkEngine(network, LABELS) as reference:
        labels, expected = ours.run(images(2)), reference.run(images(2))
    assert (labels.dtype, labels.shape) == (expected.dtype, expected.shape)
    assert (labels == expected).mean() > 0.9999
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize(("precision", "error"), [("fp32", 1e-4), ("fp16", 0.05), ("bf16", 0.5)])
def test_logits_in_every_precision(precision, error, small_network):
    """Errors are relative to the spread of the logits, which `small_network` sets to 1."""
    network = small_network()
    with (
        FusedEngine(network, LOGITS, precision=precision, device="cpu") as ours,
        NetworkEngine(network, LOGITS) as reference,
    ):
        logits, expected = ours.run(images()), reference.run(images())
        assert ours.precision == precision
    assert logits.dtype == np.float32
    assert logits.flags.c_contiguous
    assert np.sqrt(np.square(logits - expected).mean()) < error


def test_more_than_256_classes(small_network):
    network = small_network(num_classes=300)
    with FusedEngine(network, LABELS, device="cpu") as ours, NetworkEngine(network, LABELS) as reference:
        labels, expected = ours.run(images()), reference.run(images())
    assert labels.dtype == expected.dtype == np.int32
    assert (labels == expected).mean() > 0.9999


def test_a_bundle_lists_and_runs_it(bundle):
    assert bundle.engine("fused-fp32").verification.agreement > 0.9999
    photo = images()[0]
    with agln_fast.load(bundle, "fused", device="cpu") as segment, agln_fast.load(bundle, "torch") as reference:
        assert (segment.engine.name, segment.device, segment.precision) == ("fused-fp32", "cpu", "fp32")
        assert (segment(photo).labels == reference(photo).labels).mean() > 0.9999


def test_target_cuda_builds_half_precision(small_checkpoint, tmp_path):
    built = agln_fast.build(small_checkpoint, tmp_path / "gpu", size=(64, 96), targets="cuda")
    assert [engine.name for engine in built.manifest.engines] == ["fused-fp16", "fused-fp32", "torch-fp32"]
    assert built.engine("fused-fp16").target == "cuda"
    assert built.engine("fused-fp16").verification.weighted_agreement > 0.99
    assert {path.name for path in built.path.iterdir()} >= {"weights.safetensors", "manifest.json"}
    assert not list(built.path.glob("*.onnx"))


def test_a_network_in_memory(small_network):
    with load_network(small_network(), size=(64, 96), resize="stretch", backend="fused", device="cpu") as segment:
        assert segment.engine.name == "fused-fp32"
        assert segment(images()[0]).labels.shape == (64, 96)
    with pytest.raises(ConfigError, match="backend 'openvino': a network in memory runs on fused or torch"):
        load_network(small_network(), backend="openvino")


def test_the_reference_is_left_alone(small_network):
    network = small_network().train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with FusedEngine(network, LABELS, precision="fp16", device="cpu") as ours:
        ours.run(images())
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_programs_used_least_recently_go_first(small_network, monkeypatch):
    monkeypatch.setattr(fused_network, "_PROGRAMS", 2)
    with FusedEngine(small_network(), LABELS, device="cpu") as backend:
        for batch in (1, 2, 1, 3):
            assert len(backend.run(images(batch))) == batch
        assert [shape[0] for shape, *_ in backend._programs] == [1, 3]


@pytest.mark.parametrize("shape", [(1, 64, 64, 3), (1, 96, 64, 3), (64, 96, 3)])
def test_an_image_of_another_size_is_refused(shape, small_network):
    with (
        FusedEngine(small_network(), LABELS, device="cpu") as backend,
        pytest.raises(BackendError, match=r"the engine takes \('batch', 64, 96, 3\)"),
    ):
        backend.run(np.zeros(shape, np.uint8))


def test_an_image_of_another_dtype_is_refused(small_network):
    """Values from 0 to 1 would become 0 in a program for bytes."""
    with FusedEngine(small_network(), LABELS, device="cpu") as backend:
        backend.run(images())
        with pytest.raises(BackendError, match=r"image of torch\.float32 .*the engine takes .* of torch\.uint8"):
            backend.run(images().astype(np.float32) / 255)


def test_an_impossible_device_is_named(small_network):
    with pytest.raises(BackendError, match="fused cannot use device 'warp'"):
        FusedEngine(small_network(), LABELS, device="warp")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_threads_share_a_backend_or_have_their_own(device, small_network):
    network = small_network()
    inputs = [images(1 + seed % 3, seed) for seed in range(12)]
    with FusedEngine(network, LABELS, device=device) as backend:
        expected = [backend.run(image) for image in inputs]
        with ThreadPoolExecutor(4) as pool:
            shared = list(pool.map(backend.run, inputs))

    def alone(image):
        with FusedEngine(network, LABELS, device=device) as own:
            return own.run(image)

    with ThreadPoolExecutor(4) as pool:
        separate = list(pool.map(alone, inputs))
    for first, second, third in zip(expected, shared, separate, strict=True):
        assert np.array_equal(first, second)
        assert (first == third).mean() >= 0.999  # another instance may have chosen other algorithms


class Recording(TorchDispatchMode):
    """A capture on the CPU: every operation, with the tensors that it read and wrote."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, result))
        return result


class RecordedGraph:
    """Replays a recording into the same memory, as a CUDA graph does: nothing of Python runs again."""

    def replay(self):
        for func, args, kwargs, result in self.steps:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded_graphs(monkeypatch):
    """CUDA graphs are recorded on the CPU; gives the list of those that were captured."""
    captured = []

    @contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        assert capture_error_mode == "thread_local"
        with Recording() as recording:
            yield
        graph.steps = recording.steps
        captured.append(graph)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(fused_network, "_pinned", torch.empty_like)
    return captured


@pytest.mark.parametrize("contract", [LABELS, LOGITS], ids=["labels", "logits"])
def test_replays_see_the_new_image(contract, recorded_graphs, small_network, monkeypatch):
    """Three images through one graph: each result is that image's, and stays so when the next one runs."""
    network = small_network()
    with FusedEngine(network, contract, device="cpu") as backend:
        expected = [backend.run(images(2, seed)) for seed in range(3)]
        backend._programs.clear()
        prepare = fused_network._Graph
        monkeypatch.setattr(backend, "_prepare", lambda image, in_place: prepare(backend._network, image, None))
        results = [backend.run(images(2, seed)) for seed in range(3)]
    assert len(recorded_graphs) == 1
    for result, wanted in zip(results, expected, strict=True):
        assert np.array_equal(result, wanted)
    assert not np.array_equal(expected[0], expected[1])


def test_results_that_stay_on_the_device_are_their_callers(recorded_graphs, small_network, monkeypatch):
    """No copy to the host is captured, and the next replay writes over none of them."""
    with FusedEngine(small_network(), LOGITS, device="cpu") as backend:
        expected = [backend.run(images(2, seed)) for seed in range(3)]
        graph = fused_network._Graph(backend._network, torch.from_numpy(images(2)), None, in_place=True)
        results = [graph(torch.from_numpy(images(2, seed))) for seed in range(3)]
        fused_network._Graph(backend._network, torch.from_numpy(images(2)), None)
    for result, wanted in zip(results, expected, strict=True):
        assert np.array_equal(result.numpy(), wanted)
    in_place, to_host = (
        [str(func) for func, *_ in graph.steps].count("aten.copy_.default") for graph in recorded_graphs
    )
    assert (in_place, to_host) == (1, 2)


def test_in_place_is_a_program_of_its_own(small_network, monkeypatch):
    """As on a GPU: what is asked for decides where the result lies, for the same image."""
    with FusedEngine(small_network(), LOGITS, device="cpu") as backend:
        made = []

        def prepare(image, in_place):
            made.append(in_place)
            return lambda image: torch.zeros(1)

        monkeypatch.setattr(backend, "_prepare", prepare)
        backend._device = torch.device("meta")  # is no CPU
        assert isinstance(backend.run_in_place(images()), torch.Tensor)
        assert isinstance(backend.run(images()), np.ndarray)
        backend.run_in_place(images())
    assert made == [True, False]


def test_labels_never_pass_through_full_size_logits(recorded_graphs, small_network, monkeypatch):
    """Neither in a run, nor where a graph is captured and convolutions are chosen."""
    sizes = []
    monkeypatch.setattr(
        "agln_fast.plan.network.resize", lambda x, size: sizes.append(tuple(size[-2:])) or resize(x, size)
    )
    chosen = partial(choose_convolutions, race=lambda calls: range(len(calls)))
    monkeypatch.setattr(fused_network, "choose_convolutions", chosen)
    with FusedEngine(small_network(), LABELS, device="cpu") as backend:
        fused_network._Graph(backend._network, torch.from_numpy(images()), None)
    assert len(recorded_graphs) == 1
    assert sizes
    assert (64, 96) not in sizes


def test_choices_of_convolutions_are_remembered(recorded_graphs, small_network, monkeypatch, tmp_path):
    """By GPU and driver: the next process captures without a race, another GPU's choices and damaged ones are none."""
    races = []

    def race(calls):
        races.append(calls)
        return [3.0, *range(1, len(calls))]

    gpu = {"gpu": "H100", "driver": 13000}
    monkeypatch.setenv("AGLN_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(fused_network, "choose_convolutions", partial(choose_convolutions, race=race))
    monkeypatch.setattr(fused_network, "_facts", lambda device: gpu)

    def start():
        races.clear()
        with FusedEngine(small_network("fpn_resnet18"), LABELS, device="cpu") as backend:
            fused_network._Graph(backend._network, torch.from_numpy(images()), None)
            return len(races), {m.way for m in backend._network.modules() if isinstance(m, FusedConv2d) and m.relu}

    first, ways = start()
    assert first > 5
    assert ways == {"in_two_kernels"}
    assert start() == (0, ways)
    (file,) = (tmp_path / "convolutions").iterdir()
    gpu["driver"] = 13010
    assert start()[0] == first
    gpu["driver"] = 13000
    for damaged in ('{"a": 1', "[1, 2]", '{"job": ["in_steps"]}', '{"job": 3}'):
        file.write_text(damaged)
        assert start()[0] == first
    assert start()[0] == 0


# In the names of what cuBLAS computes on CUDA: mm, addmm, baddbmm, mv, dot, addr, matmul, linear, ...
PRODUCT = r"mm|mv|dot|addr|matmul|(?<!bi)linear|attention"
CAPTURED = [
    *({"name": f"{name}_resnet18", "formulation": form} for name in AGLN for form in ("paper", "release")),
    {"name": "agln_release_resnet18", "channel_resampling": False},
    {"name": "agln_release_resnet18", "spatial_gating": False},
    {"name": "fpn_resnet18"},
    {"name": "fcn8s_resnet18"},
    {"name": "fcn_concat_resnet18c"},
]


@pytest.mark.parametrize(
    ("contract", "fewest"), [(LABELS, 16), (LOGITS, 17)], ids=["labels-conv5-mixed", "logits-conv5-direct"]
)
@pytest.mark.parametrize(
    "options",
    CAPTURED,
    ids=lambda options: "-".join(value if isinstance(value, str) else f"no-{key}" for key, value in options.items()),
)
def test_nothing_of_cublas_is_captured(options, contract, fewest, recorded_graphs, small_network, monkeypatch):
    """Of the fused ops the recording sees the call alone: their products are those of kernels."""
    monkeypatch.setattr(fuse, "_FEWEST_CHANNELS", fewest)
    with FusedEngine(small_network(**options), contract, device="cpu") as backend:
        fused_network._Graph(backend._network, torch.from_numpy(images()), None)
    (graph,) = recorded_graphs
    assert not products(graph.steps)
    assert any(func == torch.ops.aten.convolution.default for func, *_ in graph.steps)


def products(steps):
    return [str(func) for func, *_ in steps if func.namespace == "aten" and re.search(PRODUCT, func._schema.name)]


@pytest.mark.interpreter
@pytest.mark.parametrize("op", OPS)
def test_no_launcher_uses_cublas(op):
    call, case = CALLS[op], Case(1, 8, torch.float32, channels=4, descriptors=2, classes=2)
    arguments, keywords = call.arguments(case), call.keywords(case)
    with Recording() as recording:
        OPS[op].launch(arguments, keywords, ("sm90", 4))
    assert not products(recording.steps)
    assert recording.steps  # it allocates its results


def test_the_last_thread_puts_the_settings_back():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with exact_float32():
            with exact_float32(benchmark=True):
                assert torch.backends.cudnn.benchmark
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.benchmark
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_cudnn_times_algorithms_as_long_as_anyone_asks_for_it():
    first, second = exact_float32(benchmark=True), exact_float32(benchmark=True)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.backends.cudnn.benchmark
    with exact_float32():
        assert torch.backends.cudnn.benchmark
        second.__exit__(None, None, None)
        assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark


SETTINGS = """
import torch
from agln_fast.engines.torch_network import exact_float32

def settings():
    b = torch.backends
    for get in (
        lambda: b.fp32_precision, lambda: b.cuda.matmul.fp32_precision, lambda: b.cudnn.conv.fp32_precision,
        lambda: b.mkldnn.matmul.fp32_precision, lambda: b.mkldnn.conv.fp32_precision,
        torch.get_float32_matmul_precision, lambda: b.cudnn.allow_tf32, lambda: b.cuda.matmul.allow_tf32,
    ):
        try:
            yield get()
        except RuntimeError:
            yield "refused"

{}
before = list(settings())
with exact_float32():
    inside = list(settings())
assert inside[1] == inside[3] == inside[4] == "ieee" and inside[2] in ("ieee", "none"), inside
assert list(settings()) == before, (before, list(settings()))
"""


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param("pass", id="none"),
        pytest.param("torch.set_float32_matmul_precision('medium')", id="older"),
        pytest.param("torch.backends.cuda.matmul.fp32_precision = 'tf32'", id="newer"),
        pytest.param("torch.backends.fp32_precision = 'tf32'", id="newer-for-all"),
        pytest.param("torch.backends.cudnn.conv.fp32_precision = 'ieee'", id="newer-convolutions"),
        pytest.param("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", id="newer-on-cpus"),
        pytest.param("torch.backends.mkldnn.conv.fp32_precision = 'bf16'", id="newer-convolutions-on-cpus"),
    ],
)
def test_older_and_newer_settings_are_put_back(changes):
    """In a process of its own: PyTorch does not forget which ones were used."""
    command = [sys.executable, "-W", "ignore", "-c", SETTINGS.format(changes)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


def test_settings_of_the_process_neither_count_nor_change(small_network):
    network = small_network()
    with FusedEngine(network, LOGITS, device="cpu") as backend:
        expected = backend.run(images())
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            assert np.array_equal(backend.run(images()), expected)
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(backend.run, [images()] * 4))
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(before)


def test_after_closing_it_says_so(small_network):
    backend = FusedEngine(small_network(), LABELS, device="cpu")
    backend.close()
    with pytest.raises(BackendError, match="fused: this backend is closed"):
        backend.run(images())


def test_errors_of_the_library_are_ours(small_network, monkeypatch):
    with NetworkEngine(small_network(), LABELS, device="cpu") as backend:
        monkeypatch.setattr(backend, "_network", lambda image: (_ for _ in ()).throw(RuntimeError("out of memory\nat")))
        with pytest.raises(
            BackendError, match=r"torch failed on cpu with an image of \(1, 64, 96, 3\): out of memory$"
        ):
            backend.run(images())


@pytest.mark.parametrize(
    ("triton", "capability", "message"),
    [(False, (9, 0), "need Triton, which is not installed: pip install triton"), (True, (7, 5), "this one is sm75")],
    ids=["no-triton", "old-gpu"],
)
def test_a_gpu_that_cannot_run_the_kernels_is_refused(triton, capability, message, small_network, monkeypatch):
    monkeypatch.setattr(fused, "find_spec", lambda name: triton or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("agln_fast.engines.torch.check_driver", lambda device: None)
    assert Fused().default_device() == "cpu"
    assert re.search(message, Fused().obstacle("fp32", "cuda:1"))
    with pytest.raises(BackendError, match=message):
        FusedEngine(small_network(), LABELS, device="cuda")


def test_auto_goes_by_the_device_that_is_asked_for(bundle, monkeypatch):
    """With a GPU, the fused engine comes first; asked for the CPU, the engine that was fastest there."""
    monkeypatch.setattr(Fused, "default_device", lambda self: "cuda")
    slow, quick = (
        replace(engine, verification=replace(engine.verification, latency_ms=latency))
        for engine, latency in ((bundle.engine("fused-fp32"), 1e6), (bundle.engine("onnxruntime-fp32"), 1.0))
    )
    two = replace(bundle, manifest=replace(bundle.manifest, engines=(quick, slow)))
    assert [engine for engine, _ in runnable_engines(two)] == [slow, quick]
    with agln_fast.load(two, device="cpu") as segment:
        assert segment.engine == quick


@pytest.mark.gpu
def test_a_steady_state_takes_no_memory(small_network):
    with FusedEngine(small_network(), LABELS, device="cuda") as backend:
        backend.run(images())
        before = torch.cuda.memory_stats()["allocation.all.allocated"]
        backend.run(images(seed=1))
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_graphs_on_the_gpu(precision, small_network, monkeypatch):
    monkeypatch.setattr(fused_network, "_PROGRAMS", 2)
    network = small_network()
    with (
        FusedEngine(network, LABELS, precision=precision, device="cuda") as gpu,
        FusedEngine(network, LABELS, precision=precision, device="cpu") as cpu,
    ):
        for batch in (1, 2, 1, 3, 2):
            result = gpu.run(images(batch, batch))
            assert np.array_equal(result, gpu.run(images(batch, batch))), "differs from run to run"
            assert (result == cpu.run(images(batch, batch))).mean() > (0.999 if precision == "fp32" else 0.98)
        assert len(gpu._programs) == 2


@pytest.mark.gpu
def test_windows_are_summed_on_the_gpu(small_network):
    """Logits that stay there are those that are copied, for several images in a row."""
    with FusedEngine(small_network(), LOGITS, device="cuda") as gpu:
        kept = [gpu.run_in_place(images(2, seed)) for seed in range(3)]
        assert all(result.is_cuda for result in kept)
        for seed, result in enumerate(kept):
            assert np.array_equal(result.cpu().numpy(), gpu.run(images(2, seed)))
