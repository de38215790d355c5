"""Windows that slide over an image: their logits, averaged where they overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from agln_fast.contract import IOContract
from agln_fast.runtime.images import ImageArray, fit, windows
from agln_fast.runtime.scores import Scores, joined, placed, zeros
from agln_fast.runtime.scores import mirrored as mirror

__all__ = ["Run", "slide"]

Run: TypeAlias = Callable[[Sequence[ImageArray]], Scores]
"""At most max_batch frames (height, width, 3) uint8 of the contract's size -> logits (K, height, width) for each."""


def slide(run: Run, image: ImageArray, contract: IOContract, *, flip: bool = False) -> Iterator[Scores]:
    """Cover `image` (H, W, 3) with windows of the contract's size, and average their logits at every pixel.

    Only the rows under the current band of windows are held: (F, K, height, W) instead of (F, K, H, W).

    Args:
        run: the engine.
        flip: whether the engine sees every window mirrored, too; it does so in the same batches.

    Yields:
        Bands of rows, from top to bottom, (F, K, rows, W) float32: F is 1, or 2 with `flip`, and then the second
        logits are those of the mirrored windows, mirrored back. Together they are (F, K, H, W). They lie where the
        engine's logits do.
    """
    frame, placement = fit(image, replace(contract, resize="slide"))
    height, width = contract.height, contract.width
    places = windows(frame.shape[0], frame.shape[1], height, width)
    views = [(top, left, mirrored) for top, left in places for mirrored in ((False, True) if flip else (False,))]
    # The windows are a grid: as many see a pixel as cover its row, times as many as cover its column.
    seen = [
        _coverage(set(starts), size) for starts, size in zip(zip(*places, strict=True), (height, width), strict=True)
    ]
    count: Scores = seen[0][:, None] * seen[1]

    total: Scores = None
    band = 0
    for start in range(0, len(views), contract.max_batch):
        chunk = views[start : start + contract.max_batch]
        crops = [frame[top : top + height, left : left + width] for top, left, _ in chunk]
        frames = [crop[:, ::-1] if mirrored else crop for crop, (*_, mirrored) in zip(crops, chunk, strict=True)]
        for (top, left, mirrored), logits in zip(chunk, run(frames), strict=False):
            if total is None:
                total = zeros((1 + flip, len(logits), height, frame.shape[1]), logits)
                count = placed(count, logits)
            if top > band:
                step = top - band
                yield total[:, :, :step, : placement.width] / count[band:top, : placement.width]
                total = joined([total[:, :, step:], zeros((*total.shape[:2], step, total.shape[3]), total)], 2)
                band = top
            total[int(mirrored), :, :, left : left + width] += mirror(logits) if mirrored else logits
    assert total is not None, "there is at least one window"
    rows = placement.height - band
    yield total[:, :, :rows, : placement.width] / count[band : placement.height, : placement.width]


def _coverage(starts: set[int], window: int) -> npt.NDArray[np.float32]:
    """How many windows, of those that begin at `starts`, see each position."""
    seen = np.zeros(max(starts) + window, np.float32)
    for start in starts:
        seen[start : start + window] += 1
    return seen
