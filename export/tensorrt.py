"""ONNX -> engine of TensorRT or TensorRT-RTX: a raw plan without a header of our own.

The network's types, shapes and names are those of the ONNX model: networks are strongly typed, so nothing here chooses
a precision. It is read back instead, and must be the one that was asked for.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from rich.progress import Progress, TaskID

from agln_fast import interruption
from agln_fast.contract import Output
from agln_fast.cuda import compute_capability, has_bindings, obstacle
from agln_fast.errors import BuildError, ConfigError, MissingPackageError, choose
from agln_fast.files import replacing
from agln_fast.precision import PRECISIONS, Precision
from agln_fast.tensorrt_library import Flavour, check_rtx_capabilities, import_library, shared_logger

__all__ = ["TensorRTBuild", "build_tensorrt_engine", "resolve_capabilities"]

_PRECISIONS = {numbers.tensorrt: name for name, numbers in PRECISIONS.items() if numbers.bytes > 1}

# TensorRT-RTX keeps its compiled programs in the plan as text: a declaration of each tensor, then the operations.
_PROGRAM = b"header {\n"
_TENSOR = re.compile(rb'tensor=\{[^\n]* name="([^"\n]+)"[^\n]* type=(\w+) \}')
_CONVOLUTION = re.compile(rb'corrltn=\{ name="([^"\n]+)" output=\{"([^"\n]+)"[^\n}]*\} input=\{"([^"\n]+)" "([^"\n]+)"')


@dataclass(frozen=True)
class TensorRTBuild:
    """What was built.

    precision: as read back: every convolution of the parsed, strongly typed network has it, and so has every one that
        the finished plan of TensorRT-RTX lists.
    compute_capabilities: e.g. ("sm86", "sm89").
    versions: library -> version, e.g. {"tensorrt-rtx": "1.7.1.116"}.
    convolutions: number of convolutions in the network.
    convolutions_in_plan: how many of them were read in the plan as well; 0 for TensorRT, whose plans are opaque.
    warnings: the library's warnings, oldest first; the latest hundred.
    """

    engine_path: Path
    precision: Precision
    compute_capabilities: tuple[str, ...]
    versions: dict[str, str]
    size_bytes: int
    build_seconds: float
    convolutions: int
    convolutions_in_plan: int
    warnings: tuple[str, ...]


def build_tensorrt_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    flavour: Flavour,
    precision: Precision,
    floating: Collection[str] = (),
    compute_capabilities: Sequence[str] = (),
    batch: tuple[int, int, int] | None = None,
    workspace_bytes: int | None = None,
    timing_cache: Path | None = None,
    progress: Progress | None = None,
) -> TensorRTBuild:
    """Build `engine_path` from an ONNX model with the input `image` and the output `labels` or `logits`.

    The file appears whole or not at all. Ctrl-C, or a signal that the program listens for, cancels
    the build at the library's next step.

    Args:
        precision: of the convolutions in the ONNX model; with "fp32", TF32 is off. With "int8", that of their inputs.
        floating: names of the convolutions that are not in int8, where `precision` is.
        compute_capabilities: for tensorrt-rtx, what one engine shall serve (default: all of `RTX_CAPABILITIES`; no GPU
            is needed); for tensorrt, nothing else than the GPU of this machine.
        batch: smallest, usual and largest batch; needed where the model's batch may vary.
        workspace_bytes: upper limit of scratch memory; None for the library's own.
        timing_cache: file with kernel timings, read if there is one, and written after the build; tensorrt only.
        progress: gets one task for each phase of the build; nested phases vanish when they are done.

    Raises:
        ConfigError: an unknown flavour, precision or capability, or a combination that cannot be.
        MissingPackageError: the library is not installed.
        BuildError: the model cannot be parsed, built or written, or is not in `precision`.
        KeyboardInterrupt: Ctrl-C, or such a signal.
    """
    choose("precision", precision, PRECISIONS)
    if flavour == "tensorrt-rtx" and timing_cache is not None:
        raise ConfigError("timing cache: tensorrt-rtx has none, because it chooses kernels where they run")
    compute_capabilities = resolve_capabilities(flavour, compute_capabilities)
    if not onnx_path.is_file():
        raise BuildError(f"{onnx_path}: no such file")
    library = import_library(flavour)

    started = time.perf_counter()
    log = shared_logger(library)
    log.clear()
    monitor = _create_monitor(library, progress or Progress(disable=True))
    with interruption.deferred(monitor.cancel):
        builder = library.Builder(log)
        network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = library.OnnxParser(network, log)
        if not parser.parse_from_file(str(onnx_path)):
            raise BuildError(f"{onnx_path}: {flavour} cannot parse it: {_parse_error(parser, log)}")
        _check_names(network, onnx_path)
        convolutions = _check_convolutions(library, network, precision, floating, onnx_path)

        config = builder.create_builder_config()
        config.progress_monitor = monitor
        if precision == "fp32":
            config.clear_flag(library.BuilderFlag.TF32)
        if workspace_bytes is not None:
            config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, workspace_bytes)
        if flavour == "tensorrt-rtx":
            config.set_flag(library.BuilderFlag.REQUIRE_USER_ALLOCATION)  # or a run may not be captured
            config.num_compute_capabilities = len(compute_capabilities)
            for i, capability in enumerate(compute_capabilities):
                config.set_compute_capability(library.ComputeCapability.__members__[capability.upper()], i)
        _add_profile(builder, config, network, batch, onnx_path)
        if timing_cache is not None:
            _load_timing_cache(config, timing_cache)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            monitor.withdraw()
            raise BuildError(f"{onnx_path}: {flavour} cannot build it: {_build_error(log)}")
    in_plan = _check_plan(bytes(plan), convolutions, onnx_path) if flavour == "tensorrt-rtx" else 0
    if timing_cache is not None:
        with replacing(timing_cache, BuildError) as part:
            part.write_bytes(config.get_timing_cache().serialize())
    with replacing(engine_path, BuildError) as part:
        part.write_bytes(plan)
    return TensorRTBuild(
        engine_path=engine_path,
        precision=precision,
        compute_capabilities=tuple(compute_capabilities),
        versions={flavour: str(library.__version__)},
        size_bytes=plan.nbytes,
        build_seconds=time.perf_counter() - started,
        convolutions=len(convolutions),
        convolutions_in_plan=in_plan,
        warnings=tuple(log.warnings),
    )


def resolve_capabilities(flavour: Flavour, asked: Sequence[str] = ()) -> tuple[str, ...]:
    """The compute capabilities that an engine of `flavour` would be built for here; none asked for means all.

    Raises:
        ConfigError: an unknown flavour or capability, or one that the flavour does not serve.
        MissingPackageError: the library is not installed.
        BuildError: tensorrt needs a GPU, and there is none.
    """
    choose("flavour", flavour, get_args(Flavour))
    if flavour == "tensorrt":
        import_library(flavour)
        return _capability_here(asked)
    capabilities = check_rtx_capabilities(asked)
    import_library(flavour)
    return capabilities


def _capability_here(asked: Sequence[str]) -> tuple[str]:
    if not has_bindings():
        raise MissingPackageError("cuda.bindings", "tensorrt")
    present = compute_capability()
    if present is None:
        raise BuildError(f"tensorrt builds on the GPU that it builds for, and {obstacle()}")
    if set(asked) - {present}:
        raise ConfigError(f"compute capabilities {', '.join(asked)}: tensorrt builds only for this GPU, {present}")
    return (present,)


def _check_names(network: Any, onnx_path: Path) -> None:
    inputs = [network.get_input(i).name for i in range(network.num_inputs)]
    outputs = [network.get_output(i).name for i in range(network.num_outputs)]
    if inputs != ["image"] or outputs not in [[name] for name in get_args(Output)]:
        raise BuildError(f"{onnx_path}: needs input 'image' and output 'labels' or 'logits', has {inputs}, {outputs}")


def _check_convolutions(
    library: Any, network: Any, precision: Precision, floating: Collection[str], onnx_path: Path
) -> dict[str, Precision | None]:
    """Check that every convolution is in `precision`; return the name of each one, and its precision, or None where it
    may have any floating-point one.

    In an int8 network a convolution of floating-point type is in int8 if its inputs were int8 before: the library takes
    the pair for one.
    """
    kinds = (library.LayerType.CONVOLUTION, library.LayerType.DECONVOLUTION)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    made_by = {layer.get_output(i).name: layer.type for layer in layers for i in range(layer.num_outputs)}
    convolutions = {layer.name: layer for layer in layers if layer.type in kinds}
    if not convolutions:
        raise BuildError(f"{onnx_path}: without a convolution, whose type is the network's precision")
    expected = {name: None if name in floating else precision for name in convolutions}
    for name, layer in convolutions.items():
        if precision == "int8":
            inputs = filter(None, (layer.get_input(i) for i in range(layer.num_inputs)))  # weights are no tensor
            makers = [made_by.get(tensor.name) for tensor in inputs]
            types = ["INT8" if maker == library.LayerType.DEQUANTIZE else "FLOAT" for maker in makers]
        else:
            types = [tensor.dtype.name for tensor in (layer.get_input(0), layer.get_output(0))]
        for kind in types:
            _check_type(kind, expected[name], name, onnx_path)
    return expected


def _check_plan(plan: bytes, convolutions: Mapping[str, Precision | None], onnx_path: Path) -> int:
    """Check the precision of the convolutions that `plan` lists, and return their number.

    Without a GPU a plan cannot be opened for inspection, but its text can be read. Convolutions that were turned into
    matrix products are not listed as convolutions. What one gives of int8 may have any type.
    """
    seen = set()
    for program in plan.split(_PROGRAM)[1:]:
        types = dict(_TENSOR.findall(program))
        for text, *tensors in _CONVOLUTION.findall(program):
            if (name := text.decode()) in convolutions:
                seen.add(name)
                expected = convolutions[name]
                for kind in filter(None, map(types.get, tensors if expected != "int8" else tensors[1:])):
                    _check_type(kind.decode().upper(), expected, name, onnx_path)
    return len(seen)


def _check_type(kind: str, precision: Precision | None, name: str, onnx_path: Path) -> None:
    found = _PRECISIONS.get(kind, kind.lower())
    if found != precision if precision else found == "int8":
        wanted = precision or "floating point"
        raise BuildError(
            f"{onnx_path}: convolution {name!r} is in {found}, not {wanted} as asked: export it in {wanted}"
        )


def _add_profile(builder: Any, config: Any, network: Any, batch: tuple[int, int, int] | None, onnx_path: Path) -> None:
    count, *rest = network.get_input(0).shape
    if -1 in rest:
        raise BuildError(f"{onnx_path}: only the batch of 'image' may vary, but its shape is {(count, *rest)}")
    if count != -1:
        if batch is not None and set(batch) != {count}:
            raise ConfigError(f"batch {batch}: the model's batch is fixed at {count}")
        return
    if batch is None:
        raise ConfigError(f"{onnx_path}: its batch may vary, so the smallest, usual and largest batch are needed")
    if list(batch) != sorted(batch) or batch[0] < 1:
        raise ConfigError(f"batch {batch}: needs 1 <= smallest <= usual <= largest")
    profile = builder.create_optimization_profile()
    profile.set_shape("image", *((size, *rest) for size in batch))
    config.add_optimization_profile(profile)


def _load_timing_cache(config: Any, file: Path) -> None:
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise BuildError(f"{file}: timing cache of another GPU or library version; delete it, or name another file")


def _parse_error(parser: Any, log: Any) -> str:
    if not parser.num_errors:
        return str(log.last_error)
    error = parser.get_error(parser.num_errors - 1)
    lines = (line.strip() for line in error.desc().splitlines())
    reason = "; ".join(line for line in lines if line and not _is_missing_gpu(line))
    return f"node {error.node_name()!r} ({error.node_operator()}): {reason}" if error.node_operator() else reason


def _build_error(log: Any) -> str:
    reasons = [message for message in log.errors if not _is_missing_gpu(message)]
    return " ".join(reasons[-1].split()) if reasons else str(log.last_error)


def _is_missing_gpu(message: str) -> bool:
    """TensorRT-RTX follows each error on a machine without a GPU by one about that (cudaError 35 or 100)."""
    return "(cudaError 35:" in message or "(cudaError 100:" in message


def _create_monitor(library: Any, progress: Progress) -> Any:
    """An `IProgressMonitor` of `library` with a task of `progress` for each phase.

    The library may call it from several threads: `Progress` locks for itself, and one dictionary operation is atomic.
    """

    class Monitor(library.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._phases: dict[str, tuple[TaskID, int, int]] = {}  # phase -> task, depth, steps
            self._finished: list[TaskID] = []
            self._cancelled = threading.Event()

        def cancel(self) -> None:
            self._cancelled.set()

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            depth = self._phases[parent][1] + 1 if parent in self._phases else 0
            self._phases[phase] = progress.add_task(f"{'  ' * depth}{phase}", total=steps), depth, steps

        def step_complete(self, phase: str, step: int) -> bool:
            if phase in self._phases:
                progress.update(self._phases[phase][0], completed=step + 1)
            return not self._cancelled.is_set()

        def phase_finish(self, phase: str) -> None:
            task, depth, steps = self._phases.pop(phase)
            if depth:
                progress.remove_task(task)
            else:  # the library does not report the last steps of some phases
                progress.update(task, completed=steps)
                self._finished.append(task)

        def withdraw(self) -> None:
            """Remove all tasks of a failed build: the library finishes its phases in that case, too."""
            for task in [*self._finished, *(task for task, _, _ in self._phases.values())]:
                progress.remove_task(task)

    return Monitor()
