"""Options that name a dataset, the same for every verb, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agln_fast.cli.console import err
from agln_fast.data.partners import first_few

if TYPE_CHECKING:
    from agln_fast.data.classes import ClassSet
    from agln_fast.data.dataset import SegmentationDataset

__all__ = ["Data", "DataOrNone", "DataRoot", "SkipBad", "Split", "tell_skipped", "warn_of_names"]

_DATA = typer.Option(
    help="scenes, pascal_voc, pascal_context_59, pascal_context_60, ade20k, or the folder or data.yaml of your own."
)
Data = Annotated[str, _DATA]
DataOrNone = Annotated[str | None, _DATA]
DataRoot = Annotated[Path | None, typer.Option(help="Folder of a published dataset.")]
Split = Annotated[
    str | None, typer.Option(help="Which part of the dataset; default val, or all of a folder without parts.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave out samples that cannot be used, and count them.")]


def tell_skipped(*datasets: SegmentationDataset) -> None:
    """Say on standard error what was left out, if anything was."""
    for dataset in datasets:
        if dataset.skipped:
            text = f"{dataset.split}: left out {len(dataset.skipped)} samples: {first_few(dataset.skipped)}"
            err.print(text, highlight=False, markup=False)


def warn_of_names(network: ClassSet, dataset: ClassSet) -> None:
    """Say on standard error where a network and a dataset have as many classes, and others: numbers are compared."""
    if len(network.classes) != len(dataset.classes):
        return  # which is an error of its own
    differing = [
        f"{index} is {ours!r} and {theirs!r}"
        for index, (ours, theirs) in enumerate(zip(network.classes, dataset.classes, strict=True))
        if ours != theirs and ours != f"class {index}"
    ]
    if differing:
        text = f"warning: classes of the network and of {dataset.name} have other names: {first_few(differing)}"
        err.print(text, highlight=False, markup=False)
