"""`agln-fast inspect`: parameters and multiply-adds of a preset, a checkpoint or a bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.columns import Columns
from rich.table import Table

from agln_fast.cli.console import Json, out, print_json

__all__ = ["inspect"]


def inspect(
    model: Annotated[
        str | None, typer.Argument(help="A preset such as agln_resnet50, a checkpoint, or a bundle; none lists them.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Height x width; default the bundle's own, or 512x512.")] = None,
    num_classes: Annotated[int, typer.Option(help="Number of classes, for presets.")] = 21,
    json: Json = False,
) -> None:
    """Show what a network is, and what each of its parts costs for one image.

    Multiply-adds of convolutions are what the paper's Table VIII counts; matrix products are the attention steps.
    """
    from agln_fast.bundle import open_bundle
    from agln_fast.cli.build import print_engines
    from agln_fast.contract import parse_size
    from agln_fast.models.checkpoint import list_checkpoints, load_checkpoint
    from agln_fast.models.complexity import complexity
    from agln_fast.models.config import list_models, preset

    if model is None:
        if json:
            print_json({"models": list_models(), "checkpoints": list_checkpoints()})
        else:
            out.print(Columns(list_models(), title="presets", equal=True))
            out.print(f"trained, and shipped: {', '.join(list_checkpoints())}", highlight=False)
        return
    bundle = open_bundle(model) if Path(model).is_dir() else None
    if bundle is not None:
        config = bundle.manifest.model
        size = size or f"{bundle.manifest.contract.height}x{bundle.manifest.contract.width}"
    elif Path(model).exists() or Path(model).suffix in (".pth", ".tar", ".safetensors"):
        config = load_checkpoint(model).config
    else:
        config = preset(model, num_classes)
    height, width = parse_size(size or "512x512")
    rows = complexity(config, height, width)
    if json:
        parts = [asdict(row) for row in rows]
        engines = None if bundle is None else bundle.manifest.to_dict()["engines"]
        print_json({"model": asdict(config), "height": height, "width": width, "parts": parts, "engines": engines})
        return
    settings = ", ".join(f"{name} {value}" for name, value in asdict(config).items())
    out.print(f"{model}: {settings}", highlight=False, markup=False)
    table = Table(title=f"one image of {height}x{width}")
    table.add_column("part")
    for column in ("parameters (M)", "convolutions (G multiply-adds)", "matrix products (G multiply-adds)"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.part == "total":
            table.add_section()
        costs = (row.parameters / 1e6, row.convolution / 1e9, row.matmul / 1e9)
        table.add_row(row.part, *(f"{cost:.3f}" for cost in costs))
    out.print(table)
    if bundle is not None:
        print_engines(bundle)
