"""Images in: decoding whatever the user has, and fitting it into an engine's frame.

Everything here is NumPy arrays (H, W, 3) uint8 RGB, C-contiguous; "image" means that and nothing else.
"""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from agln_fast import environment
from agln_fast.contract import IOContract
from agln_fast.errors import ConfigError, ImageError, did_you_mean

__all__ = [
    "ImageArray",
    "ImageSource",
    "Placement",
    "as_image_list",
    "fit",
    "list_images",
    "load_image",
    "pack",
    "windows",
]

ImageArray: TypeAlias = npt.NDArray[np.uint8]
ImageSource: TypeAlias = str | os.PathLike[str] | Image.Image | npt.NDArray[Any] | torch.Tensor

# Not all that Pillow knows: opening EPS would start Ghostscript, and several others are containers without a decoder.
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")


def load_image(source: ImageSource, *, max_pixels: int | None = None) -> ImageArray:
    """Decode one image to (H, W, 3) uint8 RGB, C-contiguous.

    Alpha is dropped, not composed over a colour: so do the training pipelines (`convert("RGB")` of Pillow, `imread` of
    OpenCV). EXIF orientation is applied. 16-bit grey is scaled by 255/65535 and rounded.

    Args:
        source: a path; a PIL image (of several frames, the current one); a NumPy array (H, W), (H, W, 1), (H, W, 3) or
            (H, W, 4) uint8; or a torch tensor (1, H, W) or (3, H, W), uint8 or floating-point in 0..1. An array that
            has the returned form already is not copied: the result shares its memory.
        max_pixels: the largest H * W; None for `AGLN_FAST_MAX_PIXELS` or its default. A file's header is checked
            before anything is decoded. For files, Pillow's own limit of 2 * `PIL.Image.MAX_IMAGE_PIXELS` stays in
            force above it.

    Raises:
        ImageError: the source is missing, no image, damaged, animated, empty, too large, or of a wrong type or shape.
    """
    if max_pixels is None:
        max_pixels = environment.max_pixels()
    if isinstance(source, Image.Image):
        return _from_pil(source, "PIL image", max_pixels)
    if isinstance(source, np.ndarray):
        return _from_numpy(source, max_pixels)
    if isinstance(source, torch.Tensor):
        return _from_torch(source, max_pixels)
    try:
        path = Path(source)
    except TypeError as error:
        needed = "a path, a PIL image, a NumPy array (H, W, 3) or a torch tensor (3, H, W)"
        raise ImageError(f"{type(source).__name__} is no image: needs {needed}") from error
    return _from_file(path, max_pixels)


def as_image_list(sources: ImageSource | Sequence[ImageSource]) -> tuple[list[ImageSource], bool]:
    """Flatten what a user passes into a list of single images, and say whether it was one single image.

    A list or tuple gives its items, an array (N, H, W, C) or a tensor (N, C, H, W), also inside a list, N images.
    """
    if isinstance(sources, (list, tuple)):
        return [single for item in sources for single in as_image_list(item)[0]], False
    if isinstance(sources, (np.ndarray, torch.Tensor)) and sources.ndim == 4:
        return list(sources), False
    return [cast(ImageSource, sources)], True


def list_images(pattern: str | Path) -> list[Path]:
    """The image files that a file name, a folder or a glob pattern stands for, sorted.

    A file is taken whatever its suffix; a folder (not its subfolders) or a pattern (`**` too) gives its image files.

    Raises:
        ImageError: there is none.
    """
    path = Path(pattern)
    if path.is_file():
        return [path]
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS}
    found = list(path.iterdir()) if path.is_dir() else [Path(name) for name in glob.glob(str(path), recursive=True)]
    files = [file for file in found if file.is_file()]
    images = sorted(file for file in files if file.suffix.lower() in suffixes)
    if images:
        return images
    if files:
        raise ImageError(f"{path}: none of its {len(files)} files is an image ({', '.join(sorted(suffixes))})")
    raise ImageError(f"{path}: holds no files" if path.is_dir() else _missing(path))


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
        raise ImageError(f"{name}: is not an image of a known format ({', '.join(_FORMATS)})") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name}: is too large for Pillow: {error}") from error
    except Exception as error:  # decoders raise whatever they stumble over in damaged bytes
        what = "cannot be read" if getattr(error, "errno", None) else "cannot be decoded"
        raise ImageError(f"{name}: {what}: {getattr(error, 'strerror', None) or error}") from error


def _from_file(path: Path, max_pixels: int) -> ImageArray:
    Image.init()
    with _clear_errors(path):
        if path.is_dir():
            raise ImageError(f"{path}: is a folder; needs an image file")
        with Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN]) as image:
            # Phones write MPO: a JPEG whose further frames are thumbnails or depth maps, never an animation.
            if getattr(image, "is_animated", False) and image.format != "MPO":
                raise ImageError(f"{path}: has several frames; needs a still image, or one frame as a PIL image")
            return _from_pil(image, str(path), max_pixels)


def _from_pil(image: Image.Image, name: str, max_pixels: int) -> ImageArray:
    _check_size(image.height, image.width, name, max_pixels)
    with _clear_errors(name):
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            return _from_16_bit(np.asarray(image), name)
        if image.mode == "F":
            raise ImageError(f"{name}: has floating-point pixels; needs 8 or 16 bits per channel")
        if image.mode == "P":  # Pillow warns where a palette with alpha loses it on the way
            image = image.convert("RGBA")
        return np.array(image.convert("RGB"))


def _from_16_bit(grey: npt.NDArray[Any], name: str) -> ImageArray:
    if grey.min() < 0 or grey.max() > 65535:
        raise ImageError(f"{name}: has 32-bit pixels; needs 8 or 16 bits per channel")
    return _rgb((grey.astype(np.uint32) + 128) // 257)


def _from_numpy(array: npt.NDArray[Any], max_pixels: int) -> ImageArray:
    name = f"NumPy array {array.shape} {array.dtype}"
    if array.dtype != np.uint8:
        raise ImageError(f"{name}: must be uint8, 0..255")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"{name}: must be (H, W), (H, W, 1), (H, W, 3) or (H, W, 4); a tensor may be (3, H, W)")
    _check_size(array.shape[0], array.shape[1], name, max_pixels)
    return _rgb(array)


def _from_torch(tensor: torch.Tensor, max_pixels: int) -> ImageArray:
    name = f"tensor {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ImageError(f"{name}: must be (1, H, W) or (3, H, W); a NumPy array may be (H, W, 3)")
    if tensor.dtype != torch.uint8 and not tensor.is_floating_point():
        raise ImageError(f"{name}: must be uint8 in 0..255, or floating-point in 0..1")
    _check_size(tensor.shape[1], tensor.shape[2], name, max_pixels)
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()
        low, high = tensor.aminmax()
        if not (low >= 0 and high <= 1):  # false for NaN, too
            raise ImageError(f"{name}: has values from {low:g} to {high:g}; floating-point images are RGB in 0..1")
        tensor = (tensor * 255).round().to(torch.uint8)
    return _rgb(tensor.permute(1, 2, 0).numpy())


def _rgb(pixels: npt.NDArray[Any]) -> ImageArray:
    """(H, W) or (H, W, 1) grey, (H, W, 3) or (H, W, 4) -> (H, W, 3)."""
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        pixels = np.broadcast_to(pixels.reshape(*pixels.shape[:2], 1), (*pixels.shape[:2], 3))
    return np.ascontiguousarray(pixels[..., :3], dtype=np.uint8)


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
