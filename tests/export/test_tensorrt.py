"""Building engines with TensorRT-RTX, which needs no GPU for it; TensorRT is played by TensorRT-RTX."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from cuda_stand_in import Driver
from rich.progress import Progress

from agln_fast import cuda
from agln_fast.errors import BuildError, ConfigError, MissingPackageError
from agln_fast.export.tensorrt import _check_plan, build_tensorrt_engine
from agln_fast.tensorrt_library import RTX_CAPABILITIES

needs_rtx = pytest.mark.tensorrt_rtx
ONNX_TYPES = {"fp32": 1, "fp16": 10, "bf16": 16}


@pytest.fixture
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="needs the package tensorrt_rtx")


def write_network(
    path: Path,
    precision: str = "fp32",
    batch: int | str = 1,
    output: str = "labels",
    opset: int = 20,
    size: str = "32,48",
) -> Path:
    """Two convolutions with a float32 softmax behind them, written in ONNX's own text form."""
    kind = ONNX_TYPES[precision]
    ending = {
        "labels": "indices = ArgMax<axis=1, keepdims=0>(scores) real = Cast<to=1>(indices) labels = Cast<to=2>(real)",
        "logits": "logits = Identity(scores)",
        "other": "other = Identity(scores)",
    }[output]
    shape = f"uint8[{batch},{size}]" if output == "labels" else f"float[{batch},5,{size}]"
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["" : {opset}]>
        small (uint8[{batch},{size},3] image) => ({shape} {output}) {{
            pixels = Cast<to=1>(image)
            planes = Transpose<perm=[0, 3, 1, 2]>(pixels)
            typed = Cast<to={kind}>(planes)
            hidden = Conv<pads=[1, 1, 1, 1]>(typed, first)
            active = Relu(hidden)
            logits_typed = Conv<pads=[1, 1, 1, 1]>(active, second)
            wide = Cast<to=1>(logits_typed)
            scores = Softmax<axis=1>(wide)
            {ending}
        }}
    """)
    random = np.random.default_rng(0)
    for name, dims in (("first", (8, 3, 3, 3)), ("second", (5, 8, 3, 3))):
        values = random.standard_normal(dims).ravel().tolist()
        model.graph.initializer.append(onnx.helper.make_tensor(name, kind, dims, values))
    onnx.save(model, path)
    return path


def build(onnx_path: Path, **options: Any) -> Any:
    options = {"flavour": "tensorrt-rtx", "precision": "fp32", "compute_capabilities": ("sm89",)} | options
    return build_tensorrt_engine(onnx_path, onnx_path.with_suffix(".engine"), **options)


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_builds_the_precision_that_was_asked_for(rtx: Any, tmp_path: Path, precision: str) -> None:
    result = build(write_network(tmp_path / "small.onnx", precision), precision=precision)
    assert result.precision == precision
    assert (result.convolutions, result.convolutions_in_plan) == (2, 2)
    assert result.versions == {"tensorrt-rtx": rtx.__version__}
    assert result.size_bytes == result.engine_path.stat().st_size > 0
    assert result.build_seconds > 0
    assert sorted(os.listdir(tmp_path)) == ["small.engine", "small.onnx"]


@needs_rtx
@pytest.mark.parametrize(
    ("asked", "built"),
    [((), RTX_CAPABILITIES), (("sm86", "sm89", "sm86"), ("sm86", "sm89"))],
    ids=["none means all", "a repeated one counts once"],
)
def test_one_engine_for_several_capabilities(rtx: Any, tmp_path: Path, asked: Any, built: Any) -> None:
    result = build(write_network(tmp_path / "small.onnx"), compute_capabilities=asked, workspace_bytes=1 << 28)
    assert result.compute_capabilities == built


@needs_rtx
@pytest.mark.parametrize(
    ("batch", "asked"),
    [("batch", (1, 2, 4)), (2, (2, 2, 2)), (2, None)],
    ids=["range", "fixed and said", "fixed and unsaid"],
)
def test_batch(rtx: Any, tmp_path: Path, batch: int | str, asked: tuple[int, int, int] | None) -> None:
    assert build(write_network(tmp_path / "small.onnx", batch=batch, output="logits"), batch=asked).size_bytes > 0


@needs_rtx
@pytest.mark.parametrize(
    ("batch", "asked", "message"),
    [
        ("batch", None, "smallest, usual and largest batch are needed"),
        ("batch", (4, 2, 1), "1 <= smallest"),
        ("batch", (0, 1, 2), "1 <= smallest"),
        (2, (1, 2, 2), "fixed at 2"),
    ],
    ids=["range not said", "falling", "empty batch", "fixed at another"],
)
def test_batch_that_cannot_be(rtx: Any, tmp_path: Path, batch: int | str, asked: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(write_network(tmp_path / "small.onnx", batch=batch), batch=asked)


@needs_rtx
@pytest.mark.parametrize(("inside", "asked"), [("fp32", "fp16"), ("fp16", "fp32"), ("bf16", "fp16")])
def test_another_precision_is_an_error(rtx: Any, tmp_path: Path, inside: str, asked: str) -> None:
    with pytest.raises(BuildError, match=f"convolution .* is in {inside}, not {asked}"):
        build(write_network(tmp_path / "small.onnx", inside), precision=asked)
    assert os.listdir(tmp_path) == ["small.onnx"]


def test_another_precision_in_the_plan_is_an_error() -> None:
    plan = (
        b'..header {\n tensor={ a=1 name="x" b=2 type=half }\n tensor={ name="w" type=float }\n'
        b' corrltn={ name="conv" output={"x" } input={"x" "w" "y" } }\n'
    )
    assert _check_plan(plan, {"another": "fp16"}, Path("m.onnx")) == 0
    assert _check_plan(plan, {"conv": None}, Path("m.onnx")) == 1
    with pytest.raises(BuildError, match="'conv' is in fp32, not fp16"):
        _check_plan(plan, {"conv": "fp16"}, Path("m.onnx"))
    with pytest.raises(BuildError, match="'conv' is in fp16, not int8"):
        _check_plan(plan, {"conv": "int8"}, Path("m.onnx"))
    with pytest.raises(BuildError, match="'conv' is in int8, not floating point"):
        _check_plan(plan.replace(b"type=float", b"type=int8"), {"conv": None}, Path("m.onnx"))


@needs_rtx
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("garbage", "cannot parse it: .*Failed to parse the ONNX model"),
        ("Transpose<perm=[0, 3, 1, 2]>(image)", r"node .*\(Transpose\): .*type UInt8"),
        ("NoSuchOperator(image)", r"\(NoSuchOperator\)"),
    ],
    ids=["not ONNX", "an operator without uint8", "an unknown operator"],
)
def test_broken_model_is_one_line_and_leaves_no_file(rtx: Any, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "small.onnx"
    path.write_text(text)
    if text != "garbage":
        header = '<ir_version: 10, opset_import: ["" : 20]> small (uint8[1,32,48,3] image) => (uint8[a,b,c,d] labels)'
        onnx.save(onnx.parser.parse_model(f"{header} {{ labels = {text} }}"), path)
    with pytest.raises(BuildError, match=message) as caught:
        build(path)
    assert "\n" not in str(caught.value)
    assert "cudaError" not in str(caught.value)
    assert os.listdir(tmp_path) == ["small.onnx"]


@needs_rtx
def test_model_must_keep_to_the_contract(rtx: Any, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"has \['image'\], \['other'\]"):
        build(write_network(tmp_path / "small.onnx", output="other"))
    with pytest.raises(BuildError, match="only the batch"):
        build(write_network(tmp_path / "small.onnx", size="height,width"))
    header = '<ir_version: 10, opset_import: ["" : 20]> small (uint8[1,32,48,3] image) => (float[1,32,48,3] logits)'
    onnx.save(onnx.parser.parse_model(f"{header} {{ logits = Cast<to=1>(image) }}"), tmp_path / "small.onnx")
    with pytest.raises(BuildError, match="without a convolution"):
        build(tmp_path / "small.onnx")


def test_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no such file"):
        build(tmp_path / "small.onnx")


@needs_rtx
def test_folder_that_is_not_there(rtx: Any, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"cannot be written \(No such file or directory\)"):
        build_tensorrt_engine(
            write_network(tmp_path / "small.onnx"), tmp_path / "no" / "x", flavour="tensorrt-rtx", precision="fp32"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flavour": "tensorrt-rxt"}, "did you mean 'tensorrt-rtx'"),
        ({"precision": "fp8"}, "unknown precision 'fp8'.* known: fp32, fp16, bf16"),
        ({"compute_capabilities": ("sm90",)}, "does not serve it, tensorrt does"),
        ({"compute_capabilities": ("sm89", "sm100")}, "does not serve it, tensorrt does"),
        ({"compute_capabilities": ("sm8",)}, "did you mean 'sm8"),
        ({"timing_cache": Path("cache")}, "tensorrt-rtx has none"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_choice_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tmp_path / "small.onnx", **options)


@pytest.mark.parametrize(
    ("flavour", "message"),
    [("tensorrt", r"\[tensorrt\].*NVIDIA's own package index"), ("tensorrt-rtx", r"\[tensorrt-rtx\]\"$")],
)
def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str, message: str) -> None:
    monkeypatch.setitem(sys.modules, flavour.replace("-", "_"), None)
    with pytest.raises(MissingPackageError, match=message):
        build(write_network(tmp_path / "small.onnx"), flavour=flavour)


@needs_rtx
def test_progress_reaches_the_end(rtx: Any, tmp_path: Path) -> None:
    depths = set()

    class Recorder(Progress):
        def add_task(self, description: str, *arguments: Any, **options: Any) -> Any:
            depths.add(len(description) - len(description.lstrip()))
            return super().add_task(description, *arguments, **options)

    progress = Recorder(disable=True)
    build(write_network(tmp_path / "small.onnx"), progress=progress)
    assert {0, 2, 4} <= depths
    assert [task.percentage for task in progress.tasks] == [100.0]


_INTERRUPTED = """
import os, signal, sys
from pathlib import Path
from rich.progress import Progress
from agln_fast.export.tensorrt import build_tensorrt_engine

class Interrupting(Progress):
    sent = False

    def update(self, *arguments, **options):
        if not self.sent:
            self.sent = True
            os.kill(os.getpid(), signal.SIGINT)
        super().update(*arguments, **options)

network, progress, handler = Path(sys.argv[1]), Interrupting(disable=True), signal.getsignal(signal.SIGINT)
options = {"flavour": "tensorrt-rtx", "precision": "fp32", "compute_capabilities": ("sm89",)}
try:
    build_tensorrt_engine(network, network.with_suffix(".engine"), **options, progress=progress)
except KeyboardInterrupt:
    print("interrupted", os.listdir(network.parent), progress.tasks, signal.getsignal(signal.SIGINT) is handler)
"""


@needs_rtx
def test_control_c_cancels(rtx: Any, tmp_path: Path) -> None:
    """In a process of its own: a signal goes to the whole process, and this one has other tests to run."""
    command = [sys.executable, "-c", _INTERRUPTED, str(write_network(tmp_path / "small.onnx"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.splitlines()) == (0, ["interrupted ['small.onnx'] [] True"]), done.stderr


@needs_rtx
def test_failed_build_gives_the_library_reason(rtx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Builder(rtx.Builder):  # type: ignore[misc]
        def build_serialized_network(self, network: Any, config: Any) -> Any:
            self.logger.log(rtx.ILogger.Severity.WARNING, "a warning")
            self.logger.log(rtx.ILogger.Severity.ERROR, "the\nreason")
            self.logger.log(rtx.ILogger.Severity.ERROR, "In catchCudaError (cudaError 35: no driver)")

    monkeypatch.setattr(rtx, "Builder", Builder)
    with pytest.raises(BuildError, match=r"cannot build it: the reason$"):
        build(write_network(tmp_path / "small.onnx"))
    assert os.listdir(tmp_path) == ["small.onnx"]


@needs_rtx
def test_warnings_are_kept(
    rtx: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Builder(rtx.Builder):  # type: ignore[misc]
        def build_serialized_network(self, network: Any, config: Any) -> Any:
            self.logger.log(rtx.ILogger.Severity.WARNING, "slow")
            return super().build_serialized_network(network, config)

    monkeypatch.setattr(rtx, "Builder", Builder)
    assert build(write_network(tmp_path / "small.onnx")).warnings == ("slow",)
    assert ("agln_fast.tensorrt", 30, "slow") in caplog.record_tuples


@pytest.fixture
def tensorrt(rtx: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The API of TensorRT with a GPU of sm89, played by TensorRT-RTX."""

    class Builder(rtx.Builder):  # type: ignore[misc]
        def create_builder_config(self) -> Any:
            config = super().create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(rtx.ComputeCapability.SM89, 0)
            return config

    library = SimpleNamespace(**{**vars(rtx), "Builder": Builder, "__version__": "11.4.0.106"})
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    monkeypatch.setattr(cuda, "_initialised", lambda process: (Driver((8, 9)), ""))
    return library


@needs_rtx
@pytest.mark.filterwarnings("ignore:.*Timing cache:DeprecationWarning")
def test_tensorrt_builds_for_the_gpu_that_is_here(
    tensorrt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "timing.cache"
    for _ in ("writes the cache", "reads it"):
        result = build(
            write_network(tmp_path / "small.onnx"), flavour="tensorrt", compute_capabilities=(), timing_cache=cache
        )
        assert cache.stat().st_size > 0
    assert result.compute_capabilities == ("sm89",)
    assert result.versions == {"tensorrt": "11.4.0.106"}
    assert result.convolutions_in_plan == 0
    monkeypatch.setattr(tensorrt.IBuilderConfig, "set_timing_cache", lambda *arguments: False)
    with pytest.raises(BuildError, match="timing cache of another GPU"):
        build(tmp_path / "small.onnx", flavour="tensorrt", compute_capabilities=(), timing_cache=cache)


@needs_rtx
def test_tensorrt_builds_for_no_other_gpu(tensorrt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_network(tmp_path / "small.onnx")
    with pytest.raises(ConfigError, match="sm80, sm89: tensorrt builds only for this GPU, sm89"):
        build(path, flavour="tensorrt", compute_capabilities=("sm80", "sm89"))
    monkeypatch.setattr(cuda, "_initialised", lambda process: (None, "no driver"))
    with pytest.raises(BuildError, match="no CUDA device"):
        build(path, flavour="tensorrt")
