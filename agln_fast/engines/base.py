"""The small interface that every inference backend implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from agln_fast.bundle import Bundle
from agln_fast.decode import decode, labels_dtype
from agln_fast.engines.gate import Gate, keep_after_fork
from agln_fast.errors import BundleError
from agln_fast.manifest import EngineRecord

__all__ = ["Array", "Backend", "Port", "as_promised", "check_ports"]

Array = npt.NDArray[np.generic]


def as_promised(output: Array, bundle: Bundle, engine: EngineRecord) -> Array:
    """What the contract promises of what the engine's graph gives, which are the logits before the last resize if its
    plan has `low_resolution_labels`."""
    contract = bundle.manifest.contract
    if contract.output == "logits" or not engine.plan.low_resolution_labels:
        return output
    return np.stack([decode(logits, (contract.height, contract.width)) for logits in output])


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


def check_ports(bundle: Bundle, engine: EngineRecord, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    """Compare what an engine's file takes and gives with what the manifest says of it.

    Raises:
        BundleError: they differ.
    """
    contract, classes = bundle.manifest.contract, bundle.manifest.model.num_classes
    batch, size = contract.input_shape[0], (contract.height, contract.width)
    image = Port("image", "uint8" if contract.layout == "uint8_nhwc" else "float32", contract.input_shape)
    if contract.output == "logits":
        result = Port("logits", "float32", (batch, classes, *size))
    elif engine.plan.low_resolution_labels:
        result = Port("logits", "float32", (batch, classes, None, None))
    else:
        result = Port("labels", labels_dtype(classes), (batch, *size))
    for verb, found, wanted in (("takes", inputs, image), ("gives", outputs, result)):
        if len(found) != 1 or not found[0].serves(wanted):
            told = ", ".join(map(str, found))
            raise BundleError(
                f"{bundle.path / engine.file}: {verb} {told}, and the manifest says {wanted}; build the bundle again"
            )


class Backend(ABC):
    """One opened engine. Open by constructing, `run`, and `close`; or use it in a `with` statement.

    `device` and `precision` say what really runs, read back from the library where it can tell. A backend never falls
    back: what cannot be had raises `BackendError`.

    Threads may share one, and wait for each other. It belongs to the process that opened it.
    """

    name: ClassVar[str]
    device: str
    precision: str
    _gate: Gate

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        backend = super().__new__(cls)
        backend._gate = Gate(f"{cls.name}: this backend", "open it again")
        keep_after_fork(backend)
        return backend

    @classmethod
    @abstractmethod
    def obstacle(cls, engine: EngineRecord) -> str | None:
        """Why `engine` cannot run on this machine and what to do about it, or None. Opens nothing."""

    @classmethod
    def default_device(cls) -> str:
        """Where an engine opens when no device is asked for: "cpu", or "cuda"."""
        return "cpu"

    @abstractmethod
    def __init__(self, bundle: Bundle, engine: EngineRecord, *, device: str | None, threads: int | None) -> None:
        """Open `engine` of `bundle`.

        Args:
            device: a torch device string such as "cpu" or "cuda:1"; None for the engine's own.
            threads: intra-op CPU threads; None for the library's default.

        Raises:
            BackendError: it cannot run here, or not on that device, or not in the engine's precision.
        """

    def run(self, image: Array) -> Array:
        """Run one batch: `image` and the result are as `bundle.manifest.contract` describes, C-contiguous.

        The result belongs to the caller.

        Raises:
            BackendError: the library failed, or it is closed, or was opened by the process that this one was forked of.
        """
        return self._finish(self.run_graph(image))

    def run_graph(self, image: Array) -> Array:
        """As `run`, without what the host makes of the graph's output: for benchmarks."""
        with self._gate.turn():
            return self._run(image)

    def close(self) -> None:
        """Release the engine, after the run that goes on. Closing twice is allowed; running after closing is not."""
        self._gate.close(self._release)

    @abstractmethod
    def _run(self, image: Array) -> Array:
        """What the graph gives for one batch; in one thread at a time and never after `_release`."""

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
