"""Images in: decoding whatever the user has, and fitting it into an engine's frame.

Everything here is NumPy arrays (H, W, 3) uint8 RGB, C-contiguous; "image" means that and nothing else.
"""

from __future__ import annotations

import glob
import io
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeGuard, cast

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from agln_fast import environment
from agln_fast.contract import IOContract
from agln_fast.data.decoding import FORMATS, image_suffixes
from agln_fast.errors import ConfigError, ImageError, did_you_mean
from agln_fast.runtime.bit_depth import (
    check_bit_depth,
    choose_depth,
    declared_depth,
    is_deep_colour,
    select_low_bytes,
    unscale,
)
from agln_fast.runtime.pixels import Box, Read, from_bytes, from_floats, from_integers

if TYPE_CHECKING:
    import torch

__all__ = [
    "SOFTWARE",
    "ImageArray",
    "ImageSource",
    "Placement",
    "as_image_list",
    "fit",
    "is_output",
    "largest_file",
    "list_images",
    "load_image",
    "pack",
    "windows",
]

ImageArray: TypeAlias = npt.NDArray[np.uint8]
_Content: TypeAlias = bytes | bytearray | memoryview | IO[bytes]
ImageSource: TypeAlias = "str | os.PathLike[str] | _Content | Image.Image | npt.NDArray[Any] | torch.Tensor"

_HEADERS = 1 << 20  # bytes that a file may have beside 8 a pixel, which is RGBA of 16 bits uncompressed
SOFTWARE = "agln-fast"  # the EXIF tag Software of what `Result.save` writes

_TRANSPOSES = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageSource, *, max_pixels: int | None = None, bit_depth: int | None = None) -> ImageArray:
    """Decode one image to (H, W, 3) uint8 RGB, C-contiguous.

    Alpha is dropped, not composed over a colour: so do the training pipelines (`convert("RGB")` of Pillow, `imread` of
    OpenCV). EXIF orientation is applied. Samples of N bits, N above 8, are scaled by 255 / (2**N - 1) and rounded.
    Beside the image as Pillow decodes it (1 to 4 bytes a pixel), only the result's 3 bytes a pixel are held.

    Args:
        source: a path; the content of an image file as bytes; a file that is open in binary mode (it is read from its
            beginning, or, if it cannot be set back, from where it stands, and is left open); a PIL image (of several
            frames, the current one); a NumPy array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a torch tensor
            (1, H, W) or (3, H, W), of uint8, uint16 or floating-point in 0..1. A NumPy array that has the returned
            form already is not copied: the result shares its memory.
        max_pixels: the largest H * W; None for `AGLN_FAST_MAX_PIXELS` or its default. A file's header is checked
            before anything is decoded. For files, Pillow's own limit of 2 * `PIL.Image.MAX_IMAGE_PIXELS` stays in
            force above it.
        bit_depth: N, 1 to 16, of samples that are stored in 16 or 32 bits; others do not change by it. None to go by
            what the file declares, and else by the largest value (`agln_fast.runtime.bit_depth`).

    Raises:
        ImageError: the source is missing, no image, damaged, animated, empty, too large, of a wrong type or shape,
            or of a bit depth that has to be given.
        ConfigError: `bit_depth` is not from 1 to 16.
    """
    check_bit_depth(bit_depth)
    if max_pixels is None:
        max_pixels = environment.max_pixels()
    if isinstance(source, Image.Image):
        return _from_pil(source, max_pixels, bit_depth)
    if isinstance(source, np.ndarray):
        return _from_numpy(source, max_pixels, bit_depth)
    if _is_tensor(source):
        return _from_torch(source, max_pixels, bit_depth)
    if isinstance(source, (str, os.PathLike)):
        return _from_path(Path(os.fsdecode(source)), max_pixels, bit_depth)
    if isinstance(source, (bytes, bytearray, memoryview)):
        name = f"{len(source)} bytes"
        return _from_file(io.BytesIO(bytes(source)), name, max_pixels, bit_depth)
    if callable(getattr(source, "read", None)):
        name = str(getattr(source, "name", type(source).__name__))
        return _from_file(cast("IO[bytes]", source), name, max_pixels, bit_depth)
    needed = "a path, bytes, an open binary file, a PIL image, a NumPy array (H, W, 3) or a torch tensor (3, H, W)"
    raise ImageError(f"{type(source).__name__} is no image: needs {needed}, or a list of these")


def as_image_list(sources: ImageSource | Sequence[ImageSource]) -> tuple[list[ImageSource], bool]:
    """Flatten what a user passes into a list of single images, and say whether it was one single image.

    A list or tuple gives its items, an array (N, H, W, C) or a tensor (N, C, H, W), also inside a list, N images.

    Raises:
        ImageError: lists inside lists without an end.
    """
    if isinstance(sources, (list, tuple)):
        try:
            return [single for item in sources for single in as_image_list(item)[0]], False
        except RecursionError:
            raise ImageError(
                "images: a list that contains itself, or lists too deep inside lists; give one list"
            ) from None
    if isinstance(sources, np.ndarray) and sources.ndim == 4:
        return list(sources), False
    if _is_tensor(sources) and _way_to_pixels(sources) is None and sources.ndim == 4:
        return list(sources), False
    return [cast(ImageSource, sources)], True


def list_images(pattern: str | Path, *, recursive: bool = False) -> list[Path]:
    """The image files that a file name, a folder or a glob pattern stands for, sorted.

    A file is taken whatever it is. A folder or a pattern (`**` too) gives its image files, but not those that
    `Result.save` wrote, and none of a name that starts with a dot.

    Args:
        pattern: as above.
        recursive: whether folders, also those that a pattern gives, are searched with all folders in them. Links to
            folders in them are not followed.

    Raises:
        ImageError: there is none; a folder cannot be read.
    """
    path = Path(pattern)
    if path.exists() and not path.is_dir():
        return [path]
    roots = [path] if path.is_dir() else [Path(name) for name in glob.glob(str(path), recursive=True)]
    folders = [root for root in roots if root.is_dir() and (recursive or root == path)]
    try:
        files = {root for root in roots if root.is_file()}.union(*(_files_in(folder, recursive) for folder in folders))
        nested = any(entry.is_dir() for folder in folders for entry in folder.iterdir())
    except OSError as error:
        raise ImageError(f"{error.filename}: cannot be read: {error.strerror}") from error
    suffixes = image_suffixes()
    images = sorted(file for file in files if file.suffix.lower() in suffixes)
    inputs = [image for image in images if not is_output(image)]
    if inputs:
        return inputs
    if images:
        raise ImageError(f"{path}: its {len(images)} images were all written by agln-fast; name them to use them")
    hint = "; it has folders: search them, too, with --recursive (recursive=True)" if nested and not recursive else ""
    if files:
        raise ImageError(f"{path}: none of its {len(files)} files is an image ({', '.join(sorted(suffixes))}){hint}")
    raise ImageError(f"{path}: holds no files{hint}" if path.is_dir() else _missing(path))


def largest_file(max_pixels: int) -> int:
    """Bytes that the file of an image of so many pixels may have."""
    return 8 * max_pixels + _HEADERS


def is_output(file: Path | IO[bytes]) -> bool:
    """Whether `Result.save` wrote this file, by its EXIF tag Software; BMP has none. Only the header is read."""
    try:
        with Image.open(file, formats=["JPEG", "PNG", "TIFF", "WEBP"]) as image:
            has_exif = "exif" in image.info or image.format == "TIFF"  # others would be decoded to look for it
            return has_exif and image.getexif().get(ExifTags.Base.Software) == SOFTWARE
    except Exception:  # what cannot be read is told where it is loaded
        return False


def _files_in(folder: Path, recursive: bool) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if recursive and not name.startswith(".")]
        files = (Path(parent, name) for name in names if not name.startswith("."))
        yield from (file for file in files if file.is_file())


@dataclass(frozen=True)
class Placement:
    """Where the picture lies in the frame that goes into the engine, pixels; around it is padding."""

    top: int
    left: int
    height: int
    width: int


def fit(image: ImageArray, contract: IOContract) -> tuple[ImageArray, Placement]:
    """Bring `image` (H, W, 3) into the contract's frame by its resize policy: `(frame, placement)`.

    - `stretch`: resized to height x width, whatever the ratio (bilinear, antialiased).
    - `pad`: resized to fit into height x width with its ratio kept.
    - `slide`: not resized; the frame is at least height x width, and `windows` says where to cut it.

    Padding lies at the bottom and on the right, as in training crops, and has the contract's mean colour.
    """
    height, width = image.shape[:2]
    if contract.resize == "slide":
        frame_height, frame_width = max(height, contract.height), max(width, contract.width)
    else:
        frame_height, frame_width = contract.height, contract.width
        if contract.resize == "stretch":
            height, width = frame_height, frame_width
        else:
            scale = min(frame_height / height, frame_width / width)
            height, width = max(1, round(height * scale)), max(1, round(width * scale))
        if image.shape[:2] != (height, width):
            image = np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    placement = Placement(0, 0, height, width)
    if (height, width) == (frame_height, frame_width):
        return image, placement
    frame = np.empty((frame_height, frame_width, 3), np.uint8)
    frame[:] = [round(value * 255) for value in contract.mean]
    frame[:height, :width] = image
    return frame, placement


def pack(frames: Sequence[ImageArray], contract: IOContract) -> npt.NDArray[Any]:
    """Frames (height, width, 3) of the contract's size -> the engine's input `image`, as the contract's layout says.

    It may share the memory of a single frame.
    """
    batch = frames[0][None] if len(frames) == 1 else np.stack(frames)
    if contract.layout == "uint8_nhwc":
        return np.require(batch, requirements=["C", "W"])  # PyTorch warns of what cannot be written
    # Transposed first: loops over three colours would be slow.
    planes = np.ascontiguousarray(batch.transpose(0, 3, 1, 2), np.float32)
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (contract.mean, contract.std))
    planes /= 255
    planes -= mean
    planes /= std
    return planes


def windows(
    height: int, width: int, window_height: int, window_width: int, overlap: float = 1 / 3
) -> list[tuple[int, int]]:
    """Top left corners (top, left), in pixels and row by row, of windows that cover a frame of height x width.

    Neighbours overlap by at least `overlap` of the window: the stride is ceil(window * (1 - overlap)), as in sliding
    evaluation of PyTorch-Encoding, and the last window ends at the border. A frame smaller than the window in a
    direction has one window there.

    Raises:
        ConfigError: `overlap` is not in 0 <= overlap < 1.
    """
    if not 0 <= overlap < 1:
        raise ConfigError(f"overlap {overlap}: must be at least 0 and below 1")
    lefts = _starts(width, window_width, overlap)
    return [(top, left) for top in _starts(height, window_height, overlap) for left in lefts]


def _starts(length: int, window: int, overlap: float) -> list[int]:
    last = max(0, length - window)
    stride = window - math.floor(window * overlap)
    return [*range(0, last, stride), last]


@contextmanager
def _clear_errors(name: str | Path) -> Iterator[None]:
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise ImageError(_missing(Path(name))) from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name}: is not an image of a known format ({', '.join(FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: is too large for Pillow: {error}") from error
    except Exception as error:  # decoders raise whatever they stumble over in damaged bytes
        what = "cannot be read" if getattr(error, "errno", None) else "cannot be decoded"
        raise ImageError(f"{name}: {what}: {getattr(error, 'strerror', None) or error}") from error


def _from_path(path: Path, max_pixels: int, bit_depth: int | None) -> ImageArray:
    with _clear_errors(path):
        if path.is_dir():
            raise ImageError(f"{path}: is a folder; needs an image file")
        with path.open("rb") as file:
            return _from_file(file, str(path), max_pixels, bit_depth)


def _from_file(file: IO[bytes], name: str, max_pixels: int, bit_depth: int | None) -> ImageArray:
    with _clear_errors(name):
        file = _rewindable(file, name, max_pixels)
        picture, doubt = _decode(*_open(file, name), name, max_pixels, bit_depth)
        if doubt is None:
            return picture
        lower, _ = _open(file, name)
        if not select_low_bytes(lower):
            return doubt.settle(picture, name)
        height, width, read = _upright(lower)

        def whole(box: Box) -> npt.NDArray[Any]:
            return picture[box].astype(np.uint16) << 8 | read(box)[..., :3]

        return from_integers(whole, height, width, name, declared=doubt.declared, bit_depth=bit_depth, image=picture)


def _rewindable(file: IO[bytes], name: str, max_pixels: int) -> IO[bytes]:
    """`file`, or in memory what is left of one that cannot be set back."""
    empty = file.read(0)
    if not isinstance(empty, bytes):
        raise ImageError(f"{name}: read() gives {type(empty).__name__}, not bytes; open it in binary mode, 'rb'")
    if getattr(file, "seekable", lambda: hasattr(file, "seek"))():
        return file
    limit, buffer = largest_file(max_pixels), io.BytesIO()
    while chunk := file.read(1 << 16):
        buffer.write(chunk)
        if buffer.tell() > limit:
            raise ImageError(f"{name}: has more bytes than an image of {max_pixels} pixels; raise AGLN_FAST_MAX_PIXELS")
    return buffer


def _open(file: IO[bytes], name: str) -> tuple[Image.Image, int | None]:
    """The image in `file`, of which only the header is read, and the depth that it declares."""
    Image.init()
    image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    # Phones write MPO: a JPEG whose further frames are thumbnails or depth maps, never an animation.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ImageError(f"{name}: has several frames; needs a still image, or one frame as a PIL image")
    return image, unscale(image) or declared_depth(image)


def _from_pil(image: Image.Image, max_pixels: int, bit_depth: int | None) -> ImageArray:
    with _clear_errors("PIL image"):
        picture, doubt = _decode(image, declared_depth(image), "PIL image", max_pixels, bit_depth)
        return picture if doubt is None else doubt.settle(picture, "PIL image")


@dataclass(frozen=True)
class _Doubt:
    """The upper 8 bits of 16-bit colour may not be enough to go by.

    largest: the largest value, were the lower bits all 1; declared, bit_depth: as in `choose_depth`.
    """

    largest: int
    declared: int | None
    bit_depth: int | None

    def settle(self, picture: ImageArray, name: str) -> ImageArray:
        """`picture`, those upper 8 bits, if they will do after all, with a warning."""
        depth = self.bit_depth or self.declared
        if depth is not None:
            kept = f"of its 16-bit colour Pillow keeps the upper 8 bits here, and its depth of {depth} needs the others"
            raise ImageError(f"{name}: {kept}; give the path of a PNG or TIFF file of RGB samples")
        choose_depth(self.largest, name)
        return picture


def _decode(
    image: Image.Image, declared: int | None, name: str, max_pixels: int, bit_depth: int | None
) -> tuple[ImageArray, _Doubt | None]:
    """The picture, and what stands against it."""
    _check_size(image.height, image.width, name, max_pixels)
    deep, scaled = is_deep_colour(image, name), declared == 16  # by Pillow, as a PPM's header says
    height, width, read = _upright(image)
    if image.mode.startswith("I"):
        depth, wide = None if scaled else bit_depth, image.mode == "I" and image.format != "PPM"
        return from_integers(read, height, width, name, declared=declared, bit_depth=depth, wide=wide), None
    if image.mode == "F":
        return from_floats(read, height, width, name), None
    picture = from_bytes(read, height, width)
    if not deep or scaled or bit_depth == 16:
        return picture, None
    extrema = cast("tuple[tuple[int, int], ...]", image.getextrema())
    largest = max(high for _, high in extrema[: 4 if image.mode == "CMYK" else 3]) << 8 | 255  # not that of alpha
    bright = largest >= 2 ** max(declared or 0, 14)
    return picture, None if bright and bit_depth is None else _Doubt(largest, declared, bit_depth)


def _upright(image: Image.Image) -> tuple[int, int, Read]:
    """Height, width and samples of a PIL image, turned by its EXIF orientation, in RGB where they have 8 bits."""
    image.load()
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    method = _TRANSPOSES.get(orientation)
    swaps = orientation in (5, 6, 7, 8)
    height, width = (image.width, image.height) if swaps else (image.height, image.width)

    def read(box: Box) -> npt.NDArray[Any]:
        rows, columns = box[::-1] if swaps else box
        if orientation in (3, 4, 6, 7):
            rows = slice(image.height - rows.stop, image.height - rows.start)
        if orientation in (2, 3, 7, 8):
            columns = slice(image.width - columns.stop, image.width - columns.start)
        strip = image.crop((columns.start, rows.start, columns.stop, rows.stop))
        if strip.mode == "P":  # Pillow warns where a palette with alpha loses it on the way
            strip = strip.convert("RGBA")
        elif strip.mode not in ("F", "L", "RGB", "RGBA", "RGBX") and not strip.mode.startswith("I"):
            strip = strip.convert("RGB")
        return np.asarray(strip if method is None else strip.transpose(method))

    return height, width, read


def _from_numpy(array: npt.NDArray[Any], max_pixels: int, bit_depth: int | None) -> ImageArray:
    name = f"NumPy array {array.shape} {array.dtype}"
    if np.ma.is_masked(array):
        raise ImageError(f"{name}: has masked values; fill them with .filled()")
    array = np.asarray(array)  # np.matrix slices in a way of its own
    is_float, is_16_bit = array.dtype.kind == "f", array.dtype.kind == "u" and array.dtype.itemsize == 2
    if array.dtype != np.uint8 and not is_float and not is_16_bit:
        raise ImageError(f"{name}: must be uint8 in 0..255, uint16, or floating-point in 0..1")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        needed = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4), or a batch (N, H, W, C); a tensor may be (3, H, W)"
        raise ImageError(f"{name}: must be {needed}")
    height, width = array.shape[:2]
    _check_size(height, width, name, max_pixels)
    if array.dtype == np.uint8 and array.shape[2:] == (3,) and array.flags.c_contiguous:
        return array
    array = array[..., :3] if array.ndim == 3 else array
    if is_float:
        return from_floats(lambda box: array[box].astype(np.float32), height, width, name)
    if is_16_bit:
        return from_integers(lambda box: array[box], height, width, name, bit_depth=bit_depth)
    return from_bytes(lambda box: array[box], height, width)


def _is_tensor(source: object) -> TypeGuard[torch.Tensor]:
    # Whoever has a tensor has loaded PyTorch, which takes seconds; `isinstance(source, ())` is false.
    return isinstance(source, getattr(sys.modules.get("torch"), "Tensor", ()))


def _from_torch(tensor: torch.Tensor, max_pixels: int, bit_depth: int | None) -> ImageArray:
    import torch

    kind, way_out = str(tensor.dtype).removeprefix("torch."), _way_to_pixels(tensor)
    if way_out is not None:
        raise ImageError(f"{way_out[0]} tensor of {kind}: its pixels cannot be read; {way_out[1]}")
    name = f"tensor {tuple(tensor.shape)} {kind}"
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        needed = "(1, H, W) or (3, H, W), or a batch (N, 3, H, W); a NumPy array may be (H, W, 3)"
        raise ImageError(f"{name}: must be {needed}")
    is_float = tensor.is_floating_point()
    if not is_float and tensor.dtype not in (torch.uint8, torch.uint16):
        raise ImageError(f"{name}: must be uint8 in 0..255, uint16, or floating-point in 0..1")
    height, width = tensor.shape[1:]
    _check_size(height, width, name, max_pixels)
    channels_last = tensor.detach().permute(1, 2, 0)

    def read(box: Box) -> npt.NDArray[Any]:
        strip = channels_last[box]
        return (strip.float() if is_float else strip).cpu().numpy()

    with _clear_errors(name):
        if is_float:
            return from_floats(read, height, width, name)
        if tensor.dtype == torch.uint16:
            return from_integers(read, height, width, name, bit_depth=bit_depth)
        return from_bytes(read, height, width)


def _way_to_pixels(tensor: torch.Tensor) -> tuple[str, str] | None:
    """What kind of tensor without plain pixels it is, and what to do about it; None for one with pixels."""
    import torch

    if tensor.is_nested:
        return "nested", "give a list of its parts, .unbind()"
    if tensor.layout != torch.strided:
        return "sparse", "call .to_dense()"
    if tensor.is_meta:
        return "meta", "give one on a real device"
    if tensor.is_quantized:
        return "quantized", "call .dequantize()"
    return None


def _check_size(height: int, width: int, name: str, max_pixels: int) -> None:
    if height * width == 0:
        raise ImageError(f"{name}: is empty ({width}x{height} pixels)")
    if height * width > max_pixels:
        much = f"{width}x{height} pixels"
        raise ImageError(
            f"{name}: {much}, above the limit of {max_pixels}; scale it down, or raise AGLN_FAST_MAX_PIXELS"
        )


def _missing(path: Path) -> str:
    return f"{path}: no such file{did_you_mean(path.name, (file.name for file in path.parent.glob('*')))}"
