"""How many bits of its 16 or 32 an image's samples really use.

Cameras give 10, 12 or 14 bits and store them in 16. Taken as 16 bits, such a picture is black or nearly so. What the
file declares is believed; what the user says stands above it; and what is left is judged by the largest value.
"""

from __future__ import annotations

import logging
import sys
from typing import BinaryIO, TypeGuard, cast

from PIL import Image, PngImagePlugin, PpmImagePlugin, TiffImagePlugin

from agln_fast.errors import ConfigError, ImageError

__all__ = ["check_bit_depth", "choose_depth", "declared_depth", "is_deep_colour", "select_low_bytes", "unscale"]

_log = logging.getLogger("agln_fast.images")

_BITS_PER_SAMPLE, _MAX_SAMPLE_VALUE, _PLANAR_CONFIGURATION = 258, 281, 284  # TIFF tags


def check_bit_depth(bit_depth: int | None) -> None:
    """Raise ConfigError unless it is None or from 1 to 16."""
    if bit_depth is not None and (isinstance(bit_depth, (bool, float)) or bit_depth not in range(1, 17)):
        raise ConfigError(f"bit depth {bit_depth!r}: must be a whole number from 1 to 16")


def choose_depth(
    largest: int, name: str, *, declared: int | None = None, bit_depth: int | None = None, wide: bool = False
) -> int:
    """The depth, 1 to 16 bits, of samples whose largest value in the image is `largest`, 0..65535.

    Without a declaration, values below 1/8 of the range are refused: a picture of 12 bits taken as 16 is black, and a
    picture of 16 bits that is that dark has nothing to segment, either. Between 1/8 and 1/4 it may be a dark picture or
    one of 14 bits: it is taken as 16 bits, with a warning to the logger `agln_fast.images`.

    Args:
        largest: as above.
        name: of the image, for messages.
        declared: what the file says. Values above it are those of a writer that scaled them to 16 bits, as the PNG
            specification demands.
        bit_depth: what the user says.
        wide: whether the samples are stored in 32 bits: nobody does so for more than 8 bits of precision by intent, so
            that values up to 255 are 8 bits.

    Raises:
        ImageError: as above, or a value is larger than `bit_depth` allows.
    """
    if bit_depth is not None:
        if largest >= 2**bit_depth:
            needed = f"its largest value is {largest}, which takes {largest.bit_length()}"
            raise ImageError(f"{name}: cannot have a bit depth of {bit_depth}: {needed}")
        return bit_depth
    if declared is not None:
        return declared if largest < 2**declared else 16
    if wide and largest <= 255:
        return 8
    if 0 < largest < 2**14:
        likely = next(depth for depth in (8, 10, 12, 14) if largest < 2**depth)
        what = f"{name}: its largest value is {largest} of 65535"
        advice = f"bit_depth={likely} (--bit-depth {likely})"
        if largest < 2**13:
            raise ImageError(f"{what}: all but black as 16 bits; if it has {likely} bits, give {advice}, else 16")
        _log.warning("%s: taken as 16 bits, a dark picture; if it has %d, give %s", what, likely, advice)
    return 16


def declared_depth(image: Image.Image) -> int | None:
    """The bits of its samples by the file's own account, for an image that is not loaded yet; None without one.

    It is the chunk sBIT of a PNG, BitsPerSample of a TIFF (or MaxSampleValue, where it is 2**n - 1), and 16 for a
    PPM whose samples Pillow will scale by its header.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2.get(_BITS_PER_SAMPLE)
        if bits == (12,):  # Pillow reads no other between 8 and 16
            return 12
        largest = image.tag_v2.get(_MAX_SAMPLE_VALUE)
        largest = largest[0] if isinstance(largest, tuple) and largest else largest
        return next((depth for depth in range(9, 16) if largest == 2**depth - 1), None)
    if isinstance(image, PngImagePlugin.PngImageFile) and image.fp is not None:
        return _significant_bits(cast(BinaryIO, image.fp))
    # 65535 is what programs write that know nothing of the values, Pillow and OpenCV among them.
    return 16 if _maxval(image) not in (None, 65535) else None


def unscale(image: Image.Image) -> int | None:
    """Let Pillow decode a PPM's 16-bit samples as they are, not scaled by its header; the depth that it declares.

    `image` is not loaded yet. Others, and those whose largest value is not 2**n - 1, are left alone.
    """
    maxval = _maxval(image)
    if maxval is None or maxval & (maxval + 1):
        return None
    image = cast(PpmImagePlugin.PpmImageFile, image)
    if any(tile.codec_name != "ppm" for tile in image.tile):
        return None
    raw = "I;16B" if image.mode == "I" else "RGB;16B"
    image.tile = [tile._replace(codec_name="raw", args=(raw, 0, 1)) for tile in image.tile]
    return None if maxval == 65535 else maxval.bit_length()


def is_deep_colour(image: Image.Image, name: str) -> bool:
    """Whether `image`, not loaded yet, has colour samples of 16 bits, of which Pillow keeps the upper 8.

    Raises:
        ImageError: it is a TIFF with a plane for each colour: Pillow takes its bytes for samples.
    """
    if _is_planar(image) and set(_raw_modes(image)) <= set("RGBA") and 16 in image.tag_v2.get(_BITS_PER_SAMPLE, ()):
        raise ImageError(
            f"{name}: is a TIFF of 16 bits with a plane for each colour; save it with one for all, or as PNG"
        )
    if _maxval(image) is not None:
        return image.mode == "RGB"
    return any(";16" in raw and not raw.startswith("I") for raw in _raw_modes(image))


def select_low_bytes(image: Image.Image) -> bool:
    """Make Pillow keep the lower 8 bits of 16-bit colour, by the other byte order; False where it knows none."""
    native = ("16B", "16L") if sys.byteorder == "little" else ("16L", "16B")
    other = {"16B": "16L", "16L": "16B", "16N": native[0]}
    raws = _raw_modes(image)
    if (
        not raws
        or _is_planar(image)
        or not all(raw[:-4] in ("RGB", "RGBX", "RGBA") and raw[-3:] in other for raw in raws)
    ):
        return False
    image = cast(PngImagePlugin.PngImageFile, image)
    for index, (tile, raw) in enumerate(zip(image.tile, raws, strict=True)):
        swapped = raw[:-3] + other[raw[-3:]]
        args = swapped if isinstance(tile.args, str) else (swapped, *cast("tuple[object, ...]", tile.args)[1:])
        image.tile[index] = tile._replace(args=args)
    return True


def _is_planar(image: Image.Image) -> TypeGuard[TiffImagePlugin.TiffImageFile]:
    return isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PLANAR_CONFIGURATION) == 2


def _raw_modes(image: Image.Image) -> list[str]:
    """How Pillow will unpack each tile of an image that is not loaded yet, e.g. "RGB;16B"."""
    args = [tile.args for tile in getattr(image, "tile", [])]
    return [str(each[0] if isinstance(each, tuple) and each else each) for each in args]


def _maxval(image: Image.Image) -> int | None:
    """The largest value by a PPM's header, if Pillow's decoder scales by it and it is above 255."""
    for tile in getattr(image, "tile", []):
        if tile.codec_name.startswith("ppm") and isinstance(tile.args, tuple) and tile.args[-1] > 255:
            return int(tile.args[-1])
    return None


def _significant_bits(file: BinaryIO) -> int | None:
    """The largest entry for a colour in a PNG's chunk sBIT; the file is left where it stood."""
    before = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8 and head[4:] not in (b"PLTE", b"IDAT", b"IEND"):
            length = int.from_bytes(head[:4], "big")
            if head[4:] == b"sBIT":
                bits = file.read(min(length, 4))
                depth = max(bits[: 1 if len(bits) < 3 else 3], default=0)  # the last of 2 or 4 is alpha's
                return depth if 0 < depth < 16 else None
            file.seek(length + 4, 1)
    finally:
        file.seek(before)
    return None
