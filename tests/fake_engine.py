"""A segmenter around a function of the frame."""

from __future__ import annotations

from agln_fast.contract import IOContract
from agln_fast.data.classes import ClassSet, default_class_set
from agln_fast.engines.echo import EchoEngine, Function, colours
from agln_fast.manifest import EngineRecord
from agln_fast.runtime.segmenter import Segmenter


def fake_segmenter(
    function: Function = colours, *, class_set: ClassSet | None = None, name: str = "fake-fp32", **settings: object
) -> Segmenter:
    """`settings` are the contract's, by default 64x96 and logits; there are 3 classes without a `class_set`."""
    contract = IOContract(**{"height": 64, "width": 96, "output": "logits", **settings})
    record = EngineRecord(name, "torch", "fp32", "", "cpu")
    return Segmenter(record, EchoEngine(contract, function), contract, class_set or default_class_set(3))
