"""`agln-fast bench`: FPN, AGLN and AGLN-Lite on this machine, beside what others make of the same networks."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agln_fast.cli.console import Json, out, print_json, print_wide, progress_bar
from agln_fast.cli.datasets import DataOrNone, DataRoot, SkipBad, Split, tell_skipped
from agln_fast.cli.files import read_plan

if TYPE_CHECKING:
    from agln_fast.bench.race.results import Results
    from agln_fast.data.dataset import SegmentationDataset

__all__ = ["bench"]


def bench(
    networks: Annotated[
        list[str] | None, typer.Argument(help="Presets; default FPN, AGLN, AGLN-Lite, ResNet-50.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Height x width; default 256x256, and 512x512 with --full.")] = None,
    num_classes: Annotated[int | None, typer.Option(help="Number of classes; default 59, or those of --data.")] = None,
    batch: Annotated[int, typer.Option(help="Images a run.")] = 1,
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8 or auto; several with commas.")] = "auto",
    target: Annotated[list[str], typer.Option(help="cpu, cuda, tensorrt, tensorrt-rtx; may be repeated.")] = ["cpu"],  # noqa: B006
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default that of the targets.")] = None,
    plan: Annotated[str, typer.Option(help="auto, none, or a JSON file: the rewrites of our engines.")] = "auto",
    warmup: Annotated[int, typer.Option(help="Rounds before timing.")] = 1,
    iters: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads of every contestant.")] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="With torch.compile, int8, plans by timing, 150 classes, mIoU: an hour or more."),
    ] = False,
    data: DataOrNone = None,
    data_root: DataRoot = None,
    split: Split = None,
    skip_bad: SkipBad = False,
    limit: Annotated[
        int, typer.Option("-n", "--limit", min=1, help="Only so many samples of --data, evenly spread.")
    ] = 100,
    budget: Annotated[float | None, typer.Option(help="Seconds for each part; default 270, none with --full.")] = None,
    ladder: Annotated[bool, typer.Option("--ladder", help="Rewrite by rewrite, on the first AGLN.")] = False,
    scaling: Annotated[bool, typer.Option("--scaling", help="Over sizes and batches, on the first AGLN.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the rows as CSV.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write everything as JSON, after each network.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on behind what the file of --save holds.")] = False,
    figures: Annotated[Path | None, typer.Option(help="Draw into this folder.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Results to compare with.")] = None,
    json: Json = False,
) -> None:
    """Time networks in turns on every engine that runs here, ours and others; weights are random but for those that
    ship, whose mIoU on a dataset is measured with --data.
    """
    from dataclasses import asdict
    from datetime import UTC, datetime

    from agln_fast.bench.race import arguments
    from agln_fast.bench.race.results import Results, load_results, write_csv
    from agln_fast.cli.places import check_file
    from agln_fast.contract import parse_size
    from agln_fast.engines import check_threads, packages
    from agln_fast.engines.driver import check_driver

    old = None if compare is None else load_results(compare, "networks")
    device = arguments.choose_device(target, device)
    pixels = parse_size(size or ("512x512" if full else "256x256"))
    chosen = networks or list(arguments.DEFAULT_NETWORKS)
    dataset = None if data is None else _open_data(data, data_root, split, limit, skip_bad=skip_bad)
    if num_classes is None:
        num_classes = 59 if dataset is None else len(dataset.class_set.classes)
    if dataset is not None:
        dataset.check_classes(num_classes, "each network")
    arguments.check_cases(chosen, pixels, batch, num_classes)
    arguments.check_precisions(precision.split(","))
    arguments.check_counts(warmup, iters)
    check_threads(threads)
    if ladder:
        arguments.check_ladder(device)
    for file in (csv, save):
        check_file(file)
    if figures is not None:
        _check_figures(figures)
    plan_choice = read_plan(plan)
    check_driver(device)

    # From here on PyTorch is needed, which takes seconds to load.
    from agln_fast.bench.race import cases as registry
    from agln_fast.bench.race.measure import Case, Options
    from agln_fast.bench.race.run import run
    from agln_fast.machine import machine

    entries, waiting = registry.choose_entries(device, precision.split(","), target, full=full)
    options = Options(
        warmup,
        iters,
        budget_s=arguments.BUDGET_S if budget is None and not full else budget,
        device=device,
        threads=threads,
        plan=plan_choice,
        tune_s=None if full else 0,
        data=dataset,
    )
    cases = [Case(name, pixels, batch, num_classes) for name in chosen]
    if full and not networks:
        cases = registry.full_cases(pixels)
    today = datetime.now(UTC).date().isoformat()
    results = Results(machine(threads, packages()), _command(), today, (), left_out=tuple(registry.by_reason(waiting)))
    if resume and save is not None and save.exists():
        results = load_results(save, "networks")
    with progress_bar("measurements") as progress:
        results = run(cases, entries, options, results, save=save, ladder=ladder, scaling=scaling, progress=progress)
    if dataset is not None:
        tell_skipped(dataset)
    if csv is not None:
        write_csv(results.rows, csv)
    if figures is not None:
        _draw(results, figures)
    if json:
        print_json(asdict(results))
        return
    _print(results)
    if old is not None:
        _print_comparison(old, results)


def _open_data(data: str, root: Path | None, split: str | None, limit: int, *, skip_bad: bool) -> SegmentationDataset:
    """The samples of `--data`, in memory once they are read: every contestant sees them."""
    from agln_fast.data.dataset import CachedDataset, SomeSamples
    from agln_fast.data.registry import open_dataset

    return CachedDataset(SomeSamples(open_dataset(data, split, root, skip_bad=skip_bad), limit))


def _command() -> str:
    return f"agln-fast {shlex.join(sys.argv[1:])}"


def _check_figures(folder: Path) -> None:
    from importlib.util import find_spec

    from agln_fast.cli.places import check_folder
    from agln_fast.errors import ConfigError, MissingPackageError

    check_folder(folder, ConfigError)
    if find_spec("matplotlib") is None:
        raise MissingPackageError("matplotlib", "eval")


def _print(results: Results) -> None:
    from agln_fast.bench.pages.presentation import (
        NOTES,
        machine_line,
        markdown_ladder,
        markdown_scaling,
        overview_table,
        row_table,
    )

    out.print(machine_line(results.machine), highlight=False)
    several = len({row.network for row in results.rows}) > 1
    for table in (row_table(results.rows), *([overview_table(results.rows)] if several else [])):
        print_wide(table)
    for text in (
        *([markdown_ladder(results.ladder)] if results.ladder else []),
        *([markdown_scaling(results.scaling)] if results.scaling else []),
        NOTES,
    ):
        out.print(text, highlight=False, markup=False)
    for row in {row.network: row for row in results.rows}.values():
        out.print(
            f"{row.network}: {row.parameters_m:.2f} M parameters, {row.gmacs:.1f} G multiply-adds", highlight=False
        )
    for line in results.left_out:
        out.print(f"left out: {line}", highlight=False, markup=False)


def _draw(results: Results, folder: Path) -> None:
    from agln_fast.bench.pages.plots import draw_ladder, draw_latency, draw_pareto, draw_scaling
    from agln_fast.errors import ConfigError
    from agln_fast.figures.saving import save_figure

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be a folder for figures: {error.strerror}; choose another") from None
    drawings = {
        "latency": (draw_latency, results.rows),
        "pareto": (draw_pareto, [row for row in results.rows if row.miou is not None]),
        "ladder": (draw_ladder, results.ladder),
        "scaling": (draw_scaling, results.scaling if len(results.scaling) > 1 else ()),
    }
    for name, (draw, rows) in drawings.items():
        if rows:
            figure = draw(rows)
            for suffix in (".svg", ".png"):
                save_figure(figure, folder / f"{name}{suffix}")


def _print_comparison(old: Results, new: Results) -> None:
    from agln_fast.bench.pages.presentation import compare, comparison_table, differences

    print_wide(comparison_table(compare(old, new), differences(old, new)))
