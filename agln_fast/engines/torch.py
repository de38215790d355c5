"""Kind `torch`: the reference network itself, in eager PyTorch. These are the facts; `torch_network` runs it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Generator, Iterable
from typing import TYPE_CHECKING, cast

from agln_fast.artefact import Artefact
from agln_fast.contract import IOContract
from agln_fast.engines.base import Array, Engine, EngineKind, Workbench
from agln_fast.engines.driver import check_driver
from agln_fast.errors import BackendError
from agln_fast.plan.plan import NO_PLAN, Plan
from agln_fast.precision import Precision

if TYPE_CHECKING:
    from agln_fast.engines.torch_network import NetworkEngine
    from agln_fast.models.networks import SegmentationNetwork

__all__ = ["NetworkKind", "Torch"]


class NetworkKind(EngineKind):
    """Runs a network by PyTorch: of an artefact's weights, or in memory."""

    precisions = ("fp32", "fp16", "bf16")
    devices = ("cpu", "cuda")
    package = "torch"
    extra = "build"

    def graph_type(self, precision: Precision) -> None:
        return None

    def _obstacle(self, precision: Precision, where: str) -> str | None:
        if where == "cpu":
            return None
        try:
            check_driver(where)
        except BackendError as error:
            return str(error)
        import torch

        return None if torch.cuda.is_available() else "PyTorch finds no CUDA device; `agln-fast doctor` shows more"

    def make(
        self, bench: Workbench, precision: Precision, plan: Plan = NO_PLAN, floating: Collection[str] = ()
    ) -> Artefact:
        return self.artefact(bench, precision, NO_PLAN, bench.weights())

    def open(self, artefact: Artefact, *, device: str | None = None, threads: int | None = None) -> Engine:
        from agln_fast.engines.torch_network import network_of

        return self.open_network(
            network_of(artefact, threads),
            artefact.contract,
            precision=artefact.precision,
            device=device,
            threads=threads,
        )

    def blocks(
        self, artefact: Artefact, images: Iterable[Array], *, device: str | None = None, threads: int | None = None
    ) -> Generator[dict[str, Array], None, None]:
        with self.open(artefact, device=device, threads=threads) as engine:
            for image in images:
                yield cast("NetworkEngine", engine).run_blocks(image)

    def open_network(
        self,
        network: SegmentationNetwork,
        contract: IOContract,
        *,
        precision: Precision = "fp32",
        device: str | None = None,
        threads: int | None = None,
    ) -> Engine:
        """As `open`, for a network in memory. It is used as it is, and may be moved to `device`."""
        device = device or self.default_device()
        return self._engine()(network, contract, precision=precision, device=device, threads=threads)

    @abstractmethod
    def _engine(self) -> type[NetworkEngine]:
        """What runs it; this needs PyTorch."""


class Torch(NetworkKind):
    """Without rewrites; half precision is `torch.autocast`'s."""

    name = "torch"
    target = None
    settings = "eager, inference_mode"

    def _engine(self) -> type[NetworkEngine]:
        from agln_fast.engines.torch_network import NetworkEngine

        return NetworkEngine
