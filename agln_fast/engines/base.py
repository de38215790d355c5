"""What a kind of engine is, and what an opened one does: the two small interfaces behind all inference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Hashable, Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from agln_fast.artefact import Artefact
from agln_fast.contract import IOContract
from agln_fast.decode import decode, labels_dtype
from agln_fast.engines.gate import Gate, keep_after_fork
from agln_fast.errors import BackendError, BundleError, MissingPackageError
from agln_fast.machine import installed
from agln_fast.manifest import REBUILD
from agln_fast.models.config import ModelConfig
from agln_fast.plan.blocks import blocks_of
from agln_fast.plan.plan import ALGEBRA, NO_PLAN, Plan
from agln_fast.precision import Precision

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = [
    "CALIBRATION",
    "Array",
    "Engine",
    "EngineKind",
    "Port",
    "Workbench",
    "as_promised",
    "block_tensors",
    "check_ports",
    "ports_of",
]

Array = npt.NDArray[np.generic]

CALIBRATION = 128
"""Pictures to quantise by, where there are enough of them."""


class Workbench(Protocol):
    """What `EngineKind.make` works with: the files of one network behind one contract, each made once.

    compute_capabilities, workspace_bytes, timing_cache: as asked of `agln_fast.build`. progress: for long work.
    """

    @property
    def contract(self) -> IOContract: ...
    @property
    def model(self) -> ModelConfig: ...
    @property
    def compute_capabilities(self) -> Sequence[str]: ...
    @property
    def workspace_bytes(self) -> int | None: ...
    @property
    def timing_cache(self) -> Path | None: ...
    @property
    def progress(self) -> Progress | None: ...

    def weights(self) -> Path:
        """The weights as safetensors."""

    def graph(self, kind: Precision, plan: Plan) -> Path:
        """The ONNX file of the network, rewritten as `plan` says, with weights of type `kind`."""

    def calibration(self) -> Sequence[Array]:
        """Batches of pictures to quantise by, as the contract describes them."""

    def file(self, name: str, key: Hashable, write: Callable[[Path], object]) -> Path:
        """The file that `write` writes, called `name` in a bundle; it is written when `key` is first asked for."""

    def discard(self, artefact: Artefact) -> None:
        """Delete what was made to be measured, and not to be kept."""


class EngineKind(ABC):
    """All that there is to know of one way to run a network: add an instance to `agln_fast.engines.KINDS`.

    Looking at one loads no library.

    name: of the backend. precisions, devices: what it runs in, and on: "cpu", "cuda".
    package: the distribution that it needs; extra: that of agln-fast which installs it.
    target: what makes `build` make one, "cpu" or a target of its own; None for what comes with every bundle alone.
    plans: how its rewrites are chosen: by "timing" on this machine, by a "cost model" of a GPU, or "fixed": not at all.
    start: the plan from which a search goes on, good everywhere.
    settings: what it is told, for readers of measurements.
    takes_kernels: whether an engine may have kernels of ours as layers.
    chooses_capabilities: whether it can be made for compute capabilities that are asked for.
    has_timing_cache: whether making it reads and updates one.
    """

    name: ClassVar[str]
    precisions: ClassVar[tuple[Precision, ...]]
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    package: ClassVar[str] = ""
    extra: ClassVar[str] = ""
    target: ClassVar[str | None] = "cpu"
    plans: ClassVar[Literal["timing", "cost model", "fixed"]] = "fixed"
    start: ClassVar[Plan] = ALGEBRA
    settings: ClassVar[str] = ""
    takes_kernels: ClassVar[bool] = False
    chooses_capabilities: ClassVar[bool] = False
    has_timing_cache: ClassVar[bool] = False

    @property
    def module(self) -> str:
        """The name under which its package is imported."""
        return self.package.replace("-", "_")

    def automatic(self) -> tuple[Precision, ...]:
        """What precision "auto" stands for on this machine."""
        return self.precisions[:1]

    def graph_type(self, precision: Precision) -> Precision | None:
        """The type of the ONNX file that an engine is made of; None: of the weights themselves.

        The latter comes with every bundle, in fp32.
        """
        return precision

    def suits(self, plan: Plan, precision: Precision) -> Plan:
        """`plan` without what does not suit an engine of this kind.

        Winograd's sums are for fp32: below it they cost labels, and int8 would not be quantised. Libraries have no
        kernels of ours.
        """
        return replace(plan, kernels=False, winograd=plan.winograd if precision == "fp32" else 0)

    def timed_in(self, precision: Precision) -> Precision:
        """The precision in which plans for `precision` are timed."""
        return precision

    def seconds_to_make(self, precision: Precision, parameters: int, image_s: float) -> float:
        """About what an engine takes to make of its graph, to tell users how long: of a network of so many
        `parameters`, which as it is takes `image_s` seconds for an image."""
        return 0.0

    def default_device(self) -> str:
        """Where an engine opens when no device is asked for: "cpu", or "cuda"."""
        return self.devices[0]

    def packages(self, precision: Precision) -> tuple[str, ...]:
        """The distributions that make an engine, and run it."""
        return (self.package,) if self.package else ()

    def versions(self, precision: Precision) -> dict[str, str]:
        """Those of `packages` that are installed, with their versions."""
        found = {package: installed(package) for package in self.packages(precision)}
        return {package: number for package, number in found.items() if number is not None}

    def missing(self) -> str | None:
        """Why its package cannot be used and what to do about it, or None."""
        if not self.package or find_spec(self.module) is not None:
            return None
        return str(MissingPackageError(self.module, self.extra))

    def obstacle(self, precision: Precision, device: str | None = None) -> str | None:
        """Why nothing runs in `precision` on this machine's `device` (None: the default), and what to do, or None.

        Opens nothing.
        """
        if precision not in self.precisions:
            return f"{self.name} has no {precision}: it runs in {', '.join(self.precisions)}"
        where = (device or self.default_device()).partition(":")[0]
        if where not in self.devices:
            return f"{self.name} runs on {' and '.join(self.devices)}, not on {device}"
        return self.missing() or self._obstacle(precision, where)

    def _obstacle(self, precision: Precision, where: str) -> str | None:
        """As `obstacle`, where all facts fit and the package is there; `where` is "cpu" or "cuda"."""
        return None

    def obstacle_to(self, artefact: Artefact, device: str | None = None) -> str | None:
        """As `obstacle`, for this very artefact."""
        return self.obstacle(artefact.precision, device)

    def check_make(self, precision: Precision, compute_capabilities: Sequence[str] = ()) -> None:
        """Refuse what `make` could not do here, before any work; `compute_capabilities` are those asked for.

        Raises:
            ConfigError, MissingPackageError, BuildError: it could not.
        """
        return

    def trial(self, bench: Workbench, plan: Plan, floating: Collection[str] = ()) -> Artefact:
        """What computes as an int8 engine would, on any CPU, and is quickly made: to see what int8 costs."""
        raise NotImplementedError(f"{self.name} has no int8")

    @abstractmethod
    def make(
        self, bench: Workbench, precision: Precision, plan: Plan = NO_PLAN, floating: Collection[str] = ()
    ) -> Artefact:
        """Make what an engine is opened from.

        `floating` are blocks of the network that an int8 engine computes in floating point.

        Raises:
            BuildError, MissingPackageError: it cannot be made; see `check_make`.
        """

    @abstractmethod
    def open(self, artefact: Artefact, *, device: str | None = None, threads: int | None = None) -> Engine:
        """Open what `make` made; `obstacle_to` found nothing in the way.

        Args:
            device: "cpu", "cuda" or "cuda:1"; None for the engine's own.
            threads: intra-op CPU threads; None for the library's default.

        Raises:
            BackendError: it cannot run here, or not on that device, or not in the artefact's precision.
            BundleError: the file is not what the artefact says.
        """

    def blocks(
        self, artefact: Artefact, images: Iterable[Array], *, device: str | None = None, threads: int | None = None
    ) -> Generator[dict[str, Array], None, None]:
        """What each block gives for each batch: its name (`agln_fast.plan.blocks.blocks_of`) -> floating-point values.

        A block without a tensor of its own in what `artefact` was compiled from is missing. To give more than it was
        made to give, a library may compile another graph, whose fusions differ.

        Raises:
            BackendError: this kind cannot tell, or the file is of before blocks had names; or as `open`.
            BundleError: as `open`.
        """
        raise BackendError(f"{artefact.name}: an engine of {self.name} is compiled, and shows nothing of its inside")

    def engine_name(self, precision: Precision, plan: Plan) -> str:
        """What an engine is called, e.g. "tensorrt-rtx-fp16-kernels"."""
        return f"{self.name}-{precision}{'-kernels' * plan.kernels}"

    def artefact(
        self,
        bench: Workbench,
        precision: Precision,
        plan: Plan,
        file: Path,
        compute_capabilities: tuple[str, ...] = (),
        floating: Collection[str] = (),
    ) -> Artefact:
        """What `make` returns, of the file that it made."""
        return Artefact(
            name=self.engine_name(precision, plan),
            kind=self.name,
            precision=precision,
            file=file,
            contract=bench.contract,
            model=bench.model,
            plan=plan,
            versions=self.versions(precision),
            compute_capabilities=compute_capabilities,
            floating=tuple(floating),
        )


def as_promised(output: Array, artefact: Artefact) -> Array:
    """What the contract promises of what an engine's graph gives, which are the logits before the last resize if its
    plan has `low_resolution_labels`."""
    contract = artefact.contract
    if contract.output == "logits" or not artefact.plan.low_resolution_labels:
        return output
    size, aligned = (contract.height, contract.width), bool(artefact.model.align_corners)
    return np.stack([decode(logits, size, align_corners=aligned) for logits in output])


def block_tensors(artefact: Artefact, tensors: Collection[str]) -> dict[str, str]:
    """Name of each block -> name of the tensor that it gives, of a graph with `tensors`, which `export_onnx` wrote.

    A block's tensor has its name, unless it is the output: that is called "logits" also before the last resize.

    Raises:
        BackendError: the graph is of before blocks had names.
    """
    found = {block.name: block.name for block in blocks_of(artefact.model) if block.name in tensors}
    if not found.keys() - {"logits"}:
        raise BackendError(f"{artefact.file}: its blocks have no names: {REBUILD}")
    if artefact.contract.output == "labels" and artefact.plan.low_resolution_labels:
        found.setdefault("classifier", found.pop("logits"))
    return found


class Port(NamedTuple):
    """An input or output of an engine's file, as its library tells: a side that is no number may be any."""

    name: str
    dtype: str
    shape: Sequence[int | str | None]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join(str(side) for side in self.shape)})"

    def serves(self, wanted: Port) -> bool:
        """Whether it takes or gives all that `wanted` stands for."""
        if self[:2] != wanted[:2] or len(self.shape) != len(wanted.shape):
            return False
        sides = zip(self.shape, wanted.shape, strict=True)
        return all(has == side or side is None or not isinstance(has, int) for has, side in sides)


def ports_of(artefact: Artefact) -> tuple[Port, Port]:
    """What an engine's file takes and gives, by what the manifest says of it; a side that is None may be any."""
    contract, classes = artefact.contract, artefact.model.num_classes
    batch, size = contract.input_shape[0], (contract.height, contract.width)
    image = Port("image", "uint8" if contract.layout == "uint8_nhwc" else "float32", contract.input_shape)
    if contract.output == "logits":
        return image, Port("logits", "float32", (batch, classes, *size))
    if artefact.plan.low_resolution_labels:
        return image, Port("logits", "float32", (batch, classes, None, None))
    return image, Port("labels", labels_dtype(classes), (batch, *size))


def check_ports(artefact: Artefact, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    """Compare what an engine's file takes and gives with what the manifest says of it.

    Raises:
        BundleError: they differ.
    """
    image, result = ports_of(artefact)
    for verb, found, wanted in (("takes", inputs, image), ("gives", outputs, result)):
        if len(found) != 1 or not found[0].serves(wanted):
            told = ", ".join(map(str, found))
            raise BundleError(f"{artefact.file}: {verb} {told}, and the manifest says {wanted}; build the bundle again")


class Engine(ABC):
    """One opened engine: `run` it, and `close` it; or use it in a `with` statement.

    `device` and `precision` say what really runs, read back from the library where it can tell. An engine never falls
    back: what cannot be had raises `BackendError`.

    Threads may share one, and wait for each other. It belongs to the process that opened it.
    """

    name: ClassVar[str]
    device: str
    precision: Precision
    _gate: Gate

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        engine = super().__new__(cls)
        engine._gate = Gate(f"{cls.name}: this backend", "open it again")
        keep_after_fork(engine)
        return engine

    def run(self, image: Array) -> Array:
        """Run one batch: `image` and the result are as the contract describes, C-contiguous.

        The result belongs to the caller.

        Raises:
            BackendError: the library failed, or it is closed, or was opened by the process that this one was forked of.
        """
        return self._finish(self.run_graph(image))

    def run_graph(self, image: Array) -> Array:
        """As `run`, without what the host makes of the graph's output: for benchmarks."""
        with self._gate.turn():
            return self._run(image)

    def run_in_place(self, image: Array) -> Any:
        """As `run_graph`, but what the graph gives stays on the engine's device, if its library has arrays there.

        It is NumPy's, or a `torch.Tensor` on a GPU, and belongs to the caller.
        """
        with self._gate.turn():
            return self._run_in_place(image)

    def close(self) -> None:
        """Release the engine, after the run that goes on. Closing twice is allowed; running after closing is not."""
        self._gate.close(self._release)

    @abstractmethod
    def _run(self, image: Array) -> Array:
        """What the graph gives for one batch; in one thread at a time and never after `_release`."""

    def _run_in_place(self, image: Array) -> Any:
        return self._run(image)

    def _finish(self, output: Array) -> Array:
        """What the contract promises of what the graph gives."""
        return output

    @abstractmethod
    def _release(self) -> None:
        """Free what the engine holds. Called once at most."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
