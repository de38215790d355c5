"""Compare an engine with what the fp32 reference network made of sample images: at the build, by `verify`, on arrival.

It loads without PyTorch: the reference has run before.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agln_fast import interruption
from agln_fast.artefact import Artefact
from agln_fast.contract import IOContract
from agln_fast.decode import best_classes
from agln_fast.engines import Engine, obstacle_to, open_engine
from agln_fast.errors import BackendError, VerificationError
from agln_fast.manifest import Verification
from agln_fast.precision import PRECISIONS

__all__ = ["LEAST_ROUNDS", "Reference", "batch_sizes", "verify_engine"]

LEAST_ROUNDS = 3
"""How often each image is run at least, the first time without being timed."""

_MOST_ROUNDS = 50
_LEAST_S = 0.2  # of runs that are timed: a few of a millisecond each would say little
_Batch = npt.NDArray[Any]


@dataclass(frozen=True)
class Reference:
    """One batch of engine input and what the fp32 reference makes of it.

    image: as the contract says; labels (B, H, W); margin (B, H, W), top-1 minus top-2; logits (B, K, H, W) float32,
        kept only where engines return logits, because they are large.
    pixels: (P,), rows after each other; the logits are then (B, K, P), those of these pixels alone.
    """

    image: _Batch
    logits: _Batch | None
    labels: _Batch
    margin: _Batch
    pixels: npt.NDArray[np.intp] | None = None


def batch_sizes(contract: IOContract, images: int) -> list[int]:
    """The batches to compare `images` in: of the smallest size that the engine accepts; one more has the largest."""
    sizes = [contract.min_batch] * -(-images // contract.min_batch)
    return sizes if contract.max_batch == contract.min_batch else [*sizes, contract.max_batch]


def verify_engine(
    artefact: Artefact,
    references: Sequence[Reference],
    *,
    minimum: float | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> Verification:
    """Run an engine on the reference's input and compare; one that cannot run here is recorded as such.

    All input is run several times, one batch after the other: an engine may be right at first, and wrong once its
    work is a CUDA graph, or its buffers hold another image's values. The worst round counts.

    Args:
        minimum: smallest agreement that passes (weighted by margin below fp32); None for that of its precision.

    Raises:
        VerificationError: the agreement is below the minimum, or the output is not finite or of the wrong shape. Where
            it could not be run to its end, the cause is a BackendError or MemoryError.
    """
    if obstacle := obstacle_to(artefact, device):
        return Verification("not verified on this machine", obstacle)
    try:
        with open_engine(artefact, device=device, threads=threads) as opened:
            trial = _Trial(artefact, references)
            trial.run(opened)
            where = opened.device
    except (BackendError, MemoryError) as error:
        raise VerificationError(f"{artefact.name}: {error}") from error
    precise = artefact.precision == "fp32"
    judged = min(tally.agreement if precise else tally.weighted_agreement for tally in trial.rounds)
    minimum = PRECISIONS[artefact.precision].agreement if minimum is None else minimum
    if judged < minimum:
        kind = "" if precise else " weighted by margin"
        differs = f"; it gives different labels for the same image ({trial.changed} pixels)" if trial.changed else ""
        raise VerificationError(
            f"{artefact.name}: agrees with the fp32 reference on {judged:.4%} of the pixels{kind}, "
            f"below the minimum of {minimum:.4%}{differs}; "
            "try another precision, or lower the minimum if you accept that"
        )
    return Verification(
        "passed",
        images=sum(len(reference.labels) for reference in references),
        agreement=min(tally.agreement for tally in trial.rounds),
        weighted_agreement=min(tally.weighted_agreement for tally in trial.rounds),
        max_logit_error=trial.logit_error,
        latency_ms=1e3 * statistics.median(trial.seconds),
        device=where,
    )


@dataclass
class _Tally:
    """Pixels of one round over all images, and their margins: `equal` and `right` have the reference's label."""

    equal: int = 0
    total: int = 0
    right: float = 0.0
    weight: float = 0.0

    def add(self, labels: _Batch, reference: Reference) -> None:
        same = labels == reference.labels
        self.equal += int(same.sum())
        self.total += same.size
        self.right += float(reference.margin[same].sum(dtype=np.float64))
        self.weight += float(reference.margin.sum(dtype=np.float64))

    @property
    def agreement(self) -> float:
        return self.equal / self.total

    @property
    def weighted_agreement(self) -> float:
        return min(1.0, self.right / self.weight) if self.weight > 0 else 1.0


class _Trial:
    """What became of running `references` through an engine, again and again.

    changed: the most pixels of a batch whose label is not that of the first run. seconds: of each run of the smallest
    batch but for the first round's.
    """

    def __init__(self, artefact: Artefact, references: Sequence[Reference]) -> None:
        self._artefact, self._references = artefact, references
        self.rounds: list[_Tally] = []
        self.seconds: list[float] = []
        self.changed = 0
        self.logit_error: float | None = None

    def run(self, engine: Engine) -> None:
        first: list[_Batch] = []
        while len(self.rounds) < LEAST_ROUNDS or (sum(self.seconds) < _LEAST_S and len(self.rounds) < _MOST_ROUNDS):
            tally = _Tally()
            for index, reference in enumerate(self._references):
                interruption.check()
                before = time.perf_counter()
                output = engine.run(reference.image)
                took = time.perf_counter() - before
                labels = self._labels(output, reference)
                tally.add(labels, reference)
                if not self.rounds:
                    first.append(labels)
                    continue
                self.changed = max(self.changed, int(np.count_nonzero(labels != first[index])))
                if len(reference.image) == len(self._references[0].image):  # the largest batch takes its own time
                    self.seconds.append(took)
            self.rounds.append(tally)

    def _labels(self, output: _Batch, reference: Reference) -> _Batch:
        """(B, H, W), of what the engine gave for `reference`.

        Raises:
            VerificationError: it is of the wrong shape, or not finite.
        """
        name, shape = self._artefact.name, reference.labels.shape
        if reference.logits is not None:
            wanted = (shape[0], self._artefact.model.num_classes, *shape[1:])
            if output.shape != wanted or not np.isfinite(output).all():
                raise VerificationError(f"{name}: logits of shape {output.shape} or not finite")
            seen = output if reference.pixels is None else output.reshape(*wanted[:2], -1)[..., reference.pixels]
            self.logit_error = max(self.logit_error or 0.0, float(np.abs(seen - reference.logits).max()))
            output = np.stack([best_classes(logits) for logits in output])
        if output.shape != shape:
            raise VerificationError(f"{name}: labels {output.shape}, reference {shape}")
        return output
