"""Engines, judged: by their agreement with the reference, and in int8 by what they cost in accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from agln_fast.artefact import Artefact
from agln_fast.data.classes import class_set
from agln_fast.data.scenes import Scenes
from agln_fast.engines import open_engine
from agln_fast.errors import VerificationError
from agln_fast.evaluation.evaluate import compare
from agln_fast.manifest import EngineRecord, Verification
from agln_fast.runtime.segmenter import Segmenter
from agln_fast.runtime.verify import Reference, verify_engine

__all__ = ["judge", "scenes_to_judge"]

_LARGEST_LOSS = 0.5  # points of mIoU


def scenes_to_judge(artefact: Artefact, classes: Sequence[str]) -> int:
    """How many scenes of the test split it is judged by: int8 engines of networks that know Scenes' classes."""
    knows = tuple(classes) == class_set("scenes").classes
    return len(Scenes("test")) if knows and artefact.precision == "int8" else 0


def judge(
    artefact: Artefact,
    references: Sequence[Reference],
    classes: Sequence[str],
    reference: Artefact,
    *,
    minimum: float | None = None,
    threads: int | None = None,
) -> Verification:
    """Compare an engine with the fp32 reference (`verify_engine`), and in int8 its mIoU on Scenes, too.

    `classes` are the network's, `reference` is what runs it as it is.

    Raises:
        VerificationError: it disagrees, or loses more than half a point of mIoU.
    """
    outcome = verify_engine(artefact, references, minimum=minimum, threads=threads)
    if outcome.status == "passed" and scenes_to_judge(artefact, classes):
        _check_miou(artefact, reference, threads)
    return outcome


def _check_miou(artefact: Artefact, reference: Artefact, threads: int | None) -> None:
    test = Scenes("test")
    with ExitStack() as stack:
        of_reference, of_artefact = (
            stack.enter_context(
                Segmenter(
                    EngineRecord.of(each, "cpu"), open_engine(each, threads=threads), each.contract, test.class_set
                )
            )
            for each in (reference, artefact)
        )
        outcome = compare(of_reference, of_artefact, test)
    scores = [100 * evaluation.metrics.mean_iou for evaluation in (outcome.a, outcome.b)]
    if scores[0] - scores[1] > _LARGEST_LOSS:
        raise VerificationError(
            f"{artefact.name}: {scores[1]:.2f} % mIoU on Scenes, the reference {scores[0]:.2f} %: "
            f"loses more than {_LARGEST_LOSS} points"
        )
