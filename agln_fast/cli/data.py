"""`agln-fast data`: what a dataset holds, and what may be wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agln_fast.cli.console import Json, err, out, print_json, progress_bar, shown
from agln_fast.cli.datasets import DataRoot, SkipBad
from agln_fast.errors import DatasetError

if TYPE_CHECKING:
    from agln_fast.data.dataset import Sample, SegmentationDataset
    from agln_fast.data.survey import Survey

__all__ = ["data"]

_SHOWN = 10


def data(
    path: Annotated[
        str, typer.Argument(help="A folder with images/, masks/ and classes.txt, its data.yaml, or a dataset's name.")
    ],
    data_root: DataRoot = None,
    split: Annotated[list[str], typer.Option(help="Only that part; may be repeated. Default all.")] = [],  # noqa: B006
    limit: Annotated[int | None, typer.Option("-n", "--limit", min=1, help="Only that many samples of each.")] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--picture", help="Draw ten samples: FILE.png, .svg or .pdf.")
    ] = None,
    skip_bad: SkipBad = False,
    json: Json = False,
) -> None:
    """Show what a dataset holds: splits, sizes, shares of classes, samples, and what may be wrong.

    Example: agln-fast data street -o street.png
    """
    from agln_fast.cli.places import check_figure
    from agln_fast.data.registry import open_splits
    from agln_fast.data.survey import survey

    check_figure(output)
    kind, datasets = open_splits(path, split, data_root, length=limit)
    with progress_bar("images") as progress:
        task = progress.add_task(path, total=sum(map(len, datasets.values())))
        found = survey(datasets, lambda: progress.advance(task))
    if output is not None:
        _draw(datasets, output, path)
    if json:
        print_json({"path": path, "kind": kind, **found.to_dict()})
    else:
        _print(found, kind, path)
        if output is not None:
            out.print(f"wrote {output}", highlight=False, markup=False)
    if not found.bad:
        return
    for line in found.bad[:_SHOWN]:
        err.print(line, highlight=False, markup=False)
    count = len(found.bad) + sum(len(each.names) for each in found.splits.values())
    if not skip_bad:
        raise DatasetError(
            f"{path}: {len(found.bad)} of {count} samples cannot be used; put them right, or leave them out with "
            "--skip-bad"
        )
    err.print(f"left out {len(found.bad)} of {count} samples", highlight=False)


def _print(found: Survey, kind: str, path: str) -> None:
    classes = found.class_set.classes
    out.print(f"{path}: {kind}, {len(classes)} classes", highlight=False, markup=False)
    table = _table("height x width", "split", "samples", "smallest", "median", "largest", "ignored")
    for name, split in found.splits.items():
        sizes = [f"{height}x{width}" for height, width in split.extent()] or ["–"] * 3
        table.add_row(shown(name), str(len(split.names)), *sizes, f"{split.ignored_share:.1%}")
    out.print(table)
    table = _table(
        "shares of pixels that are not ignored, and of images",
        "class",
        *(f"{name}: {what}" for name in found.splits for what in ("pixels", "images")),
    )
    for index, name in enumerate(classes):
        rates = [rate[index] for split in found.splits.values() for rate in (split.pixel_shares, split.image_shares)]
        table.add_row(shown(name), *(f"{rate:.1%}" for rate in rates))
    out.print(table)
    for line in found.warnings():
        out.print(f"warning: {line}", highlight=False, markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(shown(column), justify="left" if column in ("split", "class") else "right", overflow="fold")
    return table


def _draw(datasets: dict[str, SegmentationDataset], output: Path, path: str) -> None:
    """Ten samples, evenly spread over the splits and over each of them; those that cannot be used are passed over."""
    from agln_fast.figures.samples import draw_samples
    from agln_fast.figures.saving import save_figure

    samples: list[Sample] = []
    for number, dataset in enumerate(datasets.values()):
        wanted = -(-(_SHOWN - len(samples)) // (len(datasets) - number))
        spread = [place * len(dataset) // wanted for place in range(wanted)] if len(dataset) > wanted else []
        chosen = dict.fromkeys([*spread, *range(len(dataset))])
        found: list[Sample] = []
        for index in chosen:
            if len(found) == wanted:
                break
            try:
                found.append(dataset[index])
            except DatasetError:
                continue
        samples += found
    if samples:
        class_set = next(iter(datasets.values())).class_set
        save_figure(draw_samples(samples, class_set, title=Path(path).name), output)
