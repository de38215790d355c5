"""Which blocks of a network an int8 engine computes in floating point, so that it loses no more than it may.

By measurement: first everything is quantised. If that loses too much, each block in turn is left in floating point, and
what that gains is measured on a few images, without masks: agreement tells more of a small change than mIoU. Then the
blocks that gain most are left out, as few as it takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from agln_fast.artefact import Artefact
from agln_fast.engines import EngineKind, obstacle_to
from agln_fast.engines.base import Workbench
from agln_fast.errors import VerificationError
from agln_fast.export.convolutions import convolution_blocks
from agln_fast.manifest import Accuracy
from agln_fast.plan.plan import Plan

__all__ = ["Sensitivity", "choose_floating"]

_SHOWS = 0.5  # of an engine's loss


@dataclass(frozen=True)
class Sensitivity:
    """What came of it.

    floating: blocks that stay in floating point, those that cost most first. accuracy: of the engine without them; None
    where nothing of its kind runs here. loss: of each block that was tried, on few images: points of agreement that the
    engine loses with this one in floating point.
    """

    floating: tuple[str, ...]
    accuracy: Accuracy | None
    loss: dict[str, float]


def choose_floating(
    kind: EngineKind,
    bench: Workbench,
    plan: Plan,
    measure: Callable[[Artefact], Accuracy],
    rank: Callable[[Artefact], Accuracy],
    limit: float,
) -> Sensitivity:
    """Find the blocks that an int8 engine of `kind` has to leave in floating point.

    What cannot run here is measured by its `trial`, by which blocks are ranked elsewhere, too, if it loses as much as
    the engine, about. More than half of the convolutions stay in int8.

    Args:
        measure: what an engine loses, which is to be `limit` at most, percentage points.
        rank: the same on few images, in a finer measure.

    Raises:
        VerificationError: it loses more, whatever is left out.
        BuildError, BackendError: a candidate cannot be made, or not be run.
    """
    search = _Search(kind, bench, plan, measure)
    if obstacle_to(search.candidate(())) is not None:
        return Sensitivity((), None, {})
    everything = search.accuracy(())
    if everything.loss <= limit:
        return Sensitivity((), everything, {})
    # A trial is made in a second, an engine in several: it stands for the engine if it loses what that does.
    shows = rank(kind.trial(bench, plan, [])).loss >= _SHOWS * rank(search.candidate(())).loss
    make = (lambda floating: kind.trial(bench, plan, floating)) if shows else search.candidate
    losses = {}
    for block in filter(lambda block: search.may([block]), search.blocks):
        losses[block] = rank(trial := make([block])).loss
        bench.discard(trial)  # a large network has dozens of them
    order = sorted(losses, key=lambda block: losses[block])
    most = max((count for count in range(1, len(order) + 1) if search.may(order[:count])), default=0)
    fails, holds = 0, min(1, most)
    while (accuracy := search.accuracy(order[:holds])).loss > limit:
        if holds == most:
            raise VerificationError(
                f"{kind.name}-int8: loses {everything.loss:.2f} points of {everything.measure}, and with "
                f"{most} of {len(search.blocks)} blocks in floating point still {accuracy.loss:.2f}: "
                f"more than {limit:g}; try bf16 or fp16, or allow more with --max-miou-loss"
            )
        fails, holds = holds, min(2 * holds, most)
    while holds - fails > 1:
        middle = (fails + holds) // 2
        if search.accuracy(order[:middle]).loss <= limit:
            holds = middle
        else:
            fails = middle
    return Sensitivity(tuple(order[:holds]), search.accuracy(order[:holds]), losses)


@dataclass(frozen=True)
class _Search:
    """The int8 engines of one plan, by what stays in floating point."""

    kind: EngineKind
    bench: Workbench
    plan: Plan
    measure: Callable[[Artefact], Accuracy]

    @cached_property
    def blocks(self) -> Counter[str]:
        """How many convolutions each block has, in the order of the graph."""
        graph = self.kind.graph_type("int8")
        assert graph is not None
        return Counter(convolution_blocks(self.bench.graph(graph, self.plan)).values())

    @cached_property
    def _known(self) -> dict[frozenset[str], Accuracy]:
        return {}

    def may(self, floating: Sequence[str]) -> bool:
        """Whether more than half of the convolutions are int8 without these blocks."""
        return 2 * sum(self.blocks[block] for block in floating) < self.blocks.total()

    def candidate(self, floating: Sequence[str]) -> Artefact:
        if self.kind.obstacle("int8") is None:
            return self.kind.make(self.bench, "int8", self.plan, floating)
        return self.kind.trial(self.bench, self.plan, floating)

    def accuracy(self, floating: Sequence[str]) -> Accuracy:
        key = frozenset(floating)
        if key not in self._known:
            self._known[key] = self.measure(self.candidate(floating))
        return self._known[key]
