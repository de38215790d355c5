"""`agln-fast run`: segment images with a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from agln_fast.cli.console import Json, err, out, print_json, progress_bar
from agln_fast.errors import ImageError

if TYPE_CHECKING:
    from agln_fast.runtime.result import Result
    from agln_fast.runtime.segmenter import Segmenter

__all__ = ["run"]


def run(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.agln.")],
    images: Annotated[list[str], typer.Argument(help="Image files, folders or glob patterns.")],
    output: Annotated[Path, typer.Option("-o", "--to", help="Folder for NAME.overlay.png and NAME.labels.png.")],
    backend: Annotated[str, typer.Option(help="auto, or a backend: torch, fused, openvino, tensorrt, ...")] = "auto",
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; default any.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default the engine's own.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    json: Json = False,
) -> None:
    """Segment images; write an overlay with a legend and a label map with palette for each.

    An image that cannot be used is reported and the rest go on; the exit code is 1 then.
    """
    from agln_fast.cli.places import check_folder
    from agln_fast.cli.request import open_matching
    from agln_fast.runtime.images import list_images

    opened = open_matching(bundle, backend, precision, device, threads)
    found: list[Path] = []
    failed: dict[str, str] = {}
    for pattern in images:
        try:
            found += list_images(pattern)
        except ImageError as error:
            failed[pattern] = str(error)
    found = list(dict.fromkeys(found))
    if not found:
        raise ImageError("; ".join(failed.values()))
    names = _names(found)
    check_folder(output, ImageError)

    # From here on PyTorch is needed, which takes seconds to load.
    from agln_fast.runtime.segmenter import load

    rows: list[dict[str, Any]] = []
    with load(opened, backend, precision=precision, device=device, threads=threads) as segment, progress_bar() as bar:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ImageError(f"{output}: cannot be created ({error.strerror}); choose another folder") from None
        for path, name, result in bar.track(_segment(segment, found, names), total=len(found), description="segment"):
            try:
                if isinstance(result, ImageError):
                    raise result
                overlay, labels = output / f"{name}.overlay.png", output / f"{name}.labels.png"
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
            table.add_row(escape(Path(row["image"]).name), f"{row['width']}x{row['height']}", escape(largest), *times)
        out.print(table)
        for row in rows:
            out.print(f"{row['overlay']}  {row['labels']}", highlight=False, markup=False)
    for message in failed.values():
        err.print(f"[bold red]failed:[/] {escape(message)}", highlight=False)
    if failed:
        raise typer.Exit(1)


def _segment(
    segment: Segmenter, paths: list[Path], names: list[str]
) -> Iterator[tuple[Path, str, Result | ImageError]]:
    """Results in the order of `paths`, as many images a run as the engine takes, and errors in their place."""
    size = segment.contract.max_batch
    for start in range(0, len(paths), size):
        chunk = slice(start, start + size)
        results: list[Result | ImageError]
        try:
            results = segment(list(paths[chunk]))
        except ImageError:
            results = []
            for path in paths[chunk]:
                try:
                    results.append(segment(path))
                except ImageError as error:
                    results.append(error)
        yield from zip(paths[chunk], names[chunk], results, strict=True)


def _names(paths: list[Path]) -> list[str]:
    """A file name for each image: its stem, with the suffix or a number added where two would collide."""
    names: dict[str, None] = {}
    for path in paths:
        numbered = (f"{path.stem}_{number}" for number in count(2))
        names[next(name for name in chain((path.stem, path.name.replace(".", "_")), numbered) if name not in names)] = (
            None
        )
    return list(names)
