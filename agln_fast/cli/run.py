"""`agln-fast run`: segment images with a bundle."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agln_fast import interruption
from agln_fast.cli.console import Json, err, out, print_json, progress_bar, shown
from agln_fast.errors import ImageError

if TYPE_CHECKING:
    from agln_fast.runtime.result import Result
    from agln_fast.runtime.segmenter import Segmenter

__all__ = ["run"]

_VIDEOS = "Videos"


def run(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.agln.")],
    images: Annotated[
        list[str], typer.Argument(help="Image files, folders or glob patterns; or a video, a camera, an address.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--to", help="Folder for NAME.overlay.png and NAME.labels.png; or a video, e.g. overlay.mp4."
        ),
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, or a backend: openvino, onnxruntime, torch, fused, ...")] = "auto",
    precision: Annotated[str | None, typer.Option(help="fp32, fp16, bf16 or int8; default any.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default the engine's own.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    recursive: Annotated[
        bool, typer.Option("-r", "--recursive", help="Search folders with all folders in them.")
    ] = False,
    bit_depth: Annotated[
        int | None,
        typer.Option(help="Bits of samples stored in 16 or 32, e.g. 12; default by the file.", min=1, max=16),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(help="Labels, exact: a file .mkv, or a folder for PNG files.", rich_help_panel=_VIDEOS),
    ] = None,
    codec: Annotated[
        str | None, typer.Option(help="FFmpeg's name of an encoder; default libx264.", rich_help_panel=_VIDEOS)
    ] = None,
    crf: Annotated[
        int | None,
        typer.Option(help="Constant rate factor, 0 is best; default 20 of libx264.", min=0, rich_help_panel=_VIDEOS),
    ] = None,
    frames: Annotated[
        str | None, typer.Option(help="A:B, frames A up to but not including B, from 0.", rich_help_panel=_VIDEOS)
    ] = None,
    every: Annotated[int | None, typer.Option(help="Each Nth of these frames.", min=1, rich_help_panel=_VIDEOS)] = None,
    fps: Annotated[
        str | None,
        typer.Option(help="Pictures a second, default 25; of a video at most so many.", rich_help_panel=_VIDEOS),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="End after so many seconds of the video.", rich_help_panel=_VIDEOS)
    ] = None,
    json: Json = False,
) -> None:
    """Segment images; write an overlay with a legend and a label map with palette for each. Or segment a video.

    An image that cannot be used is reported and the rest go on; the exit code is 1 then, and 4 if none can be used.
    What agln-fast wrote into a folder in an earlier run is not segmented again.

    A video is clip.mp4, /dev/video0, an address, frames/%05d.png, or pictures with -o overlay.mp4. Ctrl-C ends it, and
    leaves a video that plays.
    """
    from agln_fast.cli.inputs import find_images
    from agln_fast.cli.places import check_folder
    from agln_fast.cli.request import open_matching
    from agln_fast.cli.video import VideoOptions, check_no_video, concerns_video, run_video

    opened = open_matching(bundle, backend, precision, device, threads)
    video = VideoOptions(mask, codec, crf, frames, every, fps, seconds)
    if concerns_video(images, output, video):

        def load_engine() -> Segmenter:
            from agln_fast.runtime.segmenter import load

            return load(opened, backend, precision=precision, device=device, threads=threads)

        run_video(images, output, video, load_engine, recursive=recursive, bit_depth=bit_depth, json=json)
        return
    output = check_no_video(output, video)
    found, failed = find_images(images, recursive=recursive)
    ends = _telling_ends(found)
    names, ends_of = _names(ends), dict(zip(map(str, found), ends, strict=True))
    check_folder(output, ImageError)

    # From here on PyTorch is needed, which takes seconds to load.
    from agln_fast.runtime.segmenter import load

    rows: list[dict[str, Any]] = []
    loaded = load(opened, backend, precision=precision, device=device, threads=threads)
    with loaded as segment, progress_bar("images") as bar:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ImageError(f"{output}: cannot be created ({error.strerror}); choose another folder") from None
        inputs = {os.path.abspath(path) for path in found}
        segmented = bar.track(_segment(segment, found, bit_depth), total=len(found), description="segment")
        for path, name, result in zip(found, names, segmented, strict=True):
            overlay, labels = output / f"{name}.overlay.png", output / f"{name}.labels.png"
            try:
                if isinstance(result, ImageError):
                    raise result
                if not inputs.isdisjoint(map(os.path.abspath, (overlay, labels))):
                    raise ImageError(f"{path}: {overlay} or {labels} is itself an input; choose another folder")
                result.save(overlay)
                result.save(labels, kind="labels")
            except ImageError as error:
                failed[str(path)] = str(error)
                continue
            rows.append(
                {
                    "image": str(path),
                    "height": result.labels.shape[0],
                    "width": result.labels.shape[1],
                    "shares": {name: round(share, 6) for name, share in result.shares.items()},
                    "milliseconds": {
                        "preprocess": round(result.timing.preprocess, 3),
                        "engine": round(result.timing.engine, 3),
                        "postprocess": round(result.timing.postprocess, 3),
                    },
                    "overlay": str(overlay),
                    "labels": str(labels),
                }
            )
        engine = {"engine": segment.engine.name, "device": segment.device, "precision": segment.precision}
    if json:
        print_json({**engine, "images": rows, "failed": failed})
    else:
        table = Table(
            title=f"{engine['engine']} on {engine['device']} in {engine['precision']}", box=SIMPLE_HEAD, pad_edge=False
        )
        for column in ("image", "size", "largest classes", "pre ms", "engine ms", "post ms"):
            table.add_column(column, justify="right" if column.endswith("ms") else "left", overflow="fold")
        for row in rows:
            largest = ", ".join(f"{name} {share:.0%}" for name, share in list(row["shares"].items())[:3])
            times = [f"{value:.1f}" for value in row["milliseconds"].values()]
            table.add_row(shown(ends_of[row["image"]]), f"{row['width']}x{row['height']}", shown(largest), *times)
        out.print(table)
        for row in rows:
            out.print(shown(f"{row['overlay']}  {row['labels']}"), highlight=False)
    for message in failed.values():
        err.print(f"[bold red]failed:[/] {shown(message)}", highlight=False)
    if failed:
        raise typer.Exit(1 if rows else ImageError.exit_code)


def _segment(segment: Segmenter, paths: list[Path], bit_depth: int | None) -> Iterator[Result | ImageError]:
    """Results in the order of `paths`, as many images a run as the engine takes, and errors in their place."""
    size = segment.contract.max_batch
    for start in range(0, len(paths), size):
        interruption.check()
        chunk = paths[start : start + size]
        try:
            yield from segment(list(chunk), bit_depth=bit_depth)
        except ImageError as error:
            if len(chunk) == 1:
                yield error
                continue
            for path in chunk:
                try:
                    yield segment(path, bit_depth=bit_depth)
                except ImageError as error:
                    yield error


def _telling_ends(paths: list[Path]) -> list[str]:
    """For each path its shortest end, in whole names, that none of the others has."""
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    lengths = [1] * len(parts)
    while True:
        ends = ["/".join(part[-length:]) for part, length in zip(parts, lengths, strict=True)]
        counts = Counter(ends)
        longer = [
            min(len(part), length + (counts[end] > 1)) for part, length, end in zip(parts, lengths, ends, strict=True)
        ]
        if longer == lengths:
            return ends
        lengths = longer


def _names(ends: list[str]) -> list[str]:
    """A file name for each of these paths, without case, since some file systems know none.

    It is the path without the suffix, `a_x` for `a/x.png`; with it, `x_png`, for those that differ in nothing else. So
    an image that is added or fails does not change the names of others.
    """
    plain = ["_".join(Path(end).with_suffix("").parts) for end in ends]
    counts = Counter(name.casefold() for name in plain)
    names: dict[str, str] = {}
    for end, name in zip(ends, plain, strict=True):
        wanted = name + Path(end).suffix.replace(".", "_") if counts[name.casefold()] > 1 else name
        free = (f"{wanted}_{number}" if number > 1 else wanted for number in count(1))
        chosen = next(each for each in free if each.casefold() not in names)
        names[chosen.casefold()] = chosen
    return list(names.values())
