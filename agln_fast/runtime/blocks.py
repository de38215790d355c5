"""Where an engine leaves the reference: the error of each block along the network. It needs PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from agln_fast import interruption
from agln_fast.artefact import Artefact
from agln_fast.contract import IOContract
from agln_fast.deployment import DeployedNetwork
from agln_fast.engines import KINDS, obstacle_to
from agln_fast.engines.base import Array
from agln_fast.errors import BackendError, VerificationError
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.blocks import Block, blocks_of
from agln_fast.plan.watch import watching
from agln_fast.precision import PRECISIONS, Precision

__all__ = ["BlockError", "BlockReference", "EngineBlocks", "compare_blocks"]


@dataclass(frozen=True)
class BlockError:
    """How far an engine's result of a block is from the reference's, over all images.

    error: ‖x − r‖₂ / ‖r‖₂. largest: max |x − r| / max |r|. Infinite where x is not finite; both None where the block is
        inside a rewrite: the engine has no tensor that is equal to it.
    shown_by: the name of the block whose error comes next, along the results' way to the logits: the block itself, or
        one behind the rewrite. None where only labels come behind it.
    """

    block: Block
    error: float | None
    largest: float | None
    shown_by: str | None


@dataclass(frozen=True)
class EngineBlocks:
    """The errors of an engine's blocks, in the order in which they are computed.

    bound: the error that a block may have.
    """

    engine: str
    precision: Precision
    bound: float
    errors: tuple[BlockError, ...]

    @property
    def first(self) -> BlockError | None:
        """The first block whose error is above the bound."""
        return next((each for each in self.errors if each.error is not None and each.error > self.bound), None)

    def inside(self, shown: BlockError) -> list[BlockError]:
        """The blocks inside a rewrite that `shown` is the first one behind: they count in its error."""
        return [each for each in self.errors if each.error is None and each.shown_by == shown.block.name]


class BlockReference:
    """The reference network in float64 behind a contract, to compare blocks with."""

    def __init__(self, network: SegmentationNetwork, contract: IOContract) -> None:
        """`network` is not changed."""
        network = copy.deepcopy(network).double().eval()
        self._deployed = DeployedNetwork(network, contract, network.config.num_classes)

    def blocks(self, image: Array) -> dict[str, npt.NDArray[np.float64]]:
        """What each block gives for one batch of input as the contract says."""
        with torch.inference_mode(), watching(self._deployed.network, lambda x: x.double().clone().numpy()) as found:
            self._deployed(torch.from_numpy(image))
        return found


def compare_blocks(
    artefact: Artefact,
    reference: BlockReference,
    images: Sequence[Array],
    *,
    minimum: float | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> EngineBlocks:
    """Run an engine and the reference on batches of input, and compare what each block gives.

    The bound is what an engine may lose of its labels, as a share: 1 minus the smallest agreement that passes.

    Args:
        minimum: this agreement, 0..1; None for that of the engine's precision.

    Raises:
        BackendError: the engine cannot run here, or does not show its blocks.
        BundleError: its file is not what the artefact says.
        VerificationError: a block has another shape than the reference's.
    """
    if obstacle := obstacle_to(artefact, device):
        raise BackendError(obstacle)
    tallies: dict[str, _Tally] = {}
    with closing(KINDS[artefact.kind].blocks(artefact, images, device=device, threads=threads)) as results:
        for image, found in zip(images, results, strict=True):
            interruption.check()
            expected = reference.blocks(image)
            for name, result in found.items():
                if result.shape != expected[name].shape:
                    raise VerificationError(
                        f"{artefact.name}: {name} gives {result.shape}, the reference's {expected[name].shape}"
                    )
                tallies.setdefault(name, _Tally()).add(result, expected[name])
    agreement = PRECISIONS[artefact.precision].agreement if minimum is None else minimum
    blocks = {block.name: block for block in blocks_of(artefact.model)}
    errors = []
    for block in blocks.values():
        seen: Block | None = block
        while seen is not None and seen.name not in tallies:
            seen = None if seen.taker is None else blocks[seen.taker]
        tally = tallies.get(block.name)
        error, largest = (None, None) if tally is None else (tally.error, tally.largest)
        errors.append(BlockError(block, error, largest, None if seen is None else seen.name))
    return EngineBlocks(artefact.name, artefact.precision, 1 - agreement, tuple(errors))


@dataclass
class _Tally:
    """Of one block: sums of squares, and largest values, of what differs and of the reference."""

    squares: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(2))
    most: npt.NDArray[Any] = field(default_factory=lambda: np.zeros(2))

    def add(self, result: Array, expected: npt.NDArray[np.float64]) -> None:
        with np.errstate(invalid="ignore", over="ignore"):
            pair = result.astype(np.float64) - expected, expected
            self.squares += [np.vdot(each, each) for each in pair]
            self.most = np.maximum(self.most, [np.abs(each).max() for each in pair])

    @property
    def error(self) -> float:
        return _share(*np.sqrt(self.squares))

    @property
    def largest(self) -> float:
        return _share(*self.most)


def _share(difference: float, whole: float) -> float:
    """Infinite where the difference is not finite, or there is one to nothing."""
    if not math.isfinite(difference):
        return math.inf
    if whole == 0:
        return math.inf if difference > 0 else 0.0
    return float(difference / whole)
