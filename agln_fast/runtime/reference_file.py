"""`reference.npz` of a bundle: two images, and what the fp32 reference network makes of them, for machines without it.

    frames    (2, H, W, 3) uint8    of Scenes, RGB
    labels    (2, H, W)             as the contract's
    margin    (2, H, W) float16     top-1 minus top-2 logit
    logits    (2, K, P) float32     at P pixels, where engines return logits
    minimum   () float64            the agreement that the build asked for; NaN for that of each precision

It loads without PyTorch.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agln_fast.contract import IOContract
from agln_fast.decode import labels_dtype
from agln_fast.errors import BundleError
from agln_fast.manifest import REBUILD
from agln_fast.runtime.images import pack
from agln_fast.runtime.verify import Reference, batch_sizes

__all__ = ["REFERENCE_FILE", "REFERENCE_IMAGES", "read_frames", "read_reference", "write_reference"]

REFERENCE_FILE = "reference.npz"
REFERENCE_IMAGES = 2

_MOST_PIXELS = 4096  # whose logits are kept of an image
_MOST_LOGITS = 2**18  # that are kept of an image: 1 MiB
_LARGEST_HALF = 65504
_HEADER = 4096  # bytes before an array's values, at most
_GOLDEN = 0.6180339887498949
_DAMAGED = ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error

_Array = npt.NDArray[Any]


def write_reference(
    file: Path,
    frames: Sequence[npt.NDArray[np.uint8]],
    references: Sequence[Reference],
    contract: IOContract,
    num_classes: int,
    minimum: float | None,
) -> None:
    """Write two frames (height, width, 3), and what `make_reference` made of them, which were its first ones.

    minimum: the agreement that the build asked for; None for that of each precision.
    """
    rows = [divmod(image, contract.min_batch) for image in range(REFERENCE_IMAGES)]
    pixels = _pixels(contract, num_classes)
    arrays = {
        "frames": np.stack(frames[:REFERENCE_IMAGES]),
        "labels": np.stack([references[batch].labels[row] for batch, row in rows]),
        "margin": np.minimum([references[batch].margin[row] for batch, row in rows], _LARGEST_HALF),
        "minimum": np.float64(np.nan if minimum is None else minimum),
    }
    if contract.output == "logits":
        kept = [logits[row] for batch, row in rows if (logits := references[batch].logits) is not None]
        arrays["logits"] = np.stack([logits.reshape(num_classes, -1)[:, pixels] for logits in kept])
    types = {name: dtype for name, (dtype, _) in _layout(contract, num_classes).items()}
    typed: dict[str, Any] = {name: arrays[name].astype(types[name]) for name in types}
    np.savez_compressed(file, **typed)  # NumPy 2.0 would take `allow_pickle` for the name of an array


def read_reference(data: bytes, contract: IOContract, num_classes: int) -> tuple[list[Reference], float | None]:
    """The inverse of `write_reference`: what `verify_engine` needs, and the minimum.

    Nothing is taken from the file but numbers of the shapes and types that follow from the contract.

    Raises:
        BundleError: it is no such file, or its values make no sense.
    """
    try:
        arrays = _arrays(data, _layout(contract, num_classes))
        labels, margin, minimum = arrays["labels"], arrays["margin"], float(arrays["minimum"])
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError("a label is none of the network's")
        if not (np.isfinite(margin).all() and margin.min() >= 0):
            raise ValueError("a margin is negative or not finite")
        if not (np.isnan(minimum) or 0 <= minimum <= 1):
            raise ValueError(f"the minimum is {minimum}")
        logits = arrays.get("logits")
        if logits is not None and not np.isfinite(logits).all():
            raise ValueError("a logit is not finite")
    except _DAMAGED as error:
        raise BundleError(f"{REFERENCE_FILE} is damaged ({error}); {REBUILD}") from None
    pixels = None if logits is None else _pixels(contract, num_classes)
    references, start = [], 0
    for size in batch_sizes(contract, REFERENCE_IMAGES):
        rows = np.arange(start, start + size) % REFERENCE_IMAGES
        start += size
        image = pack([arrays["frames"][row] for row in rows], contract)
        some = None if logits is None else logits[rows]
        references.append(Reference(image, some, labels[rows], margin[rows], pixels))
    return references, None if np.isnan(minimum) else minimum


def read_frames(data: bytes, contract: IOContract, num_classes: int) -> npt.NDArray[np.uint8]:
    """The images alone, (2, height, width, 3) RGB.

    Raises:
        BundleError: it is no such file.
    """
    try:
        return _arrays(data, _layout(contract, num_classes))["frames"]
    except _DAMAGED as error:
        raise BundleError(f"{REFERENCE_FILE} is damaged ({error}); {REBUILD}") from None


def _layout(contract: IOContract, num_classes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The type and shape of each array."""
    images, size = REFERENCE_IMAGES, (contract.height, contract.width)
    layout: dict[str, tuple[str, tuple[int, ...]]] = {
        "frames": ("uint8", (images, *size, 3)),
        "labels": (labels_dtype(num_classes), (images, *size)),
        "margin": ("float16", (images, *size)),
        "minimum": ("float64", ()),
    }
    if contract.output == "logits":
        layout["logits"] = ("float32", (images, num_classes, len(_pixels(contract, num_classes))))
    return layout


def _pixels(contract: IOContract, num_classes: int) -> npt.NDArray[np.intp]:
    """Those whose logits are kept: in golden steps, which spread evenly over rows and columns."""
    count = contract.height * contract.width
    some = np.arange(max(1, min(count, _MOST_PIXELS, _MOST_LOGITS // num_classes)))
    return (some * _GOLDEN % 1 * count).astype(np.intp)


def _arrays(data: bytes, layout: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, _Array]:
    """
    Raises:
        ValueError, OSError, EOFError, RuntimeError, BadZipFile, zlib.error: they are not as `layout` says.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        found = sorted(archive.namelist())
        if found != sorted(f"{name}.npy" for name in layout):
            raise ValueError("it holds other arrays than it should")
        return {name: _array(archive, name, np.dtype(dtype), shape) for name, (dtype, shape) in layout.items()}


def _array(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> _Array:
    """Looked at before memory is taken for it: an archive may promise anything."""
    entry = archive.getinfo(f"{name}.npy")
    values = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if not values < entry.file_size <= values + _HEADER:
        raise ValueError(f"{name} has another size than it should")
    text = archive.read(entry)
    stream = io.BytesIO(text)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError(f"{name} is of another version of the format")
    if np.lib.format.read_array_header_1_0(stream) != (shape, False, dtype):
        raise ValueError(f"{name} has another shape or type than it should")
    return np.frombuffer(text, dtype, offset=stream.tell()).reshape(shape)
