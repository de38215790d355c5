"""What a served bundle takes and gives, in the terms of the Open Inference Protocol (KServe v2).

One request brings images by one of two inputs, and asks for outputs by name, `labels` unless it says so. What every
server here answers is written here: MLServer, Triton's Python backend, Ray Serve. Needs NumPy and Pillow alone.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from agln_fast import environment
from agln_fast.errors import ConfigError, ImageError, choose
from agln_fast.runtime.images import ImageArray, ImageSource, load_image
from agln_fast.runtime.result import Result

__all__ = [
    "INPUTS",
    "MOST_IMAGES",
    "OUTPUTS",
    "Output",
    "Tensor",
    "check_pixels",
    "read_images",
    "shape_of",
    "sources_of",
    "write_outputs",
]

Array: TypeAlias = npt.NDArray[Any]

MOST_IMAGES: Final = 64
"""Of one request. More of them are more requests, which fill the same batches."""


@dataclass(frozen=True)
class Tensor:
    """name, datatype as the protocol calls it, shape with -1 where it varies, and what it holds."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    doc: str


@dataclass(frozen=True)
class Output(Tensor):
    """write: the results of one request as an array of that shape."""

    write: Callable[[Sequence[Result]], Array]


INPUTS: Final = {
    tensor.name: tensor
    for tensor in (
        Tensor("image", "BYTES", (-1,), "encoded images, such as JPEG and PNG files"),
        Tensor("pixels", "UINT8", (-1, -1, -1, 3), "images (N, H, W, 3) RGB, or one (H, W, 3)"),
    )
}
"""A request has one of them."""


def sources_of(inputs: Mapping[str, Array | Sequence[bytes]]) -> list[ImageSource]:
    """What the images of a request are read from by a segmenter, or by `load_image`: bytes, or arrays (H, W, 3) uint8.

    Args:
        inputs: by name; of `image` a sequence of encoded images, of `pixels` an array.

    Raises:
        ConfigError: no input, two, an unknown one, or one without an image, or with more than `MOST_IMAGES`.
        ImageError: pixels of another type or shape, or an image that is no bytes.
    """
    for name in inputs:
        choose("input", name, INPUTS)
    if len(inputs) != 1:
        raise ConfigError(f"a request needs one input, {' or '.join(map(repr, INPUTS))}; got {len(inputs)}")
    [(name, value)] = inputs.items()
    if name == "pixels":
        array = np.asarray(value)
        if array.dtype != np.uint8 or array.ndim not in (3, 4) or array.shape[-1] != 3:
            raise ImageError(
                f"input 'pixels': needs UINT8 of shape (H, W, 3) or (N, H, W, 3), got {array.dtype} {array.shape}"
            )
        sources: list[ImageSource] = list(array if array.ndim == 4 else array[np.newaxis])
    elif all(isinstance(source, bytes | bytearray | memoryview) for source in value):
        sources = list(value)
    else:
        raise ImageError("input 'image': needs encoded images as BYTES")
    if not 1 <= len(sources) <= MOST_IMAGES:
        raise ConfigError(f"input {name!r} has {len(sources)} images: a request needs 1 to {MOST_IMAGES}")
    return sources


def check_pixels(sources: Sequence[ImageSource]) -> None:
    """See that the images of a request have no more pixels together than one may have, by their headers.

    Raises:
        ImageError: they have.
    """
    pixels, most = sum(map(_pixels, sources)), environment.max_pixels()
    if pixels > most:
        raise ImageError(
            f"the images of a request have {pixels} pixels together, above the limit of {most}: send fewer"
        )


def _pixels(source: ImageSource) -> int:
    """0 where it is no image, which is told when it is read."""
    if isinstance(source, np.ndarray):
        return int(source.shape[0] * source.shape[1])
    try:
        with Image.open(io.BytesIO(cast(bytes, source))) as image:
            return int(image.width * image.height)
    except Exception:  # Pillow's of many kinds
        return 0


def read_images(inputs: Mapping[str, Array | Sequence[bytes]]) -> list[ImageArray]:
    """The images (H, W, 3) uint8 of a request.

    Raises:
        ConfigError: as `sources_of`.
        ImageError: as `sources_of`, or an image that cannot be used.
    """
    return [load_image(source) for source in sources_of(inputs)]


def _labels(results: Sequence[Result]) -> Array:
    sizes = {result.labels.shape for result in results}
    if len(sizes) > 1:
        raise ConfigError("output 'labels' needs images of one size; ask for 'labels_png', or send them one by one")
    return np.stack([result.labels for result in results])


def _runs(results: Sequence[Result]) -> Array:
    """Runs end where an image ends, and go on over the end of a row."""
    return np.concatenate([_runs_of(result.labels.reshape(-1)) for result in results])


def _runs_of(labels: Array) -> Array:
    starts = np.concatenate([[0], np.flatnonzero(labels[1:] != labels[:-1]) + 1])
    lengths = np.diff(starts, append=labels.size)
    return np.stack([labels[starts], lengths], axis=1).astype(np.int32)


def _shares(results: Sequence[Result]) -> Array:
    return np.array(
        [[result.shares.get(name, 0) for name in result.class_set.classes] for result in results], np.float32
    )


def _png(image: Callable[[Result], Image.Image]) -> Callable[[Sequence[Result]], Array]:
    def write(results: Sequence[Result]) -> Array:
        files = np.empty(len(results), object)
        for index, result in enumerate(results):
            image(result).save(file := io.BytesIO(), "PNG", compress_level=1)
            files[index] = file.getvalue()
        return files

    return write


OUTPUTS: Final = {
    output.name: output
    for output in (
        Output("labels", "UINT8", (-1, -1, -1), "class ids (N, H, W); INT32 for more than 256 classes", _labels),
        Output("labels_png", "BYTES", (-1,), "class ids as PNG files with a palette", _png(Result.label_image)),
        Output("runs", "INT32", (-1, 2), "run lengths, row by row: class id, pixels; they end with an image", _runs),
        Output("overlay_png", "BYTES", (-1,), "image, colours and legend as PNG files", _png(Result.overlay)),
        Output("shares", "FP32", (-1, -1), "share of the pixels of each class (N, classes)", _shares),
    )
}
"""`labels` is what a request gets that names none."""


def shape_of(output: Output, classes: int) -> tuple[str, tuple[int, ...]]:
    """Datatype and shape of an output where so many classes are told apart."""
    if output.name == "labels" and classes > 256:
        return "INT32", output.shape
    return output.datatype, (-1, classes) if output.name == "shares" else output.shape


def write_outputs(results: Sequence[Result], names: Iterable[str] = ()) -> dict[str, Array]:
    """The outputs that a request asks for, by name; `labels` if it asks for none. BYTES are arrays of `bytes` objects.

    Raises:
        ConfigError: an unknown output, or `labels` of images of several sizes.
    """
    asked = list(dict.fromkeys(names)) or ["labels"]
    return {name: OUTPUTS[choose("output", name, OUTPUTS)].write(results) for name in asked}
