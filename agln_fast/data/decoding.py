"""Files of datasets become pictures in memory: what is damaged, animated or too large is refused, and named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageOps

from agln_fast import environment
from agln_fast.errors import DatasetError, printable

__all__ = ["FORMATS", "MASK_FORMATS", "image_suffixes", "read_image", "read_picture"]

# Not all that Pillow knows: opening EPS would start Ghostscript, and several others are containers without a decoder.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
"""Those that images may have, by Pillow's names."""

MASK_FORMATS = ("BMP", "GIF", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""Those that masks may have: a JPEG changes values where classes meet."""

_WITH_EXIF = ("AVIF", "JPEG", "PNG", "TIFF", "WEBP")


def image_suffixes() -> set[str]:
    """Of the formats, in lower case, with the dot."""
    return {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def read_picture(path: Path, formats: Sequence[str], advice: str) -> Image.Image:
    """The picture in a file, decoded as it is stored. Its size is looked at before it is decoded.

    Raises:
        DatasetError: it is missing, of another format or damaged (`advice` ends the message), animated, or of more
            pixels than `AGLN_FAST_MAX_PIXELS`.
    """
    Image.init()
    try:
        with Image.open(path, formats=[name for name in formats if name in Image.OPEN]) as picture:
            limit = environment.max_pixels()
            if picture.width * picture.height > limit:
                raise DatasetError(
                    f"{path}: {picture.width}x{picture.height} pixels, above the limit of {limit}; scale it down, or "
                    "raise AGLN_FAST_MAX_PIXELS"
                )
            if getattr(picture, "n_frames", 1) > 1:
                raise DatasetError(f"{path}: holds several pictures; save one of them")
            picture.load()
            if picture.format in _WITH_EXIF:
                picture.getexif()  # which may be read from the file
            return picture
    except (DatasetError, MemoryError):
        raise
    except Exception as error:  # decoders raise whatever they stumble over in damaged bytes
        what = printable(getattr(error, "strerror", None) or error)
        raise DatasetError(f"{path}: cannot be read as {' or '.join(formats)} ({what}); {advice}") from error


def read_image(path: Path, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """An image (H, W, 3) uint8 RGB to the mask of `size` (height, width).

    A rotation that is noted in EXIF is applied, as everywhere, unless the mask fits the stored pixels alone.

    Raises:
        DatasetError: as `read_picture`, or samples of more than 8 bits.
    """
    picture = read_picture(path, FORMATS, "restore it, or take it out of the dataset")
    if picture.mode[0] in "IF":
        raise DatasetError(f"{path}: grey of more than 8 bits (mode {picture.mode}); save it with 8 bits")
    if picture.format in _WITH_EXIF:
        lies = picture.getexif().get(ExifTags.Base.Orientation, 1) > 4
        if not (lies and picture.size[::-1] == size and size[0] != size[1]):
            picture = ImageOps.exif_transpose(picture)
    return np.array(picture.convert("RGB"))
