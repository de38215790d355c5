"""`agln-fast bench`: FPN, AGLN and AGLN-Lite on this machine, beside what others make of the same networks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agln_fast.cli.console import Json, err, out, print_json, progress_bar

if TYPE_CHECKING:
    from agln_fast.bench.results_file import Results

__all__ = ["bench"]


def bench(
    networks: Annotated[
        list[str] | None, typer.Argument(help="Presets; default FPN, AGLN, AGLN-Lite, ResNet-50.")
    ] = None,
    size: Annotated[str, typer.Option(help="Height x width.")] = "512x512",
    num_classes: Annotated[int, typer.Option(help="Number of classes.")] = 59,
    batch: Annotated[int, typer.Option(help="Images a run.")] = 1,
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8 or auto; several with commas.")] = "auto",
    target: Annotated[list[str], typer.Option(help="cpu, cuda, tensorrt, tensorrt-rtx; may be repeated.")] = ["cpu"],  # noqa: B006
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default that of the targets.")] = None,
    plan: Annotated[str, typer.Option(help="auto, none, or a JSON file: the rewrites of our engines.")] = "auto",
    warmup: Annotated[int, typer.Option(help="Rounds before timing.")] = 1,
    iters: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads of every contestant.")] = None,
    full: Annotated[bool, typer.Option("--full", help="With torch.compile and int8, plans by timing: hours.")] = False,
    budget: Annotated[float | None, typer.Option(help="Seconds for each part; default 300, none with --full.")] = None,
    ladder: Annotated[bool, typer.Option("--ladder", help="Rewrite by rewrite, on the first AGLN.")] = False,
    scaling: Annotated[bool, typer.Option("--scaling", help="Over sizes and batches, on the first AGLN.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the rows as CSV.")] = None,
    save: Annotated[Path | None, typer.Option(help="Write everything as JSON.")] = None,
    figures: Annotated[Path | None, typer.Option(help="Draw into this folder.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Results to compare with.")] = None,
    json: Json = False,
) -> None:
    """Time networks with random weights in turns on every engine that runs here, ours and others."""
    import sys
    from dataclasses import asdict, replace
    from datetime import UTC, datetime

    from agln_fast.bench import networks as registry
    from agln_fast.bench.ladder import best_plan, default_rungs
    from agln_fast.bench.ladder import ladder as measure_ladder
    from agln_fast.bench.machine import machine
    from agln_fast.bench.measure import Case, Measured, Options, measure
    from agln_fast.bench.results_file import Results, load_results, save_results, write_csv
    from agln_fast.bench.scaling import scale
    from agln_fast.export.build import parse_size

    old = None if compare is None else load_results(compare)
    device = registry.choose_device(target, device)
    entries, waiting = registry.choose_entries(device, precision.split(","), target, full=full)
    options = Options(
        warmup,
        iters,
        budget if budget is not None or full else registry.BUDGET_S,
        device,
        threads,
        _read_plan(plan),
        None if full else 0,
    )
    cases = [Case(name, parse_size(size), batch, num_classes) for name in networks or registry.DEFAULT_NETWORKS]
    first = next((case for case in cases if case.network.startswith("agln")), cases[0])
    rungs, points = Measured((), ()), Measured((), ())
    with progress_bar() as progress:
        found = measure(cases, entries, options, progress)
        if ladder or scaling:
            chosen = best_plan(first, options=options) if options.plan in ("auto", "none") else options.plan
            fixed = replace(options, plan=chosen)
        if ladder:
            peers = [row for row in found.rows if row.network == first.network and not row.ours]
            best = min((row for row in peers if row.precision == "fp32"), key=lambda row: row.median_ms)
            reduced = next((entry.precision for entry in entries if entry.precision == "bf16"), None)
            rungs = measure_ladder(first, default_rungs(chosen, best.contestant, reduced=reduced), fixed, progress)
        if scaling:
            fastest = [row.contestant for row in sorted(found.rows, key=lambda row: row.median_ms)]
            chosen_entries = sorted(entries, key=lambda entry: fastest.index(entry.contestant))[:1]
            points = scale(first, chosen_entries, fixed, progress=progress)
    command = f"agln-fast {' '.join(sys.argv[1:])}"
    today = datetime.now(UTC).date().isoformat()
    results = Results(machine(options.threads), command, today, found.rows, rungs.rows, points.rows)
    left_out = [*registry.by_reason(waiting), *found.left_out, *rungs.left_out, *points.left_out]
    if csv is not None:
        write_csv(results.rows, csv)
    if save is not None:
        save_results(results, save)
    if json:
        print_json({**asdict(results), "left_out": left_out})
    else:
        _print(results, left_out)
    if figures is not None:
        _draw(results, figures)
    if old is not None:
        _print_comparison(old, results)


def _read_plan(plan):
    pass
