"""`agln-fast run`: segment images with a bundle."""

from __future__ import annotations

import os
from collections.abc import Iterator
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

_VIDEOS, _RAY = "Videos", "Any number of images, on Ray"


def run(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.agln.")],
    images: Annotated[
        list[str],
        typer.Argument(help="Image files, folders or glob patterns; or a video, a camera, an address; or s3://..."),
    ],
    output: Annotated[
        str | None,
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
    ray: Annotated[
        bool, typer.Option("--ray", help="By processes side by side, to masks alone.", rich_help_panel=_RAY)
    ] = False,
    ray_address: Annotated[
        str | None,
        typer.Option(help="A cluster, auto or HOST:PORT, rather than this machine alone.", rich_help_panel=_RAY),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes with an engine; default one for each GPU or CPU.", min=1, rich_help_panel=_RAY),
    ] = None,
    overlays: Annotated[bool, typer.Option("--overlays", help="NAME.overlay.png, too.", rich_help_panel=_RAY)] = False,
    json: Json = False,
) -> None:
    """Segment images; write an overlay with a legend and a label map with palette for each. Or segment a video.

    An image that cannot be used is reported and the rest go on; the exit code is 1 then, and 4 if none can be used.
    What agln-fast wrote into a folder in an earlier run is not segmented again.

    A video is clip.mp4, /dev/video0, an address, frames/%05d.png, or pictures with -o overlay.mp4. Ctrl-C ends it, and
    leaves a video that plays.

    With --ray images and masks may lie in a store, s3://bucket/prefix. Masks mirror the folders; index.jsonl beside
    them has a line for each image. What this bundle made of the same bytes is not made again.
    """
    from agln_fast.cli.inputs import find_images
    from agln_fast.cli.offline import RayOptions, check_no_ray, run_offline
    from agln_fast.cli.places import check_folder
    from agln_fast.cli.request import open_matching
    from agln_fast.cli.video import VideoOptions, check_no_video, concerns_video, run_video
    from agln_fast.runtime.names import output_names, telling_ends

    opened = open_matching(bundle, backend, precision, device, threads)
    on_ray = RayOptions(ray, ray_address, workers, overlays)
    if on_ray.asked:
        engine = {"backend": backend, "precision": precision, "device": device, "threads": threads}
        run_offline(opened, images, output, on_ray, recursive=recursive, json=json, bit_depth=bit_depth, **engine)
        return
    check_no_ray(images, output, on_ray)
    to = None if output is None else Path(output)
    video = VideoOptions(mask, codec, crf, frames, every, fps, seconds)
    if concerns_video(images, to, video):

        def load_engine() -> Segmenter:
            from agln_fast.runtime.segmenter import load

            return load(opened, backend, precision=precision, device=device, threads=threads)

        run_video(images, to, video, load_engine, recursive=recursive, bit_depth=bit_depth, json=json)
        return
    folder = check_no_video(to, video)
    found, failed = find_images(images, recursive=recursive)
    ends = telling_ends(found)
    names, ends_of = output_names(ends), dict(zip(map(str, found), ends, strict=True))
    check_folder(folder, ImageError)

    # From here on PyTorch is needed, which takes seconds to load.
    from agln_fast.runtime.segmenter import load

    rows: list[dict[str, Any]] = []
    loaded = load(opened, backend, precision=precision, device=device, threads=threads)
    with loaded as segment, progress_bar("images") as bar:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ImageError(f"{folder}: cannot be created ({error.strerror}); choose another folder") from None
        inputs = {os.path.abspath(path) for path in found}
        segmented = bar.track(_segment(segment, found, bit_depth), total=len(found), description="segment")
        for path, name, result in zip(found, names, segmented, strict=True):
            overlay, labels = folder / f"{name}.overlay.png", folder / f"{name}.labels.png"
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
