"""The files of one network behind one contract, each made once: for races of plans, for the bundle, for the bench."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy.typing as npt
from rich.progress import Progress

from agln_fast.artefact import Artefact
from agln_fast.builder.pictures import Pictures
from agln_fast.contract import IOContract
from agln_fast.export.onnx import export_onnx
from agln_fast.models.checkpoint import save_checkpoint
from agln_fast.models.config import ModelConfig
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.models.shipped import WEIGHTS_FILE
from agln_fast.plan.cost import CostModel
from agln_fast.plan.plan import Plan
from agln_fast.precision import Precision
from agln_fast.runtime.images import pack
from agln_fast.runtime.references import sample_images

__all__ = ["Workshop"]


@dataclass(eq=False)
class Workshop:
    """What `EngineKind.make` works with; see `agln_fast.engines.base.Workbench`.

    folder: is there; each file gets a folder of its own in it. metadata: goes into each ONNX file.
    pictures: to calibrate on, and to time with.
    spent: seconds of writing files so far.
    """

    network: SegmentationNetwork
    contract: IOContract
    folder: Path
    metadata: Mapping[str, str] | None = None
    compute_capabilities: Sequence[str] = ()
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    progress: Progress | None = None
    pictures: Pictures = Pictures()  # noqa: RUF009  # which does not change
    _files: dict[Hashable, Path] = field(default_factory=dict, init=False)
    spent: float = field(default=0.0, init=False)
    _seconds: dict[Hashable, float] = field(default_factory=dict, init=False)
    _inputs: dict[Hashable, set[Hashable]] = field(default_factory=dict, init=False)
    _writing: list[Hashable] = field(default_factory=list, init=False)

    @property
    def model(self) -> ModelConfig:
        """What the network is."""
        return self.network.config

    def weights(self) -> Path:
        """The reference's weights as safetensors."""
        return self.file(WEIGHTS_FILE, "weights", lambda file: save_checkpoint(self.network, file))

    def graph(self, kind: Precision, plan: Plan) -> Path:
        """The ONNX file of the network, rewritten as `plan` says, with weights of type `kind`."""
        name = "model.onnx" if kind == "fp32" else f"model.{kind}.onnx"
        return self.file(
            name,
            ("graph", kind, plan),
            lambda file: export_onnx(self.network, file, self.contract, kind, self.metadata, plan),
        )

    def plans(self, kind: Precision) -> list[Plan]:
        """Those whose ONNX files of type `kind` are there already."""
        keys = [key for key in self._files if isinstance(key, tuple) and key[:2] == ("graph", kind)]
        return [plan for _, _, plan in keys]

    def file(self, name: str, key: Hashable, write: Callable[[Path], object]) -> Path:
        """The file that `write` writes, called `name`; it is written when `key` is first asked for."""
        if self._writing:
            self._inputs[self._writing[-1]].add(key)
        if key not in self._files:
            file = Path(tempfile.mkdtemp(dir=self.folder)) / name
            self._inputs[key] = set()
            self._writing.append(key)
            began, inputs_s = time.perf_counter(), -self.spent
            try:
                write(file)
            finally:
                self._writing.pop()
            inputs_s += self.spent
            self._seconds[key] = time.perf_counter() - began - inputs_s
            self.spent += self._seconds[key]
            self._files[key] = file
        return self._files[key]

    def seconds(self, file: Path) -> float:
        """What writing the file took, and each file that it was made of, whenever that was written."""
        needed, found = {self._key(file)}, set[Hashable]()
        while needed:
            key = needed.pop()
            found.add(key)
            needed |= self._inputs[key] - found
        return sum(self._seconds[key] for key in found)

    def discard(self, artefact: Artefact) -> None:
        """Delete the files of an artefact that was a trial: they lie in a folder of their own."""
        del self._files[self._key(artefact.file)]
        shutil.rmtree(artefact.file.parent)

    def _key(self, file: Path) -> Hashable:
        return next(key for key, known in self._files.items() if known == file)

    def deliver(self, artefact: Artefact, folder: Path) -> Artefact:
        """Move the files of `artefact` into `folder`, on the same disk, unless they are there already.

        The first of its name keeps it; others, rewritten otherwise, are named by the engine.
        """
        file = artefact.file
        if file.parent == folder:
            return artefact
        place = folder / file.name
        if place.exists():
            place = folder / f"model.{artefact.name}{file.suffix}"
        for part in artefact.files:
            shared = part.stem != file.stem  # by several engines
            part.rename(folder / part.name if shared else place.with_suffix(part.suffix))
        self._files[self._key(file)] = place
        return replace(artefact, file=place)

    def calibration(self) -> list[npt.NDArray[Any]]:
        """Pictures to quantise by, in batches of the smallest size that the contract allows."""
        return self._calibration

    @cached_property
    def _calibration(self) -> list[npt.NDArray[Any]]:
        contract, pictures, size = self.contract, self.pictures, self.contract.min_batch
        if pictures.dataset is None:
            frames = sample_images(pictures.number, contract.height, contract.width, split="train")
        else:
            frames = pictures.frames(contract)
        endless = cycle(frames)
        return [pack(list(islice(endless, size)), contract) for _ in range(-(-len(frames) // size))]

    @cached_property
    def cost(self) -> CostModel:
        """What a run of the largest batch costs under a plan."""
        return CostModel(self.network, (self.contract.height, self.contract.width), self.contract.max_batch)

    @cached_property
    def sample(self) -> npt.NDArray[Any]:
        """A batch of input, as large as the contract allows: one picture."""
        if self.pictures.dataset is None:
            frame = sample_images(1, self.contract.height, self.contract.width)
        else:
            frame = self.pictures.samples(self.contract, 1)
        return pack(frame * self.contract.max_batch, self.contract)
