"""`agln-fast run` for videos: a clip, a camera, an address or pictures of a sequence become an overlay and labels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from agln_fast.cli.console import err, out, print_json, progress_bar, shown
from agln_fast.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from agln_fast.runtime.segmenter import Segmenter
    from agln_fast.video.convert import Outputs, Report
    from agln_fast.video.source import Source

__all__ = ["VideoOptions", "check_no_video", "concerns_video", "run_video"]

_USUAL_RATE = Fraction(25)
_NUMBERED = "%06d.png"


@dataclass(frozen=True)
class VideoOptions:
    """Options of `run` that belong to videos, as they are typed."""

    mask: Path | None = None
    codec: str | None = None
    crf: int | None = None
    frames: str | None = None
    every: int | None = None
    fps: str | None = None
    seconds: float | None = None


def concerns_video(images: Sequence[str], output: Path | None, options: VideoOptions) -> bool:
    """Whether what is read or written is a video, by the names alone."""
    from agln_fast.video.clip import is_clip
    from agln_fast.video.encoding import CONTAINERS
    from agln_fast.video.pictures import is_pattern

    writes = output is not None and output.suffix.lower() in CONTAINERS
    return writes or options.mask is not None or any(is_clip(name) or is_pattern(name) for name in images)


def check_no_video(output: Path | None, options: VideoOptions) -> Path:
    """The folder for pictures.

    Raises:
        ConfigError: there is none, or options of videos are given.
    """
    for each in fields(options):
        if getattr(options, each.name) is not None:
            raise ConfigError(f"--{each.name} is for videos: name one, or write one, such as -o out.mp4")
    if output is None:
        raise ConfigError("missing option -o: give a folder for the overlays and label maps")
    return output


def run_video(
    images: Sequence[str],
    output: Path | None,
    options: VideoOptions,
    load: Callable[[], Segmenter],
    *,
    recursive: bool,
    bit_depth: int | None,
    json: bool,
) -> None:
    """Segment what `images` name, frame by frame; `load` opens the engine when all else has been checked.

    Raises:
        typer.Exit: 1, when frames were skipped, or reading ended early.
    """
    from agln_fast.video.convert import Report, convert
    from agln_fast.video.selection import Selection, parse_frames, parse_rate

    outputs = _outputs(output, options)
    start, stop = parse_frames(options.frames or ":")
    fps = parse_rate(options.fps) if options.fps is not None else None
    every = 1 if options.every is None else options.every
    selection = Selection(start, stop, every, fps, options.seconds)  # of pictures, `fps` is their own rate
    report = Report()
    with _source(images, fps or _USUAL_RATE, recursive, bit_depth) as source:
        _check_apart(images, source, outputs)
        with load() as segment, progress_bar("frames", remaining=True, rate=True) as bar:
            task = bar.add_task("segment", total=selection.count(source.total, source.rate))
            try:
                convert(segment, source, selection, outputs, report, lambda: bar.advance(task))
            except KeyboardInterrupt:
                if report.frames:
                    err.print(f"{shown(source.name)}: ended after {_frames(report.frames)}", highlight=False)
                raise
            engine = {"engine": segment.engine.name, "device": segment.device, "precision": segment.precision}
    _tell(source, outputs, report, engine, json)
    if source.damaged or source.broken:
        raise typer.Exit(1)


def _outputs(output: Path | None, options: VideoOptions) -> Outputs:
    """Names, and the encoding; checked.

    Raises:
        ConfigError: a suffix or codec that cannot be, or one file for both.
        ImageError: a place that cannot be written.
    """
    from agln_fast.cli.places import check_file, check_folder
    from agln_fast.video.convert import LABELS, Outputs
    from agln_fast.video.encoding import CONTAINERS, choose_encoding
    from agln_fast.video.pictures import is_numbered

    mask, encoding = options.mask, None
    if output is not None:
        encoding = choose_encoding(output, options.codec, options.crf)
        check_file(output, ImageError)
    elif mask is None:
        raise ConfigError("missing option -o: give a video for the overlay, such as -o out.mp4, or --mask")
    elif options.codec is not None or options.crf is not None:
        raise ConfigError("--codec and --crf are for the overlay: give -o, too; labels stay exact")
    if mask is not None and mask.suffix.lower() == LABELS:
        if output is not None and os.path.realpath(mask) == os.path.realpath(output):
            raise ConfigError(f"{mask}: is named for the overlay and for the labels; choose two names")
        check_file(mask, ImageError)
    elif mask is not None:
        if mask.suffix.lower() in CONTAINERS:
            raise ConfigError(f"{mask}: labels stay exact in a file {LABELS}, or as PNG files in a folder")
        if not is_numbered(mask):
            mask = mask / _NUMBERED
        elif mask.suffix.lower() not in (".png", ".tif", ".tiff"):
            raise ConfigError(f"{mask}: labels stay exact as .png or .tif")
        check_folder(mask.parent, ImageError)
    return Outputs(output, encoding, mask)


def _source(images: Sequence[str], rate: Fraction, recursive: bool, bit_depth: int | None) -> Source:
    from agln_fast.cli.inputs import find_images
    from agln_fast.video.clip import Clip, is_clip
    from agln_fast.video.pictures import Pictures, is_pattern, list_numbered

    first, single = images[0], len(images) == 1
    if not single:
        for name in images:
            if is_clip(name) or is_pattern(name):
                raise ConfigError(f"{name}: one video at a time; pictures may be several")
    if single and is_pattern(first):
        return Pictures(list_numbered(first), rate, first, bit_depth)
    if single and (is_clip(first) or os.path.isfile(first)):
        for option, given in (("--recursive", recursive), ("--bit-depth", bit_depth)):
            if given:
                raise ConfigError(f"{option} is for pictures; {first} is a video")
        return Clip(first)
    found, failed = find_images(images, recursive=recursive)
    if failed:
        raise ImageError("; ".join(failed.values()))
    return Pictures(found, rate, first if single else f"{len(found)} pictures", bit_depth)


def _check_apart(images: Sequence[str], source: Source, outputs: Outputs) -> None:
    """Nothing is written over what is read.

    Raises:
        ImageError: it would be.
    """
    from agln_fast.video.pictures import Pictures, is_numbered, numbered

    files = source.files if isinstance(source, Pictures) else [Path(name) for name in images]
    inputs = {os.path.realpath(file) for file in files}
    written = [path for path in (outputs.video, outputs.mask) if path is not None and not is_numbered(path)]
    if outputs.mask is not None and is_numbered(outputs.mask):
        written += [numbered(outputs.mask, index) for index in range(len(files))]
    for path in written:
        if os.path.realpath(path) in inputs:
            raise ImageError(f"{path}: is itself an input; choose another name")


def _tell(source: Source, outputs: Outputs, report: Report, engine: dict[str, str], json: bool) -> None:
    rate = report.frames / report.seconds if report.seconds else 0.0
    if json:
        print_json(
            {
                **engine,
                "input": source.name,
                "frames": report.frames,
                "damaged": source.damaged,
                "height": report.height,
                "width": report.width,
                "seconds": round(report.seconds, 3),
                "frames_per_second": round(rate, 3),
                "overlay": outputs.video and str(outputs.video),
                "labels": outputs.mask and str(outputs.mask),
                "left_out": report.left_out,
                "ended_early": source.broken,
            }
        )
    else:
        size = f"{report.width}x{report.height}"
        done = f"{_frames(report.frames)} of {size} in {report.seconds:.1f} s, {rate:.1f} a second"
        out.print(f"{engine['engine']} on {engine['device']} in {engine['precision']}: {done}", highlight=False)
        written = [str(path) for path in (outputs.video, outputs.mask) if path is not None]
        out.print(shown("  ".join(written)), highlight=False)
    for reason in report.left_out:
        err.print(shown(reason), highlight=False)
    if source.damaged:
        skipped = _frames(source.damaged, "damaged ")
        err.print(f"[bold red]skipped:[/] {skipped}; the first: {shown(source.damage)}", highlight=False)
    if source.broken:
        err.print(f"[bold red]ended early:[/] {shown(f'{source.name}: {source.broken}')}", highlight=False)


def _frames(count: int, kind: str = "") -> str:
    return f"{count} {kind}{'frame' if count == 1 else 'frames'}"
