"""A double of an engine, for tests: labels that anyone can work out from the picture, no library, and no network.

    from agln_fast.engines import KINDS
    from agln_fast.engines.echo import Echo

    KINDS["echo"] = Echo()          # known to build, bench and doctor from now on
    KINDS["echo"] = Echo(obstacle="this machine is too old")

`EchoEngine` by itself is enough for what lies above engines, such as `Segmenter`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np

from agln_fast.artefact import Artefact
from agln_fast.contract import IOContract
from agln_fast.decode import best_classes
from agln_fast.engines.base import Array, Engine, EngineKind, Workbench
from agln_fast.errors import BackendError
from agln_fast.plan.plan import NO_PLAN, Plan
from agln_fast.precision import Precision

__all__ = ["Echo", "EchoEngine", "colours"]

Function = Callable[[Array], Array]
"""A frame (H, W, 3) uint8 -> its logits (K, H, W)."""


def colours(frame: Array, num_classes: int = 3) -> Array:
    """Logits of a frame: its channels of colour, red for class 0; classes beyond the third lose everywhere."""
    logits = np.full((num_classes, *frame.shape[:2]), -1, np.float32)
    logits[:3] = frame.transpose(2, 0, 1)[:num_classes]
    return logits


class EchoEngine(Engine):
    """Runs `function` on each frame of a contract of layout "uint8_nhwc".

    batches: how many images each run has had. error: what a run raises instead, if it is set. closed: it was.
    """

    name = "echo"
    device = "cpu"
    precision: Precision = "fp32"

    def __init__(self, contract: IOContract, function: Function = colours, error: Exception | None = None) -> None:
        self._contract, self._function = contract, function
        self.error = error
        self.batches: list[int] = []
        self.closed = False

    def _run(self, image: Array) -> Array:
        contract = self._contract
        count, *frame = image.shape
        if not contract.min_batch <= count <= contract.max_batch or tuple(frame) != contract.input_shape[1:]:
            raise BackendError(f"image of shape {image.shape}: the contract says {contract.input_shape}")
        self.batches.append(count)
        if self.error is not None:
            raise self.error
        output: Array = np.stack([self._function(each) for each in image]).astype(np.float32)
        if contract.output == "labels":
            output = np.stack([best_classes(each) for each in output])
        return output

    def _release(self) -> None:
        self.closed = True


class Echo(EngineKind):
    """A kind whose engines look at the picture alone. It says what it is told to about this machine.

    opened: the engines that were opened, the latest last.
    """

    name = "echo"
    precisions = ("fp32",)

    def __init__(
        self, function: Function | None = None, *, obstacle: str | None = None, error: Exception | None = None
    ) -> None:
        """
        Args:
            function: of a frame; None for `colours`, of as many classes as the network has.
            obstacle: why nothing of it can run here.
            error: what every run raises.
        """
        self._function, self._told, self._error = function, obstacle, error
        self.opened: list[EchoEngine] = []

    def graph_type(self, precision: Precision) -> None:
        return None

    def _obstacle(self, precision: Precision, where: str) -> str | None:
        return self._told

    def make(
        self, bench: Workbench, precision: Precision, plan: Plan = NO_PLAN, floating: Collection[str] = ()
    ) -> Artefact:
        return self.artefact(bench, precision, NO_PLAN, bench.weights())

    def open(self, artefact: Artefact, *, device: str | None = None, threads: int | None = None) -> Engine:
        classes = artefact.model.num_classes
        function = self._function or (lambda frame: colours(frame, classes))
        self.opened.append(EchoEngine(artefact.contract, function, self._error))
        return self.opened[-1]
