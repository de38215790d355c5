"""A segmenter around a function of the frame: what an engine is for everything above the backends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from agln_fast.contract import IOContract
from agln_fast.data.classes import ClassSet, default_class_set
from agln_fast.manifest import EngineRecord
from agln_fast.runtime.segmenter import Segmenter


class FakeBackend:
    """Runs `function`, frame (h, w, 3) uint8 -> logits (K, h, w), on each frame; `batches` are the sizes seen."""

    device, precision = "cpu", "fp32"

    def __init__(self, function: Callable[[np.ndarray], np.ndarray], contract: IOContract) -> None:
        self.function, self.contract, self.batches = function, contract, []

    def run(self, image):
        contract = self.contract
        assert contract.min_batch <= len(image) <= contract.max_batch
        assert image.shape[1:] == (contract.height, contract.width, 3)
        self.batches.append(len(image))
        logits = np.stack([self.function(frame) for frame in image]).astype(np.float32)
        return logits if contract.output == "logits" else logits.argmax(1).astype(np.uint8)

    def close(self) -> None:
        self.closed = True


def colours(frame: np.ndarray) -> np.ndarray:
    """Logits (3, h, w) that are the colour channels: a per-pixel function."""
    return frame.transpose(2, 0, 1)


def fake_segmenter(
    function: Callable[[np.ndarray], np.ndarray] = colours,
    *,
    class_set: ClassSet | None = None,
    name: str = "fake-fp32",
    **settings: object,
) -> Segmenter:
    """`settings` are the contract's, by default 64x96 and logits; there are 3 classes without a `class_set`."""
    contract = IOContract(**{"height": 64, "width": 96, "output": "logits", **settings})
    record = EngineRecord(name, "torch", "fp32", "", "cpu")
    return Segmenter(record, FakeBackend(function, contract), contract, class_set or default_class_set(3))
