"""Kinds `tensorrt` and `tensorrt-rtx`. The two libraries share one Python API but for a few calls."""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar, cast

from agln_fast import cuda
from agln_fast.artefact import LAYERS_FILE, Artefact
from agln_fast.cuda import Device, Graph, Stream, TwinBuffer, compute_capability, device_count, has_bindings
from agln_fast.engines.base import Array, Engine, EngineKind, Port, Workbench, check_ports
from agln_fast.engines.openvino import quantised_graph
from agln_fast.environment import cache_folder
from agln_fast.errors import BackendError, MissingPackageError
from agln_fast.memory import recall_bytes, remember_bytes
from agln_fast.plan.plan import NO_PLAN, Plan
from agln_fast.precision import Precision
from agln_fast.tensorrt_library import (
    RTX_CAPABILITIES,
    Flavour,
    import_library,
    library_version,
    load_layers,
    shared_logger,
)

__all__ = ["TensorRT", "TensorRTEngine", "TensorRTRTX", "TensorRTRTXEngine"]

_REBUILD = "build it again from the bundle's own weights with `agln-fast rebuild`"
_PROGRAMS = 4  # batch sizes that are kept ready; the library gives each the memory of the largest
_logger = logging.getLogger("agln_fast.tensorrt")
_TYPES = {"UINT8": "uint8", "INT32": "int32", "FLOAT": "float32"}


class TensorRT(EngineKind):
    """An engine runs with the very version of TensorRT and on the compute capability that it was built for.

    What is not quantised of an int8 one is fp16.
    """

    name: ClassVar[Flavour] = "tensorrt"
    precisions = ("fp32", "fp16", "bf16", "int8")
    devices = ("cuda",)
    package = extra = target = "tensorrt"
    plans = "cost model"
    settings = "strongly typed"
    takes_kernels = has_timing_cache = True
    suffix = "trt"

    def automatic(self) -> tuple[Precision, ...]:
        return ("fp16",)

    def graph_type(self, precision: Precision) -> Precision:
        return "fp16" if precision == "int8" else precision

    def timed_in(self, precision: Precision) -> Precision:
        return self.graph_type(precision)

    def suits(self, plan: Plan, precision: Precision) -> Plan:
        # It has convolutions of Winograd's kind of its own, and is served as it is: nobody makes labels of logits.
        return replace(plan, winograd=0, low_resolution_labels=False)

    def seconds_to_make(self, precision: Precision, parameters: int, image_s: float) -> float:
        return 3 + 1e-7 * parameters

    def versions(self, precision: Precision) -> dict[str, str]:
        version = library_version(self.name)
        return {} if version is None else {self.name: version}

    def missing(self) -> str | None:
        try:
            import_library(self.name)
        except BackendError as error:
            return str(error)
        # To build, it is not needed.
        return None if has_bindings() else str(MissingPackageError("cuda.bindings", self.extra))

    def _obstacle(self, precision: Precision, where: str) -> str | None:
        return cuda.obstacle()

    def obstacle_to(self, artefact: Artefact, device: str | None = None) -> str | None:
        if reason := self.missing():
            return reason
        version, built_with = library_version(self.name), artefact.versions.get(self.name, "an unknown version")
        if version != built_with:
            return f"built with {self.name} {built_with}, but {version} is installed: {_REBUILD}"
        built_for = ", ".join(artefact.compute_capabilities)
        try:
            present = compute_capability(_device_index(device))
        except BackendError as error:
            return str(error)
        if present is None:
            return f"{cuda.obstacle()}, and it needs a GPU of {built_for}"
        if present not in artefact.compute_capabilities:
            target = self.name if present in RTX_CAPABILITIES else "tensorrt"
            return f"built for {built_for}, but this GPU is {present}: {_build_for(target)}"
        return super().obstacle_to(artefact, device)

    def check_make(self, precision: Precision, compute_capabilities: Sequence[str] = ()) -> None:
        self._capabilities(compute_capabilities)
        for package in ("onnxruntime", "openvino") if precision == "int8" else ():  # one quantises, one shows the cost
            if find_spec(package) is None:
                raise MissingPackageError(package, "int8")

    def _capabilities(self, asked: Sequence[str]) -> tuple[str, ...]:
        """What an engine is built for; `asked` is for tensorrt-rtx alone."""
        from agln_fast.export.tensorrt import resolve_capabilities

        return resolve_capabilities(self.name)

    def trial(self, bench: Workbench, plan: Plan, floating: Collection[str] = ()) -> Artefact:
        return quantised_graph(bench, self.graph_type("int8"), plan, floating)

    def make(
        self, bench: Workbench, precision: Precision, plan: Plan = NO_PLAN, floating: Collection[str] = ()
    ) -> Artefact:
        if plan.kernels:
            return self._make_with_layers(bench, precision, plan)
        from agln_fast.export.convolutions import convolution_blocks
        from agln_fast.export.tensorrt import build_tensorrt_engine

        contract = bench.contract
        capabilities = self._capabilities(bench.compute_capabilities)
        ends = contract.min_batch, contract.max_batch, contract.max_batch  # smallest, usual, largest
        kept = tuple(sorted(floating))

        def write(path: Path) -> None:
            graph = bench.graph(self.graph_type(precision), plan)
            blocks = convolution_blocks(graph) if kept else {}
            build_tensorrt_engine(
                self.trial(bench, plan, kept).file if precision == "int8" else graph,
                path,
                flavour=self.name,
                precision=precision,
                floating=[name for name, block in blocks.items() if block in kept],
                compute_capabilities=capabilities,
                batch=None if contract.min_batch == contract.max_batch else ends,
                workspace_bytes=bench.workspace_bytes,
                timing_cache=bench.timing_cache if self.has_timing_cache else None,
                progress=bench.progress,
            )

        file = bench.file(f"model.{precision}.{self.suffix}.engine", (self.name, precision, plan, kept), write)
        return self.artefact(bench, precision, plan, file, capabilities, kept)

    def _make_with_layers(self, bench: Workbench, precision: Precision, plan: Plan) -> Artefact:
        from agln_fast.export.plugins import library
        from agln_fast.export.tensorrt_layers import build_engine_with_layers

        contract = bench.contract
        capabilities = self._capabilities(bench.compute_capabilities)

        def write(path: Path) -> None:
            build_engine_with_layers(
                bench.graph(precision, plan),
                path,
                flavour=self.name,
                precision=precision,
                batch=(contract.min_batch, contract.max_batch),
                compute_capabilities=capabilities,
                workspace_bytes=bench.workspace_bytes,
                timing_cache=bench.timing_cache if self.has_timing_cache else None,
            )
            shutil.copyfile(library(), path.with_name(LAYERS_FILE))

        name = f"model.{precision}.kernels.{self.suffix}.engine"
        file = bench.file(name, (self.name, precision, plan), write)
        return self.artefact(bench, precision, plan, file, capabilities)

    def open(self, artefact: Artefact, *, device: str | None = None, threads: int | None = None) -> Engine:
        return TensorRTEngine(artefact, device)


class TensorRTRTX(TensorRT):
    """One engine for several compute capabilities; its kernels are compiled when it is opened."""

    name: ClassVar[Flavour] = "tensorrt-rtx"
    package = extra = target = "tensorrt-rtx"
    suffix = "rtx"
    chooses_capabilities = True
    has_timing_cache = False

    def _capabilities(self, asked: Sequence[str]) -> tuple[str, ...]:
        from agln_fast.export.tensorrt import resolve_capabilities

        return resolve_capabilities(self.name, asked)

    def open(self, artefact: Artefact, *, device: str | None = None, threads: int | None = None) -> Engine:
        return TensorRTRTXEngine(artefact, device)


class TensorRTEngine(Engine):
    """An opened engine; threads have no meaning on a GPU.

    For each batch size there is an execution context, and a CUDA graph from the image in page-locked memory to the
    result there: what was captured of a context does not survive its change of shape.
    """

    name: ClassVar[Flavour] = "tensorrt"
    _remedy = ""

    def __init__(self, artefact: Artefact, device: str | None) -> None:
        library = import_library(self.name)
        contract = artefact.contract
        self._library = library
        self._log = shared_logger(library)
        self.precision = artefact.precision
        self._contract = contract
        self._programs: OrderedDict[int, _Program] = OrderedDict()
        self._resources = ExitStack()
        self._device = Device(_device_index(device))
        self.device = f"cuda:{self._device.index}"
        try:
            with self._device.current():
                self._stream = Stream()
                self._resources.callback(self._stream.close)
                self._open(artefact)
        except BaseException:
            self.close()
            raise

    def __del__(self) -> None:
        # Nothing else frees what the driver gave. At the end of Python, its modules may be gone before this is.
        with suppress(Exception):
            self.close()

    def _open(self, artefact: Artefact) -> None:
        """Everything but what depends on the batch size."""
        contract, modes = self._contract, self._library.TensorIOMode
        if artefact.plan.kernels:
            *_, layers = artefact.files
            load_layers(self._library, artefact.read(layers))
        self._runtime = self._library.Runtime(self._log)
        self._engine = self._deserialize(artefact, artefact.read(artefact.file))
        inputs, outputs = self._ports(modes.INPUT), self._ports(modes.OUTPUT)
        check_ports(artefact, inputs, outputs)
        # `check_ports` has compared them with the engine's.
        most, size = contract.max_batch, (contract.height, contract.width)
        classes = (artefact.model.num_classes,) if contract.output == "logits" else ()
        self._image = TwinBuffer((most, *map(int, contract.input_shape[1:])), inputs[0].dtype)
        self._resources.callback(self._image.close)
        self._result = TwinBuffer((most, *classes, *size), outputs[0].dtype)
        self._resources.callback(self._result.close)

    def _deserialize(self, artefact: Artefact, data: bytes) -> Any:
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BackendError(
                f"engine {artefact.name!r}: {self._library.__name__} refuses {artefact.file}: {self._log.last_error}"
            )
        return engine

    def _ports(self, mode: Any) -> list[Port]:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        return [self._port(name) for name in names if self._engine.get_tensor_mode(name) == mode]

    def _port(self, name: str) -> Port:
        kind = self._engine.get_tensor_dtype(name).name
        shape = [None if side < 0 else int(side) for side in self._engine.get_tensor_shape(name)]
        return Port(name, _TYPES.get(kind, kind), shape)

    def _bind(self, program: _Program, count: int) -> None:
        """Give it a context for `count` images between the engine's buffers."""
        program.context = self._create_context()
        if program.context is None:
            raise BackendError(f"{self.name}: create_execution_context failed: {self._log.last_error}")
        if not program.context.set_input_shape("image", (count, *self._contract.input_shape[1:])):
            raise BackendError(f"{self.name}: set_input_shape refused a batch of {count}: {self._log.last_error}")
        for port, buffer in (("image", self._image), (self._contract.output, self._result)):
            if not program.context.set_tensor_address(port, buffer.address):
                raise BackendError(f"{self.name}: set_tensor_address refused {port}: {self._log.last_error}")

    def _create_context(self) -> Any:
        return self._engine.create_execution_context()

    def _run(self, image: Array) -> Array:
        self._check(image)
        count = len(image)
        with self._device.current():
            # Tensors are packed: a smaller batch fills the first rows of buffers that were made for the largest.
            self._image.host[:count] = image
            try:
                program = self._programs.pop(count, None) or self._prepare(count)
                self._programs[count] = program
                assert program.run is not None
                program.run()
                self._stream.synchronize()
            except BaseException:
                with suppress(BackendError):  # nothing is freed, or written again, under work that goes on
                    self._stream.synchronize()
                raise
            return cast(Array, self._result.host[:count].copy())

    def _check(self, image: Array) -> None:
        contract = self._contract
        _, *wanted = contract.input_shape
        fits = image.ndim == 4 and contract.min_batch <= len(image) <= contract.max_batch
        if image.dtype != self._image.host.dtype or not fits or list(image.shape[1:]) != wanted:
            batch = f"{contract.min_batch} to {contract.max_batch}"
            raise BackendError(
                f"image of {image.dtype} {image.shape}: the engine takes {self._image.host.dtype} "
                f"({batch if contract.min_batch < contract.max_batch else contract.max_batch}, "
                f"{', '.join(map(str, wanted))})"
            )

    def _prepare(self, count: int) -> _Program:
        """The program for `count` images, whose image is there; the one used least recently makes room."""
        while len(self._programs) >= _PROGRAMS:
            self._programs.popitem(last=False)[1].close()
        program = _Program()
        try:
            self._bind(program, count)
            program.run = partial(self._enqueue, program, count)
            program.run()  # what is compiled or allocated at the first run is no part of a graph
            self._stream.synchronize()
            self._after_first_run()
            try:
                program.run = program.graph = self._stream.capture(program.run)
            except BackendError as error:
                _logger.warning("batch of %d runs without a CUDA graph: %s%s", count, str(error), self._remedy)
        except BaseException:
            program.close()  # or whoever keeps the exception keeps the context, which must not outlive the engine
            raise
        return program

    def _enqueue(self, program: _Program, count: int) -> None:
        self._image.upload(self._stream, count)
        if not program.context.execute_async_v3(self._stream.address):
            raise BackendError(f"{self.name}: execute_async_v3 failed: {self._log.last_error}")
        self._result.download(self._stream, count)

    def _after_first_run(self) -> None:
        """What a batch size brought along may be kept now."""

    def _release(self) -> None:
        # A context must go before its engine, and an engine before its runtime; what the device has lost is gone.
        with suppress(BackendError), ExitStack() as stack:
            stack.enter_context(self._device.current())
            stack.callback(self._resources.close)
            stack.callback(self._forget)
            for program in self._programs.values():
                stack.callback(program.close)
            self._programs.clear()
            if hasattr(self, "_stream"):
                stack.callback(self._stream.synchronize)  # first

    def _forget(self) -> None:
        self._engine = self._runtime = None


@dataclass
class _Program:
    """The engine for one batch size: `run` goes from host to host on the engine's stream."""

    context: Any = None
    run: Callable[[], None] | None = None
    graph: Graph | None = None

    def close(self) -> None:
        try:
            if self.graph is not None:
                self.graph.close()
        finally:
            self.context = self.run = self.graph = None


class TensorRTRTXEngine(TensorRTEngine):
    """An opened engine, whose kernels are compiled for this GPU on opening, and remembered in the cache folder."""

    name: ClassVar[Flavour] = "tensorrt-rtx"
    _remedy = "; an engine built by an older agln-fast may become one that can with `agln-fast rebuild`"

    def _deserialize(self, artefact: Artefact, data: bytes) -> Any:
        library = self._library
        validity, diagnostics = self._runtime.get_engine_validity(data[: self._runtime.engine_header_size])
        if validity == library.EngineValidity.INVALID:
            known = library.EngineInvalidityDiagnostics.__members__.items()
            reasons = [name.lower().replace("_", " ") for name, bit in known if diagnostics & int(bit)]
            raise BackendError(
                f"engine {artefact.name!r}: tensorrt_rtx refuses {artefact.file} "
                f"({', '.join(reasons) or self._log.last_error}): {_REBUILD}"
            )
        engine = super()._deserialize(artefact, data)
        self._config = engine.create_runtime_config()
        # By default a new batch size first runs on slower general kernels while its own are compiled in the
        # background, so that the same call takes different times.
        strategies = library.DynamicShapesKernelSpecializationStrategy
        self._config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self._config.cuda_graph_strategy = library.CudaGraphStrategy.DISABLED  # ours holds the copies, too
        facts = repr([cuda.device_identity(self._device.index), library.__version__]).encode()
        self._file = cache_folder() / self.name / f"{hashlib.sha256(data + facts).hexdigest()[:32]}.cache"
        self._kernels = self._config.create_runtime_cache()
        self._kept = recall_bytes(self._file)
        if self._kept and not self._kernels.deserialize(self._kept):
            _logger.warning("%s: compiled kernels of another machine or version, or damaged; made anew", self._file)
            self._kept = b""
        self._config.set_runtime_cache(self._kernels)
        return engine

    def _create_context(self) -> Any:
        return self._engine.create_execution_context(self._config)

    def _after_first_run(self) -> None:
        serialized = self._kernels.serialize()
        kernels = b"" if serialized is None else bytes(serialized)
        if kernels not in (b"", self._kept):
            remember_bytes(self._file, kernels)
            self._kept = kernels

    def _forget(self) -> None:
        super()._forget()
        self._config = self._kernels = None  # the contexts, which are gone, used them


def _build_for(target: str) -> str:
    return f"build it again with `agln-fast build ... --target {target}`"


def _device_index(device: str | None) -> int:
    """The index in a device string such as "cuda:1"; 0, the first, for "cuda" and None.

    Raises:
        BackendError: another kind of device, or one that is not there.
    """
    kind, _, index = (device or "cuda").partition(":")
    if kind != "cuda":
        raise BackendError(f"device {device!r}: TensorRT engines run on CUDA devices only, such as 'cuda:0'")
    count, number = device_count(), int(index or 0)
    if 0 < count <= number:
        raise BackendError(f"device {device!r}: this machine has {count} CUDA device(s)")
    return number
