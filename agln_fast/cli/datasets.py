"""Options that name a dataset, the same for every verb, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agln_fast.cli.console import err
from agln_fast.data.partners import first_few

if TYPE_CHECKING:
    from agln_fast.data.dataset import SegmentationDataset

__all__ = ["Data", "DataRoot", "SkipBad", "Split", "tell_skipped"]

Data = Annotated[
    str | None,
    typer.Option(
        help="scenes, pascal_voc, pascal_context_59, pascal_context_60, ade20k, or the folder or data.yaml of your own."
    ),
]
DataRoot = Annotated[Path | None, typer.Option(help="Folder of a published dataset.")]
Split = Annotated[
    str | None, typer.Option(help="Which part of the dataset; default val, or all of a folder without parts.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out samples that cannot be used, and count them.")]


def tell_skipped(*datasets: SegmentationDataset) -> None:
    """Say on standard error what was left out, if anything was."""
    for dataset in datasets:
        if dataset.skipped:
            count = len(dataset) + len(dataset.skipped)
            text = f"{dataset.split}: left out {len(dataset.skipped)} of {count} samples: {first_few(dataset.skipped)}"
            err.print(text, highlight=False, markup=False)
