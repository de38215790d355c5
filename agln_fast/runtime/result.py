"""What comes out: labels, and the ways to look at them."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from agln_fast.data.classes import ClassSet
from agln_fast.errors import ConfigError, ImageError, choose
from agln_fast.files import replacing
from agln_fast.runtime.images import SOFTWARE, ImageArray
from agln_fast.runtime.pixels import boxes

__all__ = ["Kind", "Labels", "Result", "Timing"]

Labels: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.int32]
Kind = Literal["overlay", "labels"]

_EXACT_FORMATS = {".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF"}
_FORMATS = {**_EXACT_FORMATS, ".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".webp": "WEBP"}
_LEGEND_ROWS = 12
_SMALLEST_FONT = 12  # pixels
_PITCH = 1.5  # from one row of the legend to the next, in font sizes
_PAPER, _INK, _FAINT = (250, 250, 250), (32, 33, 36), (118, 120, 126)


@dataclass(frozen=True)
class Timing:
    """Wall-clock time of one call, milliseconds: decoding and resizing, the engine, and the way back to labels.

    Waiting for other threads to leave the engine is in none of them.
    """

    preprocess: float
    engine: float
    postprocess: float

    @property
    def total(self) -> float:
        """The sum of the three, milliseconds."""
        return self.preprocess + self.engine + self.postprocess


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """A segmented image.

    labels: (H, W) class ids at the image's own size; uint8, or int32 for more than 256 classes.
    image: (H, W, 3) uint8 RGB, as decoded.
    class_set: names and colours of the ids.
    timing: of this image alone, or its equal part of a batch.
    margin: (H, W) float32, how far the first class is ahead of the second: of their logits, or of their probabilities
        with test-time augmentation. None if it was not asked for, or the engine returns labels.
    """

    labels: Labels
    image: ImageArray
    class_set: ClassSet
    timing: Timing
    margin: npt.NDArray[np.float32] | None = None

    def __repr__(self) -> str:
        height, width = self.labels.shape
        largest = ", ".join(f"{name} {_percent(share)}" for name, share in list(self.shares.items())[:3])
        return f"<Result {width}x{height}, {len(self.shares)} classes: {largest}; {self.timing.total:.1f} ms>"

    @functools.cached_property
    def shares(self) -> dict[str, float]:
        """Share of the pixels, above 0 and up to 1, of each class that is present; the largest first."""
        counts = np.zeros(len(self.class_set.classes), np.intp)
        for box in boxes(*self.labels.shape):  # bincount takes 8 bytes a pixel
            counts += np.bincount(self.labels[box].reshape(-1), minlength=len(counts))
        largest_first = np.argsort(-counts, kind="stable")
        return {self.class_set.classes[i]: float(counts[i]) / self.labels.size for i in largest_first if counts[i]}

    @property
    def names(self) -> list[str]:
        """Names of the classes that are present; the largest first."""
        return list(self.shares)

    def overlay(self, alpha: float = 0.5, legend: bool = True) -> Image.Image:
        """The image with the classes' colours blended over it, and a legend on its right: a PIL image, mode RGB.

        Args:
            alpha: from 0, the image alone, to 1, the colours alone.
            legend: whether to add the legend. It names the largest classes; text grows with the image. Where the
                legend is higher than the image, the result is higher, too.

        Raises:
            ConfigError: `alpha` is not in 0..1.
        """
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha {alpha}: must be from 0 to 1")
        height, width = self.labels.shape
        if legend:
            rows = self._legend_rows()
            side, fitting = math.sqrt(self.labels.size), height / (_PITCH * len(rows) + 1)
            panel = _draw_legend(rows, max(_SMALLEST_FONT, int(min(side / 32, fitting))))
            page = Image.new("RGB", (width + panel.width, max(height, panel.height)), _PAPER)
            page.paste(panel, (width, 0))
        else:
            page = Image.new("RGB", (width, height))
        palette = np.array(self.class_set.palette, np.uint8)
        for box in boxes(height, width):  # beside the page, 4 bytes a pixel, only a strip is held
            colours = Image.fromarray(palette[self.labels[box]])
            blended = Image.blend(Image.fromarray(self.image[box]), colours, alpha)
            page.paste(blended, (box[1].start, box[0].start))
        return page

    def label_image(self) -> Image.Image:
        """The class ids as pixel values: a PIL image, mode P with the palette; I;16 without for over 256 classes."""
        if len(self.class_set.classes) > 256:
            return Image.fromarray(self.labels.astype(np.uint16))
        image = Image.fromarray(self.labels.astype(np.uint8, copy=False))
        image.putpalette(np.array(self.class_set.palette, np.uint8).tobytes())
        return image

    def save(self, path: str | Path, kind: Kind = "overlay") -> None:
        """Write the overlay or the label image; the suffix of `path` decides the format. A file there is replaced.

        The file appears whole or not at all. Its EXIF tag Software (BMP has none) keeps it from being taken for an
        input where a folder is segmented again. Labels are written only where they stay exact: PNG and TIFF.

        Raises:
            ConfigError: `kind` is neither "overlay" nor "labels".
            ImageError: an unknown suffix, or one that would alter labels; the file cannot be written.
        """
        path = Path(path)
        choose("kind", kind, get_args(Kind))
        formats = _FORMATS if kind == "overlay" else _EXACT_FORMATS
        suffix = path.suffix.lower()
        if suffix not in formats:
            raise ImageError(f"{path}: suffix {suffix!r} is none for {kind}: use {', '.join(formats)}")
        image, exif = self._picture(kind)
        with replacing(path, ImageError) as part:
            try:
                image.save(part, formats[suffix], exif=exif)
            except ValueError as error:  # too large for the format
                raise OSError(error) from error

    def png(self, kind: Kind = "overlay", notes: Mapping[str, str] | None = None) -> bytes:
        """The PNG file that `save` would write, with `notes`: texts by their keywords, before the pixels.

        Raises:
            ConfigError: `kind` is neither "overlay" nor "labels".
        """
        choose("kind", kind, get_args(Kind))
        texts = PngInfo()
        for keyword, text in (notes or {}).items():
            texts.add_text(keyword, text)
        image, exif = self._picture(kind)
        image.save(file := io.BytesIO(), "PNG", exif=exif, pnginfo=texts)
        return file.getvalue()

    def _picture(self, kind: Kind) -> tuple[Image.Image, Image.Exif]:
        """What is saved, and the tag by which it is known again."""
        exif = Image.Exif()
        exif[ExifTags.Base.Software] = SOFTWARE
        return self.overlay() if kind == "overlay" else self.label_image(), exif

    def _legend_rows(self) -> list[_Row]:
        colours = dict(zip(self.class_set.classes, self.class_set.palette, strict=True))
        largest = list(self.shares.items())
        rows = [_Row(name, share, colours[name]) for name, share in largest[:_LEGEND_ROWS]]
        rest = [share for _, share in largest[_LEGEND_ROWS:]]
        return [*rows, _Row(f"+ {len(rest)} more", sum(rest), None)] if rest else rows


class _Row(NamedTuple):
    name: str
    share: float
    colour: tuple[int, int, int] | None


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.0005 else "<0.1%"


def _draw_legend(rows: list[_Row], size: int) -> Image.Image:
    """`size` is that of the font, pixels; everything else is measured in it."""
    font = ImageFont.load_default(size)
    names = max(font.getlength(row.name) for row in rows)
    percents = max(font.getlength(_percent(row.share)) for row in rows)
    pitch, left = round(_PITCH * size), round(2.2 * size)
    right = math.ceil(left + names + size + percents)
    panel = Image.new("RGB", (right + size, len(rows) * pitch + size), _PAPER)
    draw = ImageDraw.Draw(panel)
    for index, row in enumerate(rows):
        middle = (size + pitch) // 2 + index * pitch
        if row.colour is not None:
            corner = round(0.8 * size), middle - size // 2
            box = (*corner, corner[0] + size - 1, corner[1] + size - 1)
            draw.rectangle(box, fill=row.colour, outline=_FAINT, width=max(1, size // 16))
        draw.text((left, middle), row.name, fill=_INK if row.colour else _FAINT, font=font, anchor="lm")
        draw.text((right, middle), _percent(row.share), fill=_FAINT, font=font, anchor="rm")
    return panel
