"""What keeps a TensorRT engine from running, in the order in which it is said; runs on stand-ins of driver and library;
and a run where there is a GPU."""

import gc
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.parser
import pytest
from cuda_stand_in import Driver, Library

from agln_fast import cuda
from agln_fast.artefact import Artefact
from agln_fast.contract import IOContract
from agln_fast.cuda import compute_capability
from agln_fast.engines import EngineKind, open_engine
from agln_fast.engines.tensorrt import _PROGRAMS, TensorRT, TensorRTEngine, TensorRTRTX, TensorRTRTXEngine
from agln_fast.errors import BackendError, BundleError, MissingPackageError
from agln_fast.models.config import ModelConfig
from agln_fast.tensorrt_library import RTX_CAPABILITIES, import_library, library_version, shared_logger

KINDS = pytest.mark.parametrize("kind", [TensorRT(), TensorRTRTX()], ids=lambda kind: kind.name)


def artefact(
    kind: EngineKind, version: str = "1.2.3", capabilities: tuple[str, ...] = ("sm86", "sm89"), file: Path = Path("x")
) -> Artefact:
    contract = IOContract(height=32, width=48, min_batch=1, max_batch=4)
    return Artefact(
        name="small",
        kind=kind.name,
        precision="fp16",
        file=file,
        contract=contract,
        model=ModelConfig("fpn", "resnet18", 5),
        versions={kind.name: version},
        compute_capabilities=capabilities,
    )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    """One GPU of sm89."""
    driver = Driver((8, 9))
    monkeypatch.setattr(cuda, "_initialised", lambda process: (driver, ""))
    cuda._primary_context.cache_clear()
    return driver


@pytest.fixture
def library(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Version 1.2.3 of both libraries."""
    library = Library(driver)
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    return library


@KINDS
def test_obstacles_in_their_order(
    kind: EngineKind, driver: Driver, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = artefact(kind)
    assert kind.obstacle_to(engine) is None

    driver.devices = ((8, 0),)
    build = f"build it again with `agln-fast build ... --target {kind.name}`"
    assert kind.obstacle_to(engine) == f"built for sm86, sm89, but this GPU is sm80: {build}"
    driver.devices = ()
    assert kind.obstacle_to(engine) == "no CUDA device is present, and it needs a GPU of sm86, sm89"
    assert kind.obstacle("fp16") == "no CUDA device is present"
    library.__version__ = "1.2.4"
    assert kind.obstacle_to(engine) == f"built with {kind.name} 1.2.3, but 1.2.4 is installed: " + (
        "build it again from the bundle's own weights with `agln-fast rebuild`"
    )
    monkeypatch.setattr(cuda, "find_spec", lambda name: None)
    missing = f'package "cuda.bindings" is not installed: pip install "agln-fast[{kind.name}]"'
    assert kind.obstacle_to(engine) == kind.obstacle("fp16") == missing
    monkeypatch.setitem(sys.modules, kind.name.replace("-", "_"), None)
    assert f'package "{kind.name.replace("-", "_")}"' in str(kind.obstacle_to(engine))


def test_data_centre_gpu_is_sent_to_tensorrt(driver: Driver, library: Library) -> None:
    driver.devices = ((9, 0),)
    obstacle = TensorRTRTX().obstacle_to(artefact(TensorRTRTX()))
    assert obstacle == (
        "built for sm86, sm89, but this GPU is sm90: build it again with `agln-fast build ... --target tensorrt`"
    )


@KINDS
@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cpu", "'cpu': TensorRT engines run on CUDA devices only"),
        ("cuda:1", r"'cuda:1': this machine has 1 CUDA device"),
        (None, "engine small cannot run here: built for sm86, sm89, but this GPU is sm120"),
    ],
)
def test_opening_says_why_not(
    kind: EngineKind, driver: Driver, library: Library, device: str | None, message: str
) -> None:
    driver.devices = ((12, 0),)
    with pytest.raises(BackendError, match=message):
        open_engine(artefact(kind), device=device)


def test_ports_are_what_the_engine_says() -> None:
    """A batch that may vary is -1 there."""
    ports = {
        "image": ("INPUT", "UINT8", (-1, 32, 48, 3)),
        "labels": ("OUTPUT", "INT32", (-1, 32, 48)),
        "extra": ("OUTPUT", "HALF", (1,)),
    }
    backend = object.__new__(TensorRTRTXEngine)
    backend._engine = SimpleNamespace(
        num_io_tensors=len(ports),
        get_tensor_name=lambda index: list(ports)[index],
        get_tensor_mode=lambda name: ports[name][0],
        get_tensor_dtype=lambda name: SimpleNamespace(name=ports[name][1]),
        get_tensor_shape=lambda name: ports[name][2],
    )
    assert backend._ports("INPUT") == [("image", "uint8", [None, 32, 48, 3])]
    assert backend._ports("OUTPUT") == [("labels", "int32", [None, 32, 48]), ("extra", "HALF", [1])]


def test_library_version(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library_version("tensorrt") == "1.2.3"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert library_version("tensorrt") is None
    with pytest.raises(MissingPackageError, match="NVIDIA's own package index"):
        import_library("tensorrt")


def test_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.11:\\n no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(
        BackendError, match=r'"tensorrt" is installed but does not load: libnvinfer.so.11: no such file$'
    ):
        import_library("tensorrt")


def test_compute_capability(driver: Driver) -> None:
    driver.devices = (8, 9), (12, 0)
    assert [compute_capability(index) for index in range(3)] == ["sm89", "sm120", None]
    driver.devices = ()
    assert compute_capability() is None


def frames(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 48, 3), np.uint8)


@pytest.fixture
def engine_file(tmp_path: Path) -> Path:
    file = tmp_path / "model.engine"
    file.write_bytes(b"an engine")
    return file


@pytest.fixture(params=[TensorRT(), TensorRTRTX()], ids=lambda kind: kind.name)
def opened(
    request: pytest.FixtureRequest, driver: Driver, library: Library, engine_file: Path
) -> Iterator[TensorRTEngine]:
    with open_engine(artefact(request.param, file=engine_file)) as engine:
        assert isinstance(engine, TensorRTEngine)
        yield engine
    assert not driver.contexts
    assert not driver.alive, "not freed"


def test_each_batch_size_is_captured_once_and_replayed(
    opened: TensorRTEngine, driver: Driver, library: Library
) -> None:
    """The copies are part of the graph: the library is called twice for each size, and the driver copies no more."""
    assert opened.device == "cuda:0"
    results = []
    for seed in range(3):
        for count in (4, 1, 3):
            image = frames(count, seed)
            results.append((opened.run(image), image[..., 0] // 2))
    for labels, expected in results:  # at the end: each result is the caller's own
        assert np.array_equal(labels, expected)
    assert library.enqueued == 2 * 3
    assert driver.calls["cuGraphInstantiate"] == 3
    assert driver.calls["cuGraphLaunch"] == 9
    assert driver.calls["cuMemcpyHtoDAsync"] == driver.calls["cuMemcpyDtoHAsync"] == 2 * 3
    sizes = [shape[0] for shapes in library.shapes for shape in shapes]
    assert sorted(sizes) == [1, 3, 4]  # one context each, because a graph is void once its context's shape changes


def test_the_batch_sizes_used_last_are_kept(driver: Driver, library: Library, engine_file: Path) -> None:
    wide = artefact(TensorRT(), file=engine_file)
    wide = replace(wide, contract=replace(wide.contract, max_batch=8))
    with open_engine(wide) as engine:
        before = len(driver.alive)
        for count in range(1, 9):
            assert np.array_equal(engine.run(frames(count)), frames(count)[..., 0] // 2)
        assert len(driver.alive) == before + _PROGRAMS
        enqueued = library.enqueued
        engine.run(frames(8))
        assert library.enqueued == enqueued
        engine.run(frames(1))
        assert library.enqueued == enqueued + 2
    assert not driver.alive


@pytest.mark.parametrize(
    "image",
    [
        pytest.param(frames(5), id="larger-batch"),
        pytest.param(frames(1)[:, :-1], id="other-height"),
        pytest.param(frames(1)[0], id="no-batch"),
        pytest.param(frames(0), id="empty"),
        pytest.param(frames(1).astype(np.float32), id="other-dtype"),
    ],
)
def test_wrong_image(image: np.ndarray, opened: TensorRTEngine, library: Library) -> None:
    with pytest.raises(BackendError, match=r"image of \w+ \(.*the engine takes uint8 \(1 to 4, 32, 48, 3\)"):
        opened.run(image)
    assert library.enqueued == 0
    assert opened.run(frames(1)).shape == (1, 32, 48)


@pytest.mark.parametrize("function", ["execute_async_v3", "set_input_shape", "create_execution_context"])
def test_the_library_fails(function: str, opened: TensorRTEngine, library: Library) -> None:
    library.refuses.add(function)
    with pytest.raises(BackendError, match=f"{function} .*: {function} said no"):
        opened.run(frames(2))
    library.refuses.clear()
    assert np.array_equal(opened.run(frames(2)), frames(2)[..., 0] // 2)


@pytest.mark.parametrize("function", ["cuMemcpyHtoDAsync", "cuStreamSynchronize", "cuCtxPushCurrent"])
def test_the_driver_fails(function: str, opened: TensorRTEngine, driver: Driver) -> None:
    driver.failing.add(function)
    with pytest.raises(BackendError, match=f"{function} failed: CUDA_ERROR_LAUNCH_FAILED, unspecified launch failure"):
        opened.run(frames(2))
    driver.failing.clear()


@pytest.mark.parametrize("function", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_without_a_graph_it_runs_call_by_call(
    function: str, opened: TensorRTEngine, driver: Driver, library: Library, caplog: pytest.LogCaptureFixture
) -> None:
    driver.failing.add(function)
    for seed in range(3):
        assert np.array_equal(opened.run(frames(2, seed)), frames(2, seed)[..., 0] // 2)
    assert f"batch of 2 runs without a CUDA graph: {function} failed" in caplog.text
    assert driver.calls["cuGraphLaunch"] == 0
    driver.failing.clear()


@pytest.mark.parametrize("function", ["cuDevicePrimaryCtxRetain", "cuStreamCreate", "cuMemAlloc", "cuMemHostAlloc"])
def test_opening_fails_and_leaves_nothing(function: str, driver: Driver, library: Library, engine_file: Path) -> None:
    driver.failing.add(function)
    with pytest.raises(BackendError, match=f"{function} failed"):
        open_engine(artefact(TensorRT(), file=engine_file))
    assert not driver.contexts
    assert not driver.alive


@KINDS
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("deserialize_cuda_engine", "engine 'small': tensorrt refuses .*model.engine: deserialize_cuda_engine said no"),
    ],
)
def test_the_library_refuses_the_file(
    kind: EngineKind, function: str, message: str, driver: Driver, library: Library, engine_file: Path
) -> None:
    library.refuses.add(function)
    with pytest.raises(BackendError, match=message):
        open_engine(artefact(kind, file=engine_file))
    assert not driver.alive


def test_rtx_names_what_does_not_fit(library: Library, driver: Driver, engine_file: Path) -> None:
    library.refuses.add("get_engine_validity")
    with pytest.raises(
        BackendError, match=r"refuses .*model.engine \(version mismatch, unsupported cc\): build it again"
    ):
        open_engine(artefact(TensorRTRTX(), file=engine_file))
    assert not driver.alive


def test_a_closed_engine_does_not_run(driver: Driver, library: Library, engine_file: Path) -> None:
    engine = open_engine(artefact(TensorRT(), file=engine_file))
    engine.run(frames(1))
    engine.close()
    engine.close()
    assert not driver.alive
    with pytest.raises(BackendError, match="is closed; open it again"):
        engine.run(frames(1))


def test_an_engine_that_is_dropped_frees_what_it_holds(driver: Driver, library: Library, engine_file: Path) -> None:
    engine = open_engine(artefact(TensorRT(), file=engine_file))
    engine.run(frames(1))
    assert driver.alive
    del engine
    gc.collect()
    assert not driver.alive


def test_one_failure_keeps_nothing_else_from_being_freed(driver: Driver, library: Library, engine_file: Path) -> None:
    engine = open_engine(artefact(TensorRT(), file=engine_file))
    engine.run(frames(1))
    engine.run(frames(2))
    driver.failing.add("cuMemFreeHost")
    engine.close()
    kept = [memory for memory in driver.alive.values() if not isinstance(memory, str | list)]
    assert len(kept) == len(driver.alive) == 2  # the two that could not be freed
    assert not driver.contexts


def cuda_bindings(monkeypatch: pytest.MonkeyPatch, initialise: Callable[[int], object]) -> None:
    """A package cuda-bindings whose `cuInit` is `initialise`."""
    driver = SimpleNamespace(
        cuInit=initialise,
        cuGetErrorName=lambda code: (0, b"CUDA_ERROR_X"),
        cuGetErrorString=lambda code: (0, b"something"),
    )
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(driver=driver))
    monkeypatch.setattr(cuda, "find_spec", lambda name: True)


class DynamicLibNotFoundError(RuntimeError):
    """As the package's own is called."""


def no_driver(flags: int) -> object:
    raise DynamicLibNotFoundError("a library of NVIDIA's, three lines long")


def broken_driver(flags: int) -> object:
    raise RuntimeError("libcuda.so.1:\nno such symbol")


@pytest.mark.parametrize(
    ("initialise", "message"),
    [
        (no_driver, "no CUDA device is present"),
        (broken_driver, "no CUDA device can be used: libcuda.so.1: no such symbol"),
        (lambda flags: (999,), "no CUDA device can be used: cuInit failed: CUDA_ERROR_X, something"),
        (lambda flags: (3,), "this process was forked of one that uses CUDA: use spawn"),
    ],
    ids=["no-driver", "broken-driver", "another-error", "forked"],
)
def test_a_driver_that_cannot_be_used_says_why(
    initialise: Callable[[int], object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda_bindings(monkeypatch, initialise)
    cuda._initialised.cache_clear()
    cuda._primary_context.cache_clear()
    try:
        assert message in str(cuda.obstacle())
        assert cuda.device_count() == 0
        assert compute_capability() is None
        with pytest.raises(BackendError, match="cuDeviceGet cannot be called: no CUDA device"):
            cuda.Device(0)
    finally:
        cuda._initialised.cache_clear()


def test_two_engines_share_a_device(driver: Driver, library: Library, engine_file: Path) -> None:
    first, second = (open_engine(artefact(TensorRT(), file=engine_file)) for _ in range(2))
    for engine in (first, second):
        assert np.array_equal(engine.run(frames(2)), frames(2)[..., 0] // 2)
    first.close()
    assert np.array_equal(second.run(frames(3)), frames(3)[..., 0] // 2)
    second.close()
    assert not driver.alive
    assert driver.calls["cuDevicePrimaryCtxRetain"] == 1


def test_threads_share_an_engine(opened: TensorRTEngine) -> None:
    wrong = []

    def work(seed: int) -> None:
        for step in range(20):
            image = frames(1 + (seed + step) % 4, 100 * seed + step)
            if not np.array_equal(opened.run(image), image[..., 0] // 2):
                wrong.append((seed, step))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class TestRuntimeCache:
    """TensorRT-RTX compiles kernels where they run; the next process finds them in the cache folder."""

    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("AGLN_FAST_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    def run(self, library: Library, file: Path, *counts: int) -> int:
        """Kernels that were compiled."""
        before = library.compiled
        with open_engine(artefact(TensorRTRTX(), file=file)) as engine:
            for count in counts:
                engine.run(frames(count))
        return library.compiled - before

    def test_kernels_are_compiled_once(self, library: Library, engine_file: Path, folder: Path) -> None:
        assert self.run(library, engine_file, 4, 4, 1) == 2
        (file,) = folder.rglob("*.cache")
        assert file.read_bytes() == b"kernels batch1 batch4"
        written = file.stat().st_mtime_ns
        assert self.run(library, engine_file, 4, 1) == 0
        assert file.stat().st_mtime_ns == written
        assert self.run(library, engine_file, 2) == 1
        assert file.read_bytes() == b"kernels batch1 batch2 batch4"

    def test_other_engines_gpus_and_versions_have_their_own(
        self, library: Library, driver: Driver, engine_file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.run(library, engine_file, 4)
        driver.devices = ((8, 6),)
        assert self.run(library, engine_file, 4) == 1
        engine_file.write_bytes(b"another engine")
        assert self.run(library, engine_file, 4) == 1
        driver.version += 10
        assert self.run(library, engine_file, 4) == 1
        library.__version__ = "1.2.4"
        monkeypatch.setattr("agln_fast.engines.tensorrt.TensorRT.obstacle_to", lambda *arguments: None)
        assert self.run(library, engine_file, 4) == 1
        assert len(list(folder.rglob("*.cache"))) == 5

    def test_a_damaged_file_is_made_anew(
        self, library: Library, engine_file: Path, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        self.run(library, engine_file, 4)
        (file,) = folder.rglob("*.cache")
        file.write_bytes(b"damaged")
        assert self.run(library, engine_file, 4) == 1
        assert "damaged; made anew" in caplog.text
        assert file.read_bytes() == b"kernels batch4"

    def test_nothing_can_be_written(self, library: Library, engine_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AGLN_FAST_CACHE", "/dev/null")
        assert self.run(library, engine_file, 4) == 1
        assert self.run(library, engine_file, 4) == 1


@pytest.mark.tensorrt_rtx
def test_logger_forwards_and_remembers(caplog: pytest.LogCaptureFixture) -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt_rtx")
    log = shared_logger(library)
    assert log is shared_logger(library)
    log.clear()
    assert log.last_error == "the library gave no reason"
    severity = library.ILogger.Severity
    with caplog.at_level(logging.INFO, logger="agln_fast.tensorrt"):
        for kind, message in (
            (severity.VERBOSE, "detail"),
            (severity.INFO, "fact"),
            (severity.WARNING, "slow"),
            (severity.ERROR, "wrong"),
            (severity.INTERNAL_ERROR, "very\nwrong"),
        ):
            log.log(kind, message)
    assert caplog.messages == ["fact", "slow", "wrong", "very\nwrong"]
    assert list(log.warnings) == ["slow"]
    assert list(log.errors) == ["wrong", "very\nwrong"]
    assert log.last_error == "very wrong"


@pytest.mark.gpu
@KINDS
def test_runs_as_onnxruntime_does(kind: EngineKind, tmp_path: Path) -> None:
    package = kind.name.replace("-", "_")
    capability = compute_capability()
    if capability is None:
        pytest.skip("needs a CUDA device")
    library = pytest.importorskip(package, reason=f"needs the package {package}")
    if isinstance(kind, TensorRTRTX) and capability not in RTX_CAPABILITIES:
        pytest.skip(f"TensorRT-RTX does not serve {capability}")
    from onnxruntime import InferenceSession

    from agln_fast.export.tensorrt import build_tensorrt_engine

    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        small (uint8[batch,32,48,3] image) => (uint8[batch,32,48] labels) {
            pixels = Cast<to=1>(image)
            planes = Transpose<perm=[0, 3, 1, 2]>(pixels)
            scores = Conv<pads=[1, 1, 1, 1]>(planes, kernel)
            indices = ArgMax<axis=1, keepdims=0>(scores)
            real = Cast<to=1>(indices)
            labels = Cast<to=2>(real)
        }
    """)
    random = np.random.default_rng(0)
    kernel = random.standard_normal((5, 3, 3, 3)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(kernel, "kernel"))
    onnx.save(model, tmp_path / "small.onnx")
    build_tensorrt_engine(
        tmp_path / "small.onnx",
        tmp_path / "small.engine",
        flavour=kind.name,
        precision="fp32",
        compute_capabilities=(capability,),
        batch=(1, 2, 4),
    )
    engine = artefact(kind, library.__version__, (capability,), tmp_path / "small.engine")
    other = replace(engine, contract=replace(engine.contract, output="logits"))
    with pytest.raises(BundleError, match=r"gives labels uint8 .* and the manifest says logits"):
        open_engine(other, device="cuda:0")
    session = InferenceSession(tmp_path / "small.onnx", providers=["CPUExecutionProvider"])
    with open_engine(engine, device="cuda:0") as opened:
        assert opened.device == "cuda:0"
        for batch in (4, 1, 3):
            image = random.integers(0, 256, (batch, 32, 48, 3), dtype=np.uint8)
            labels = opened.run(image)
            assert (labels.dtype, labels.shape) == (np.uint8, (batch, 32, 48))
            assert (labels == session.run(None, {"image": image})[0]).mean() > 0.999
        with pytest.raises(BackendError, match=r"the engine takes uint8 \(1 to 4, 32, 48, 3\)"):
            opened.run(np.zeros((5, 32, 48, 3), np.uint8))
    opened.close()


@pytest.mark.gpu
def test_buffers_and_graphs_on_the_gpu() -> None:
    """From the host to the device and back, by a graph that is replayed with other values, beside PyTorch."""
    pytest.importorskip("cuda.bindings", reason="needs the package cuda-bindings")
    import torch

    assert cuda.device_count() == torch.cuda.device_count()
    major, minor = torch.cuda.get_device_capability(0)
    assert compute_capability(0) == f"sm{major}{minor}"
    there = torch.ones(4, device="cuda")
    device = cuda.Device(0)
    with device.current():
        stream, buffer = cuda.Stream(), cuda.TwinBuffer((4, 3), np.float32)

        def work() -> None:
            buffer.upload(stream, 2)
            buffer.download(stream, 4)

        buffer.host[:] = 5
        buffer.upload(stream, 4)
        stream.synchronize()
        graph = stream.capture(work)
        for value in (1, 2):
            buffer.host[:2], buffer.host[2:] = value, -1  # the second half comes back from the device
            graph()
            stream.synchronize()
            assert (buffer.host[:2] == value).all()
            assert (buffer.host[2:] == 5).all()
        with pytest.raises(BackendError, match=r"cu[A-Za-z]+ failed: CUDA_ERROR_"):
            stream.capture(stream.synchronize)
        graph()  # the stream is as before
        stream.synchronize()
        with pytest.raises(BackendError, match=r"cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY.*free memory of the GPU"):
            cuda.TwinBuffer((2**50,), np.uint8)
        for resource in (graph, buffer, stream):
            resource.close()
    assert there.sum().item() == 4
