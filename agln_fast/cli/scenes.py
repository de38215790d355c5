"""`agln-fast scenes`: write procedural scenes as files, to look at or to train elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agln_fast.cli.console import Json, out, print_json, progress_bar

__all__ = ["scenes"]


def scenes(
    write: Annotated[Path, typer.Option(help="Folder for images/NAME.png and labels/NAME.png.")],
    number: Annotated[int, typer.Option("-n", "--number", help="How many.")] = 100,
    size: Annotated[str, typer.Option(help="Height x width.")] = "128x128",
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    seed: Annotated[int, typer.Option(help="0 is the dataset; other numbers make other ones.")] = 0,
    json: Json = False,
) -> None:
    """Draw scenes with their labels; the label maps have the classes' palette."""
    from agln_fast.contract import parse_size
    from agln_fast.data.scenes import Scenes, write_scenes

    dataset = Scenes(split, size=parse_size(size), length=number, seed=seed)
    with progress_bar() as progress:
        files = write_scenes(progress.track(iter(dataset), total=len(dataset), description="scenes"), write)
    if json:
        print_json({"images": str(write / "images"), "labels": str(write / "labels"), "number": len(files)})
    else:
        out.print(f"{write}: {len(files)} images in images/, their labels in labels/", highlight=False, markup=False)
