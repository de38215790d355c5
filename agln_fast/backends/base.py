"""The small interface that every inference backend implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from agln_fast.backends.gate import Gate, keep_after_fork
from agln_fast.bundle import Bundle, EngineRecord
from agln_fast.kernels.label_upsample.cpu import upsample_labels

__all__ = ["Array", "Backend", "as_promised"]

Array = npt.NDArray[np.generic]


def as_promised(output: Array, bundle: Bundle, engine: EngineRecord) -> Array:
    """What the contract promises of what the engine's graph gives, which are the logits before the last resize if its
    plan has `low_resolution_labels`."""
    contract = bundle.manifest.contract
    if contract.output == "logits" or not engine.plan.low_resolution_labels:
        return output
    labels = np.stack([upsample_labels(logits, (contract.height, contract.width)) for logits in output])
    return labels.astype(np.uint8 if output.shape[1] <= 256 else np.int32, copy=False)


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
        with self._gate.turn():
            return self._run(image)

    def close(self) -> None:
        """Release the engine, after the run that goes on. Closing twice is allowed; running after closing is not."""
        self._gate.close(self._release)

    @abstractmethod
    def _run(self, image: Array) -> Array:
        """`run`, in one thread at a time and never after `_release`."""

    @abstractmethod
    def _release(self) -> None:
        """Free what the engine holds. Called once at most."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
