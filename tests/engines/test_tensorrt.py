"""What keeps a TensorRT engine from running, in the order in which it is said; and a run where there is a GPU."""

import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.parser
import pytest
import torch

from agln_fast.artefact import Artefact
from agln_fast.contract import IOContract
from agln_fast.cuda import compute_capability
from agln_fast.engines import EngineKind, open_engine
from agln_fast.engines.tensorrt import TensorRT, TensorRTRTX, TensorRTRTXEngine
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
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with version 1.2.3 of both libraries and one GPU of sm89; tests take away what they need to."""
    library = SimpleNamespace(__version__="1.2.3")
    state = SimpleNamespace(library=library, cuda=True, capability=(8, 9))
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: state.cuda)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: state.capability)
    return state


@KINDS
def test_obstacles_in_their_order(kind: EngineKind, machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = artefact(kind)
    assert kind.obstacle_to(engine) is None

    machine.capability = (8, 0)
    build = f"build it again with `agln-fast build ... --target {kind.name}`"
    assert kind.obstacle_to(engine) == f"built for sm86, sm89, but this GPU is sm80: {build}"
    machine.cuda = False
    assert kind.obstacle_to(engine) == "no CUDA device is present, and it needs a GPU of sm86, sm89"
    machine.library.__version__ = "1.2.4"
    assert kind.obstacle_to(engine) == f"built with {kind.name} 1.2.3, but 1.2.4 is installed: " + (
        "build it again from the bundle's own weights with `agln-fast rebuild`"
    )
    monkeypatch.setitem(sys.modules, kind.name.replace("-", "_"), None)
    assert f'pip install "agln-fast[{kind.name}]"' in str(kind.obstacle_to(engine))


def test_data_centre_gpu_is_sent_to_tensorrt(machine: SimpleNamespace) -> None:
    machine.capability = (9, 0)
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
def test_opening_says_why_not(kind: EngineKind, machine: SimpleNamespace, device: str | None, message: str) -> None:
    machine.capability = (12, 0)
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


def test_library_version(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_compute_capability(machine: SimpleNamespace) -> None:
    assert compute_capability() == "sm89"
    machine.cuda = False
    assert compute_capability() is None


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
        with pytest.raises(BackendError, match=r"the engine takes torch\.uint8"):
            opened.run(np.zeros((5, 32, 48, 3), np.uint8))
    opened.close()
