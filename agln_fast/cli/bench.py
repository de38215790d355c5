"""`agln-fast bench`: FPN, AGLN and AGLN-Lite side by side on this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from agln_fast.cli.console import Json, out, print_json, progress_bar

__all__ = ["bench"]


def bench(
    networks: Annotated[
        list[str] | None, typer.Argument(help="Presets; default FPN, AGLN, AGLN-Lite, ResNet-50.")
    ] = None,
    size: Annotated[str, typer.Option(help="Height x width.")] = "512x512",
    num_classes: Annotated[int, typer.Option(help="Number of classes.")] = 59,
    batch: Annotated[int, typer.Option(help="Images a run.")] = 1,
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16 or auto.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default each engine's own.")] = None,
    warmup: Annotated[int, typer.Option(help="Rounds before timing.")] = 1,
    iters: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    json: Json = False,
) -> None:
    """Build networks with random weights, check every engine against the fp32 network, and time them in turns."""
    from agln_fast.bench.networks import DEFAULT_NETWORKS, compare_networks, to_json
    from agln_fast.export.build import parse_size

    with progress_bar() as progress:
        rows = compare_networks(
            networks or DEFAULT_NETWORKS,
            size=parse_size(size),
            num_classes=num_classes,
            batch=batch,
            precision=precision,
            device=device,
            warmup=warmup,
            iters=iters,
            threads=threads,
            progress=progress,
        )
    if json:
        print_json(to_json(rows))
        return
    table = Table(
        title=f"{size}, batch {batch}, {num_classes} classes; uint8 image to labels, engine only; {iters} rounds"
    )
    for column in ("network", "engine", "device"):
        table.add_column(column)
    for column in ("median ms", "p95 ms", "images/s", "ratio", "agreement", "parameters (M)", "G multiply-adds"):
        table.add_column(column, justify="right")
    previous = None
    for row in rows:
        if row.network != previous:
            table.add_section()
        previous = row.network
        table.add_row(
            row.network,
            row.engine,
            row.device,
            f"{row.median_ms:.1f}",
            f"{row.p95_ms:.1f}",
            f"{row.images_per_second:.2f}",
            f"{row.ratio:.2f}",
            "–" if row.agreement is None else f"{row.agreement:.4%}",
            f"{row.parameters_m:.2f}",
            f"{row.gmacs:.1f}",
        )
    out.print(table)
    out.print(f"ratio: time against {rows[0].network} on the same engine, median over the rounds", highlight=False)
