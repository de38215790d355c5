"""`agln-fast bench`: FPN, AGLN and AGLN-Lite side by side on this machine."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
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
    target: Annotated[list[str], typer.Option(help="cpu, cuda, tensorrt, tensorrt-rtx; may be repeated.")] = ["cpu"],  # noqa: B006
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
            targets=target,
            device=device,
            warmup=warmup,
            iters=iters,
            threads=threads,
            progress=progress,
        )
    if json:
        print_json(to_json(rows))
        return
    title = f"{size}, batch {batch}, {num_classes} classes; uint8 image to labels, engine only; {iters} rounds"
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for column in ("network", "engine", "ms", "p95", "images/s", "ratio", "agreement"):
        table.add_column(column, justify="left" if column in ("network", "engine") else "right", no_wrap=True)
    previous = None
    for row in rows:
        if row.network != previous:
            table.add_section()
        table.add_row(
            "" if row.network == previous else row.network,
            row.engine if row.device == "cpu" else f"{row.engine} {row.device}",
            f"{row.median_ms:.1f}",
            f"{row.p95_ms:.1f}",
            f"{row.images_per_second:.2f}",
            f"{row.ratio:.2f}",
            "–" if row.agreement is None else f"{row.agreement:.3%}",
        )
        previous = row.network
    out.print(table)
    for row in {row.network: row for row in rows}.values():
        out.print(
            f"{row.network}: {row.parameters_m:.2f} M parameters, {row.gmacs:.1f} G multiply-adds", highlight=False
        )
    out.print("ratio: time against the first network on the same engine, median over the rounds", highlight=False)
