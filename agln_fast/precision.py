"""The precisions of engines, and what there is to know of each: data, which loads without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from agln_fast.errors import ConfigError, choose

__all__ = ["PRECISIONS", "Numbers", "Precision", "check_minimum", "check_precision"]

Precision = Literal["fp32", "fp16", "bf16", "int8"]


@dataclass(frozen=True)
class Numbers:
    """The numbers that a network computes with.

    torch: the name of its type in PyTorch. onnx: the number of its type in ONNX (`TensorProto.DataType`).
    tensorrt: the name of its type in TensorRT. bytes: of one number.
    agreement: the least share of labels, 0..1, that an engine must have in common with the fp32 reference.
    """

    torch: str
    onnx: int
    tensorrt: str
    bytes: int
    agreement: float

    @property
    def half(self) -> bool:
        """Floating point of two bytes."""
        return self.bytes == 2


# fp32 engines differ from the reference by rounding only: plain share of equal labels. Half precision may flip labels
# where two classes are all but tied: share weighted by the margin between them. int8 flips more of them.
PRECISIONS: dict[Precision, Numbers] = {
    "fp32": Numbers("float32", 1, "FLOAT", 4, 0.999),
    "fp16": Numbers("float16", 10, "HALF", 2, 0.99),
    "bf16": Numbers("bfloat16", 16, "BF16", 2, 0.99),
    "int8": Numbers("int8", 3, "INT8", 1, 0.97),
}


def check_precision(name: str, *also: str) -> Precision:
    """`name` itself, which is a `Precision`, or one of `also`.

    Raises:
        ConfigError: it is neither.
    """
    return cast(Precision, choose("precision", name, [*PRECISIONS, *also]))


def check_minimum(agreement: float | None) -> None:
    """Refuse an agreement outside 0..1 before any work is done; None is that of `PRECISIONS`.

    Raises:
        ConfigError: it is.
    """
    if agreement is not None and not 0 <= agreement <= 1:
        raise ConfigError(f"min_agreement {agreement}: must be from 0 to 1")
