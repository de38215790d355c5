"""What an engine is opened from: a file, and what is known of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TypeVar

from agln_fast.contract import IOContract
from agln_fast.errors import BackendError
from agln_fast.models.config import ModelConfig
from agln_fast.plan.plan import NO_PLAN, Plan
from agln_fast.precision import Precision

__all__ = ["LAYERS_FILE", "Artefact", "from_disk", "parts"]

LAYERS_FILE = "libagln_layers.so"
"""The library of our layers, which lies beside the engines that have some."""

_File = TypeVar("_File", bound=PurePath)


def parts(file: _File, plan: Plan) -> tuple[_File, ...]:
    """All that an engine in `file` is opened from: itself; the weights beside it, if it is a graph of OpenVINO's; the
    library of its layers, if it has kernels of ours."""
    weights = (file.with_suffix(".bin"),) if file.suffix == ".xml" else ()
    library = (file.with_name(LAYERS_FILE),) if plan.kernels and file.suffix == ".engine" else ()
    return file, *weights, *library


def from_disk(file: Path) -> bytes:
    """The bytes of a file of which nobody knows a hash.

    Raises:
        BackendError: it cannot be read.
    """
    try:
        return file.read_bytes()
    except OSError as error:
        raise BackendError(f"{file}: cannot be read ({error})") from None


@dataclass(frozen=True)
class Artefact:
    """What a kind of engine makes, and opens again, here or in another process.

    name: in messages, e.g. "openvino-fp32". kind: the name of the `EngineKind`.
    file: an ONNX file, weights, a graph or an engine of some library.
    model: of the network. contract, plan: what goes in and comes out, and the rewrites that were applied.
    floating: blocks of the network that an int8 engine computes in floating point.
    versions: package -> version that it was made with. compute_capabilities: that it was made for, e.g. ("sm86",).
    read: the bytes of a file of it; those of a bundle are compared with their hash.
    """

    name: str
    kind: str
    precision: Precision
    file: Path
    contract: IOContract
    model: ModelConfig
    plan: Plan = NO_PLAN
    versions: Mapping[str, str] = field(default_factory=dict)
    compute_capabilities: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()
    read: Callable[[Path], bytes] = from_disk

    @property
    def files(self) -> tuple[Path, ...]:
        """All that it consists of, `file` first."""
        return parts(self.file, self.plan)
