"""Figures go to files whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from agln_fast.errors import ImageError
from agln_fast.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FORMATS", "save_figure"]

# Without a date, and with fixed names inside SVG, equal figures give equal files.
FORMATS: dict[str, dict[str, Any]] = {".png": {}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""Suffixes that can be written, and the metadata that goes with each."""


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 200) -> None:
    """Write `figure` at its own size; the suffix of `path`, .png, .svg or .pdf, decides the format.

    A file there is replaced. Equal figures give equal bytes.

    Raises:
        ImageError: another suffix, or the file cannot be written.
    """
    import matplotlib

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in FORMATS:
        raise ImageError(f"{path}: suffix {suffix!r} is none for figures: use {', '.join(FORMATS)}")
    with replacing(path, ImageError) as part, matplotlib.rc_context({"svg.hashsalt": "agln-fast"}):
        figure.savefig(part, format=suffix[1:], dpi=dpi, metadata=FORMATS[suffix])
