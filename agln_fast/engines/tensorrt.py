"""Kinds `tensorrt` and `tensorrt-rtx`. The two libraries share one Python API but for a few calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

from agln_fast.artefact import Artefact
from agln_fast.cuda import compute_capability
from agln_fast.engines.base import Array, Engine, EngineKind, Port, Workbench, check_ports
from agln_fast.errors import BackendError
from agln_fast.plan.plan import NO_PLAN, Plan
from agln_fast.precision import Precision
from agln_fast.tensorrt_library import RTX_CAPABILITIES, Flavour, import_library, library_version, shared_logger

__all__ = ["TensorRT", "TensorRTEngine", "TensorRTRTX", "TensorRTRTXEngine"]

_REBUILD = "build it again from the bundle's own weights with `agln-fast rebuild`"
_TYPES = {"UINT8": "uint8", "INT32": "int32", "FLOAT": "float32"}


class TensorRT(EngineKind):
    """An engine runs with the very version of TensorRT and on the compute capability that it was built for."""

    name: ClassVar[Flavour] = "tensorrt"
    precisions = ("fp32", "fp16", "bf16")
    devices = ("cuda",)
    package = extra = target = "tensorrt"
    plans = "cost model"
    settings = "strongly typed"
    suffix = "trt"

    def automatic(self) -> tuple[Precision, ...]:
        return ("fp16",)

    def suits(self, plan: Plan, precision: Precision) -> Plan:
        # It has convolutions of Winograd's kind of its own, and is served as it is: nobody makes labels of logits.
        return replace(plan, winograd=0, low_resolution_labels=False)

    def versions(self, precision: Precision) -> dict[str, str]:
        version = library_version(self.name)
        return {} if version is None else {self.name: version}

    def missing(self) -> str | None:
        try:
            import_library(self.name)
        except BackendError as error:
            return str(error)
        return None

    def _obstacle(self, precision: Precision, where: str) -> str | None:
        return "no CUDA device is present" if compute_capability() is None else None

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
            return f"no CUDA device is present, and it needs a GPU of {built_for}"
        if present not in artefact.compute_capabilities:
            target = self.name if present in RTX_CAPABILITIES else "tensorrt"
            return f"built for {built_for}, but this GPU is {present}: {_build_for(target)}"
        return super().obstacle_to(artefact, device)

    def check_make(self, precision: Precision, compute_capabilities: Sequence[str] = ()) -> None:
        self._capabilities(compute_capabilities)

    def _capabilities(self, asked: Sequence[str]) -> tuple[str, ...]:
        """What an engine is built for; `asked` is for tensorrt-rtx alone."""
        from agln_fast.export.tensorrt import resolve_capabilities

        return resolve_capabilities(self.name)

    def make(self, bench: Workbench, precision: Precision, plan: Plan = NO_PLAN) -> Artefact:
        from agln_fast.export.tensorrt import build_tensorrt_engine

        contract = bench.contract
        capabilities = self._capabilities(bench.compute_capabilities)
        ends = contract.min_batch, contract.max_batch, contract.max_batch  # smallest, usual, largest
        file = bench.file(
            f"model.{precision}.{self.suffix}.engine",
            (self.name, precision, plan),
            lambda path: build_tensorrt_engine(
                bench.graph(precision, plan),
                path,
                flavour=self.name,
                precision=precision,
                compute_capabilities=capabilities,
                batch=None if contract.min_batch == contract.max_batch else ends,
                workspace_bytes=bench.workspace_bytes,
                timing_cache=bench.timing_cache if self.name == "tensorrt" else None,
                progress=bench.progress,
            ),
        )
        return self.artefact(bench, precision, plan, file, capabilities)

    def open(self, artefact: Artefact, *, device: str | None = None, threads: int | None = None) -> Engine:
        return TensorRTEngine(artefact, device)


class TensorRTRTX(TensorRT):
    """One engine for several compute capabilities; its kernels are compiled when it is opened."""

    name: ClassVar[Flavour] = "tensorrt-rtx"
    package = extra = target = "tensorrt-rtx"
    suffix = "rtx"

    def _capabilities(self, asked: Sequence[str]) -> tuple[str, ...]:
        from agln_fast.export.tensorrt import resolve_capabilities

        return resolve_capabilities(self.name, asked)

    def open(self, artefact: Artefact, *, device: str | None = None, threads: int | None = None) -> Engine:
        return TensorRTRTXEngine(artefact, device)


class TensorRTEngine(Engine):
    """An opened engine; threads have no meaning on a GPU."""

    name: ClassVar[Flavour] = "tensorrt"

    def __init__(self, artefact: Artefact, device: str | None) -> None:
        import torch

        index = _device_index(device)
        library = import_library(self.name)
        contract = artefact.contract
        self._log = shared_logger(library)
        self._torch_device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self.device = str(self._torch_device)
        self.precision = artefact.precision
        self._output = contract.output
        with torch.cuda.device(self._torch_device):
            self._runtime = library.Runtime(self._log)
            self._engine = self._deserialize(library, artefact, artefact.read(artefact.file))
            modes = library.TensorIOMode
            check_ports(artefact, self._ports(modes.INPUT), self._ports(modes.OUTPUT))
            self._context = self._create_context(library)
            if self._context is None:
                raise BackendError(f"engine {artefact.name!r}: no execution context: {self._log.last_error}")
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._buffers: dict[str, tuple[Any, Any]] = {}
            image_shape = (contract.max_batch, *contract.input_shape[1:])
            self._allocate("image", image_shape)
            self._context.set_input_shape("image", image_shape)
            self._allocate(self._output, tuple(self._context.get_tensor_shape(self._output)))

    def _deserialize(self, library: Any, artefact: Artefact, data: bytes) -> Any:
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise BackendError(
                f"engine {artefact.name!r}: {library.__name__} refuses {artefact.file}: {self._log.last_error}"
            )
        return engine

    def _ports(self, mode: Any) -> list[Port]:
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        return [self._port(name) for name in names if self._engine.get_tensor_mode(name) == mode]

    def _port(self, name: str) -> Port:
        kind = self._engine.get_tensor_dtype(name).name
        shape = [None if side < 0 else int(side) for side in self._engine.get_tensor_shape(name)]
        return Port(name, _TYPES.get(kind, kind), shape)

    def _create_context(self, library: Any) -> Any:
        return self._engine.create_execution_context()

    def _allocate(self, name: str, shape: tuple[Any, ...]) -> None:
        """Pinned host memory and device memory for the tensor `name` at its largest `shape`."""
        import torch

        dtype = getattr(torch, _TYPES[self._engine.get_tensor_dtype(name).name])
        on_device = torch.empty(shape, dtype=dtype, device=self._torch_device)
        self._context.set_tensor_address(name, on_device.data_ptr())
        self._buffers[name] = torch.empty(shape, dtype=dtype, pin_memory=True), on_device

    def _run(self, image: Array) -> Array:
        import torch

        source = torch.from_numpy(image)
        host_image, device_image = self._buffers["image"]
        host_result, device_result = self._buffers[self._output]
        count = len(source)
        # Tensors are packed: a smaller batch fills the first rows of buffers that were made for the largest.
        with torch.cuda.device(self._torch_device), torch.cuda.stream(self._stream):
            if source.dtype != host_image.dtype or not self._context.set_input_shape("image", tuple(source.shape)):
                raise BackendError(
                    f"image of {source.dtype} {tuple(source.shape)}: the engine takes {host_image.dtype} "
                    f"{tuple(host_image.shape)}, or a smaller batch where it was built for one"
                )
            host_image[:count].copy_(source)
            device_image[:count].copy_(host_image[:count], non_blocking=True)
            if not self._context.execute_async_v3(self._stream.cuda_stream):
                raise BackendError(f"{self.name} did not run the engine: {self._log.last_error}")
            host_result[:count].copy_(device_result[:count], non_blocking=True)
            self._stream.synchronize()
        return cast(Array, host_result[:count].numpy().copy())

    def _release(self) -> None:
        # A context must go before its engine, and an engine before its runtime.
        self._context = None
        self._engine = None
        self._runtime = None
        self._buffers.clear()


class TensorRTRTXEngine(TensorRTEngine):
    """An opened engine, whose kernels were compiled for this GPU on opening."""

    name: ClassVar[Flavour] = "tensorrt-rtx"

    def _deserialize(self, library: Any, artefact: Artefact, data: bytes) -> Any:
        validity, diagnostics = self._runtime.get_engine_validity(data[: self._runtime.engine_header_size])
        if validity == library.EngineValidity.INVALID:
            known = library.EngineInvalidityDiagnostics.__members__.items()
            reasons = [name.lower().replace("_", " ") for name, bit in known if diagnostics & int(bit)]
            raise BackendError(
                f"engine {artefact.name!r}: tensorrt_rtx refuses {artefact.file} "
                f"({', '.join(reasons) or self._log.last_error}): {_REBUILD}"
            )
        return super()._deserialize(library, artefact, data)

    def _create_context(self, library: Any) -> Any:
        config = self._engine.create_runtime_config()
        # By default a new batch size first runs on slower general kernels while its own are compiled in the
        # background, so that the same call takes different times.
        strategies = library.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return self._engine.create_execution_context(config)


def _build_for(target: str) -> str:
    return f"build it again with `agln-fast build ... --target {target}`"


def _device_index(device: str | None) -> int | None:
    """The index in a device string such as "cuda:1"; None for the current device."""
    if device is None:
        return None
    import torch

    try:
        parsed = torch.device(device)
    except RuntimeError:
        parsed = None
    if parsed is None or parsed.type != "cuda":
        raise BackendError(f"device {device!r}: TensorRT engines run on CUDA devices only, such as 'cuda:0'")
    if parsed.index is not None and torch.cuda.is_available() and parsed.index >= torch.cuda.device_count():
        raise BackendError(f"device {device!r}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return parsed.index
