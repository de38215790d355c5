"""ONNX files of one network, each made once: for the races of plans, for the bundle, for the bench."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt

from agln_fast.contract import IOContract, Precision
from agln_fast.export.onnx import export_onnx
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.cost import CostModel
from agln_fast.plan.plan import Plan
from agln_fast.runtime.images import pack
from agln_fast.runtime.verify import sample_images

__all__ = ["Graphs"]


class Graphs:
    """The graphs of `network` behind `contract`, one for each type and plan, exported when first asked for."""

    def __init__(
        self,
        network: SegmentationNetwork,
        contract: IOContract,
        folder: Path,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """`folder` is there already; `metadata` goes into each file."""
        self.network = network
        self.contract = contract
        self.folder = folder
        self._metadata = metadata
        self._files: dict[tuple[Precision, Plan], Path] = {}

    def __call__(self, kind: Precision, plan: Plan) -> Path:
        """The file whose weights are of type `kind`."""
        if (kind, plan) not in self._files:
            file = self.folder / f"{len(self._files)}.onnx"
            export_onnx(self.network, file, self.contract, kind, self._metadata, plan)
            self._files[kind, plan] = file
        return self._files[kind, plan]

    def plans(self, kind: Precision) -> list[Plan]:
        """Those whose files of type `kind` are there already."""
        return [plan for of, plan in self._files if of == kind]

    def move(self, kind: Precision, plan: Plan, file: Path) -> Path:
        """Put the file in its place, `file`, on the same disk; it is exported if nobody has yet."""
        self._files[kind, plan] = self(kind, plan).rename(file)
        return file

    @cached_property
    def cost(self) -> CostModel:
        """What a run of the largest batch costs under a plan."""
        return CostModel(self.network, (self.contract.height, self.contract.width), self.contract.max_batch)

    @cached_property
    def sample(self) -> npt.NDArray[Any]:
        """A batch of input, as large as the contract allows: a scene."""
        frame = sample_images(1, self.contract.height, self.contract.width)
        return pack(frame * self.contract.max_batch, self.contract)
