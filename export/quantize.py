"""fp32 ONNX -> int8: post-training quantisation by NNCF, written as an OpenVINO IR."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rich

from agln_fast import interruption
from agln_fast.errors import BuildError, MissingPackageError
from agln_fast.export.convolutions import convolution_blocks
from agln_fast.telemetry import import_quietly

__all__ = ["quantize_onnx"]

_QUANTISED = ("Convolution", "GroupConvolution")
_BEFORE_BIAS = "/WithoutBiases"  # OpenVINO's suffix to the name of a convolution that has some


def quantize_onnx(
    graph: Path, path: Path, batches: Sequence[npt.NDArray[np.generic]], floating: Collection[str] = ()
) -> None:
    """Quantise an fp32 graph by what `batches` look like inside, and write it as an OpenVINO IR.

    Only convolutions are: their weights with one scale for each output channel, their input with one for all, both
    symmetric. All else stays in floating point: softmaxes, whose outputs are nearly one-hot; products of two
    activations, such as the energy of the channel attention, which sums over all pixels; products with constant
    matrices that resize; and sums, each of which would be rounded once more. NNCF's correction of biases is off: on
    the networks that ship, its fast form costs labels, and its slow form gains none.

    Args:
        graph: as `export_onnx` writes it, in fp32.
        path: "NAME.xml"; the weights go into "NAME.bin" beside it. Both appear, or neither.
        batches: pictures to calibrate on, as the graph takes them.
        floating: blocks (`convolution_blocks`) that are not quantised.

    Raises:
        MissingPackageError: NNCF or OpenVINO is not installed.
        BuildError: no batches, a graph that cannot be read, or not be quantised by these batches, or no space.
    """
    if len(batches) == 0:
        raise BuildError("int8 needs pictures to calibrate on, and there are none")
    try:
        nncf, openvino = import_quietly("nncf"), import_quietly("openvino")
    except ImportError as error:
        raise MissingPackageError(error.name or "nncf", "int8") from None
    except RuntimeError as error:  # NNCF looks for the user's home
        raise BuildError(f"int8: NNCF cannot be imported ({_reason(error)}); set HOME to a folder") from None
    try:
        model = openvino.Core().read_model(graph)
    except RuntimeError as error:
        raise BuildError(f"{graph}: OpenVINO cannot read it: {_reason(error)}; export it again") from None
    blocks = convolution_blocks(graph) if floating else {}
    kept = {name for name, block in blocks.items() if block in floating}
    names = [(node.get_type_name(), node.get_friendly_name()) for node in model.get_ops()]
    others = [name for kind, name in names if kind not in _QUANTISED or name.removesuffix(_BEFORE_BIAS) in kept]
    try:
        with _quiet(nncf):
            quantised = nncf.quantize(
                model,
                nncf.Dataset(batches, _unless_interrupted),
                subset_size=len(batches),
                preset=nncf.QuantizationPreset.PERFORMANCE,
                target_device=nncf.TargetDevice.CPU,
                # Not all operations of OpenVINO's graph are in NNCF's.
                ignored_scope=nncf.IgnoredScope(names=others, validate=False),
                advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=True),
            )
    except Exception as error:  # NNCF's and OpenVINO's exceptions have no common base
        raise BuildError(f"{graph}: cannot be quantised: {_reason(error)}") from error
    _save(openvino, quantised, path)


def _unless_interrupted(batch: npt.NDArray[Any]) -> npt.NDArray[Any]:
    interruption.check()
    return batch


def _save(openvino: Any, model: Any, path: Path) -> None:
    weights = path.with_suffix(".bin")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            draft = Path(folder) / path.name
            openvino.save_model(model, draft, compress_to_fp16=False)
            openvino.Core().read_model(draft)  # older versions are silent where the disk is full
            draft.with_suffix(".bin").replace(weights)
            draft.replace(path)
    except (OSError, RuntimeError) as error:
        weights.unlink(missing_ok=True)
        raise BuildError(f"{path}: cannot be written ({_reason(error)}); check the folder and its free space") from None


def _reason(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


@contextmanager
def _quiet(nncf: Any) -> Iterator[None]:
    """Keep NNCF's remarks and progress bars, which it draws on rich's own console, off the user's screen."""
    console, logger = rich.get_console(), logging.getLogger("nncf")
    before = console.quiet, logger.level
    console.quiet = True
    nncf.set_log_level(logging.ERROR)
    try:
        yield
    finally:
        console.quiet = before[0]
        nncf.set_log_level(before[1])
