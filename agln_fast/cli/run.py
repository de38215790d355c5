"""`agln-fast run`: segment images with a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from agln_fast.cli.console import Json, err, out, print_json, progress_bar
from agln_fast.errors import ImageError

__all__ = ["run"]


def run(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.agln.")],
    images: Annotated[list[str], typer.Argument(help="Image files, folders or glob patterns.")],
    output: Annotated[Path, typer.Option("-o", "--to", help="Folder for NAME.overlay.png and NAME.labels.png.")],
    backend: Annotated[str, typer.Option(help="auto, torch, onnxruntime, openvino, tensorrt, tensorrt-rtx.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16; default any.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default the engine's own.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    json: Json = False,
) -> None:
    """Segment images; write an overlay with a legend and a label map with palette for each.

    An image that cannot be used is reported and the rest go on; the exit code is 1 then.
    """
    from agln_fast.bundle import open_bundle
    from agln_fast.runtime.images import list_images
    from agln_fast.runtime.segmenter import load

    opened = open_bundle(bundle)
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
    rows: list[dict[str, Any]] = []
    with load(opened, backend, precision=precision, device=device, threads=threads) as segment, progress_bar() as bar:
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ImageError(f"{output}: cannot be created ({error.strerror}); choose another folder") from None
        for path, name in bar.track(list(zip(found, names, strict=True)), description="segment"):
            try:
                result = segment(path)
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
            table.add_row(Path(row["image"]).name, f"{row['width']}x{row['height']}", largest, *times)
        out.print(table)
        for row in rows:
            out.print(f"{row['overlay']}  {row['labels']}", highlight=False, markup=False)
    for message in failed.values():
        err.print(f"[bold red]failed:[/] {escape(message)}", highlight=False)
    if failed:
        raise typer.Exit(1)


def _names(paths: list[Path]) -> list[str]:
    """A file name for each image: its stem, with the suffix and a number added where two would collide."""
    names: list[str] = []
    for path in paths:
        candidates = [path.stem, path.name.replace(".", "_")]
        candidates += [f"{path.stem}_{number}" for number in range(2, len(paths) + 2)]
        names.append(next(name for name in candidates if name not in names))
    return names
