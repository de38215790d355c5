"""Engines of a bundle, judged: by their agreement with the reference, and in int8 by what they cost in accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from agln_fast.bundle import Bundle
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


def scenes_to_judge(draft: Bundle, record: EngineRecord) -> int:
    """How many scenes of the test split `record` is judged by: int8 engines of networks that know Scenes' classes."""
    knows = draft.manifest.classes == class_set("scenes").classes
    return len(Scenes("test")) if knows and record.precision == "int8" else 0


def judge(
    draft: Bundle,
    record: EngineRecord,
    references: Sequence[Reference],
    *,
    minimum: float | None = None,
    threads: int | None = None,
) -> Verification:
    """Compare `record` with the fp32 reference (`verify_engine`), and in int8 its mIoU on Scenes, too.

    Raises:
        VerificationError: it disagrees, or loses more than half a point of mIoU.
    """
    outcome = verify_engine(draft, record, references, minimum=minimum, threads=threads)
    if outcome.status == "passed" and scenes_to_judge(draft, record):
        _check_miou(draft, record, threads)
    return outcome


def _check_miou(draft: Bundle, record: EngineRecord, threads: int | None) -> None:
    test = Scenes("test")
    reference = next(engine for engine in draft.manifest.engines if engine.backend == "torch")
    with ExitStack() as stack:
        of_reference, of_record = (
            stack.enter_context(
                Segmenter(engine, open_engine(draft, engine, threads=threads), draft.manifest.contract, test.class_set)
            )
            for engine in (reference, record)
        )
        outcome = compare(of_reference, of_record, test)
    scores = [100 * evaluation.metrics.mean_iou for evaluation in (outcome.a, outcome.b)]
    if scores[0] - scores[1] > _LARGEST_LOSS:
        raise VerificationError(
            f"{record.name}: {scores[1]:.2f} % mIoU on Scenes, the reference {scores[0]:.2f} %: "
            f"loses more than {_LARGEST_LOSS} points"
        )
