"""The small interface that every inference backend implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import ClassVar, Self, cast

import numpy as np
import numpy.typing as npt

from agln_fast.bundle import Bundle, EngineRecord

__all__ = ["Array", "Backend", "as_promised"]

Array = npt.NDArray[np.generic]


def as_promised(output: Array, bundle: Bundle, engine: EngineRecord) -> Array:
    """What the contract promises of what the engine's graph gives, which are the logits before the last resize if its
    plan has `low_resolution_labels`."""
    contract = bundle.manifest.contract
    if contract.output == "logits" or not engine.plan.low_resolution_labels:
        return output
    # Imported here: what may run is asked before PyTorch is loaded.
    import torch

    from agln_fast.plan.low_resolution_labels import labels_from

    labels = labels_from(torch.from_numpy(output), (contract.height, contract.width))
    return cast(Array, labels.numpy().astype(np.uint8 if output.shape[1] <= 256 else np.int32))


class Backend(ABC):
    """One opened engine. Open by constructing, `run`, and `close`; or use it in a `with` statement.

    `device` and `precision` say what really runs, read back from the library where it can tell. A backend never falls
    back: what cannot be had raises `BackendError`.
    """

    name: ClassVar[str]
    device: str
    precision: str

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

    @abstractmethod
    def run(self, image: Array) -> Array:
        """Run one batch: `image` and the result are as `bundle.manifest.contract` describes, C-contiguous.

        The result belongs to the caller.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the engine. Closing twice is allowed; running after closing is not."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
