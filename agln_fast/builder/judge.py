"""Engines, judged: by their agreement with the reference, and below fp32 by what they cost in accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from agln_fast.artefact import Artefact
from agln_fast.builder.pictures import Pictures, Unlabelled
from agln_fast.builder.sensitivity import Sensitivity, choose_floating
from agln_fast.data.classes import ClassSet, class_set
from agln_fast.data.dataset import SomeSamples
from agln_fast.engines import EngineKind
from agln_fast.engines.base import Workbench
from agln_fast.errors import BackendError, MissingPackageError, VerificationError
from agln_fast.evaluation.loss import Yardstick, has_masks, yardstick
from agln_fast.manifest import Accuracy, Verification
from agln_fast.plan.plan import Plan
from agln_fast.precision import Precision
from agln_fast.runtime.verify import Reference, verify_engine

__all__ = ["Judge"]

_FEW = 8  # images to rank blocks by
_MOST_BYTES = 2**30  # of what agreement remembers of the reference
_BYTES = 3  # of it for each pixel


@dataclass(frozen=True)
class Judge:
    """What an engine has to be worth.

    pictures: the user's, by which all that is less precise than fp32 is judged; without them int8 is, on Scenes, if the
    network knows Scenes' classes. limit: percentage points that it may lose. minimum: as of `verify_engine`; with
    pictures of the user's, agreement alone is no reason to leave out what loses no more than `limit`.
    reference: the network as it is. references: what it makes of some pictures.
    """

    pictures: Pictures
    classes: ClassSet
    reference: Artefact
    references: Sequence[Reference]
    limit: float
    minimum: float | None
    threads: int | None

    def weighs(self, precision: Precision) -> bool:
        """Whether engines of this precision are judged by what they lose."""
        if self.pictures.dataset is not None:
            return precision != "fp32"
        return precision == "int8" and self.classes.classes == class_set("scenes").classes

    @cached_property
    def _has_masks(self) -> bool:
        dataset = self.pictures.judged
        return not isinstance(self.pictures.dataset, Unlabelled) and has_masks(dataset)

    @cached_property
    def yardstick(self) -> Yardstick:
        """The reference on the pictures that engines are judged by; it runs over them when it is first asked for."""
        dataset = self.pictures.judged
        if not self._has_masks:
            contract = self.reference.contract
            dataset = SomeSamples(dataset, max(1, _MOST_BYTES // (_BYTES * contract.height * contract.width)))
        return yardstick(self.reference, dataset, masks=self._has_masks, threads=self.threads)

    @cached_property
    def _quick(self) -> Yardstick:
        """By pictures that are not judged by: what they choose must not choose its own score."""
        few = self.pictures.calibrated_on(_FEW)
        return yardstick(self.reference, few, masks=False, threads=self.threads)

    def choose_floating(self, kind: EngineKind, bench: Workbench, plan: Plan) -> Sensitivity:
        """The blocks that an int8 engine leaves in floating point, so that it loses no more than it may.

        Raises:
            VerificationError: it does, whatever is left out, or it cannot be run to its end.
        """
        try:
            return choose_floating(
                kind, bench, plan, self.yardstick.accuracy, lambda artefact: self._quick.accuracy(artefact), self.limit
            )
        except MissingPackageError:
            raise
        except BackendError as error:
            raise VerificationError(f"{kind.name}-int8: {error}") from error

    def judge(self, artefact: Artefact, known: Accuracy | None = None) -> tuple[Verification, Accuracy | None]:
        """Compare an engine with the fp32 reference, and measure what it loses, if that is not `known`.

        Raises:
            VerificationError: it disagrees, or loses more than it may.
        """
        weighs = self.weighs(artefact.precision)
        minimum = self.minimum
        if minimum is None and weighs and self.pictures.dataset is not None:
            minimum = 0.0
        outcome = verify_engine(artefact, self.references, minimum=minimum, threads=self.threads)
        if outcome.status != "passed" or not weighs:
            return outcome, known
        accuracy = known if known is not None and known.backend == artefact.kind else self._measure(artefact)
        if accuracy.loss > self.limit:
            raise VerificationError(
                f"{artefact.name}: {100 * accuracy.score:.2f} % {accuracy.measure} on {accuracy.dataset}, the "
                f"reference {100 * accuracy.reference:.2f} %: loses more than {self.limit:g} points; allow more with "
                "--max-miou-loss, or leave this precision away"
            )
        return outcome, accuracy

    def _measure(self, artefact: Artefact) -> Accuracy:
        try:
            return self.yardstick.accuracy(artefact)
        except MissingPackageError:
            raise
        except BackendError as error:
            raise VerificationError(f"{artefact.name}: {error}") from error
