"""`agln-fast rebuild`: a bundle again from its own weights, for this version of agln-fast and its libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agln_fast.cli.build import Calibration, DataOrImages, MaxLoss, print_built
from agln_fast.cli.console import Json, progress_bar
from agln_fast.cli.datasets import DataRoot, Split

__all__ = ["rebuild"]


def rebuild(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.agln, of this version or an older one.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--bundle", help="The bundle to write; default NAME.rebuilt.agln, NAME.agln with --force."),
    ] = None,
    data: DataOrImages = None,
    data_root: DataRoot = None,
    split: Split = None,
    calibration: Calibration = None,
    max_miou_loss: MaxLoss = 0.5,
    samples: Annotated[str | None, typer.Option(help="Image, folder or pattern to verify with.")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="Smallest agreement with fp32 that passes, 0..1.")] = None,
    tune: Annotated[
        float | None, typer.Option(min=0, help="Seconds for each engine to choose its plan in; default a short race.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads for races and the verification.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Deliver nothing if one engine disagrees.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    json: Json = False,
) -> None:
    """Build a bundle again: the same weights, classes, colours, input, output and engines.

    An engine that disagrees is left out; the others are delivered, and the exit code is 8.

    Example: agln-fast rebuild old.agln -o new.agln
    """
    from agln_fast.builder.rebuild import rebuild as rebuild_bundle

    with progress_bar("steps") as progress:
        built = rebuild_bundle(
            bundle,
            output,
            data=data,
            data_root=data_root,
            split=split,
            calibration=calibration,
            max_miou_loss=max_miou_loss,
            samples=samples,
            min_agreement=min_agreement,
            tune_s=tune,
            threads=threads,
            strict=strict,
            overwrite=force,
            progress=progress,
        )
    print_built(built, json=json)
