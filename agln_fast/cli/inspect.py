"""`agln-fast inspect`: parameters and multiply-adds of a preset, a checkpoint or a bundle."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.columns import Columns
from rich.table import Table

from agln_fast.cli.console import Json, out, print_json
from agln_fast.cli.request import WeightsName, may_be_bundle
from agln_fast.errors import ConfigError

if TYPE_CHECKING:
    from agln_fast.models.complexity import Complexity
    from agln_fast.models.config import ModelConfig

__all__ = ["inspect"]


def inspect(
    model: Annotated[
        str | None, typer.Argument(help="A preset such as agln_resnet50, a checkpoint, or a bundle; none lists them.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Height x width; default the bundle's own, or 512x512.")] = None,
    num_classes: Annotated[int, typer.Option(help="Number of classes, for presets.")] = 21,
    weights: WeightsName = None,
    json: Json = False,
) -> None:
    """Show what a network is, what each of its parts costs for one image, and how a checkpoint's weights were found.

    Multiply-adds of convolutions are what the paper's Table VIII counts; matrix products are the attention steps.
    """
    from agln_fast.bundle import open_bundle
    from agln_fast.cli.build import print_engines
    from agln_fast.contract import IOContract, parse_size
    from agln_fast.models.config import list_models, preset
    from agln_fast.models.shipped import find_checkpoint, list_checkpoints

    if model is None:
        if json:
            print_json({"models": list_models(), "checkpoints": list_checkpoints()})
        else:
            out.print(Columns(list_models(), title="presets", equal=True))
            out.print(f"trained, and shipped: {', '.join(list_checkpoints())}", highlight=False)
        return
    asked = None if size is None else IOContract(*parse_size(size))
    bundle = open_bundle(model) if may_be_bundle(Path(model)) else None
    config: ModelConfig | None = None
    if bundle is not None:
        config = bundle.manifest.model
        asked = asked or bundle.manifest.contract
    elif Path(model).exists() or Path(model).suffix in (".pth", ".tar", ".safetensors"):
        find_checkpoint(model)
    else:
        config = preset(model, num_classes)

    if weights is not None and config is not None:
        raise ConfigError(f"--weights {weights}: only checkpoints hold several weights, and {model} is none")
    found = ""
    if config is None:
        from agln_fast.models.checkpoint import read_checkpoint  # PyTorch, which takes seconds to load

        checkpoint = read_checkpoint(model, weights=weights)
        config, found = checkpoint.network.config, str(checkpoint.account)
    contract = asked or IOContract(512, 512)
    height, width = contract.height, contract.width
    rows: list[Complexity] = []
    try:
        from agln_fast.models.complexity import complexity

        rows = complexity(config, height, width)
    except ModuleNotFoundError:  # without PyTorch, nobody can count
        if bundle is None:
            raise
    if json:
        parts = [asdict(row) for row in rows]
        engines = None if bundle is None else bundle.manifest.to_dict()["engines"]
        print_json(
            {
                "model": asdict(config),
                "height": height,
                "width": width,
                "parts": parts,
                "engines": engines,
                "weights": found or None,
            }
        )
        return
    settings = ", ".join(f"{name} {value}" for name, value in asdict(config).items())
    out.print(f"{model}: {settings}", highlight=False, markup=False)
    if found:
        out.print(found, highlight=False, markup=False)
    if rows:
        out.print(_costs(rows, f"one image of {height}x{width}"))
    else:
        out.print('its cost is counted by PyTorch: pip install "agln-fast[build]"', highlight=False, markup=False)
    if bundle is not None:
        print_engines(bundle)


def _costs(rows: list[Complexity], title: str) -> Table:
    table = Table(title=title)
    table.add_column("part")
    for column in ("parameters (M)", "convolutions (G multiply-adds)", "matrix products (G multiply-adds)"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.part == "total":
            table.add_section()
        costs = (row.parameters / 1e6, row.convolution / 1e9, row.matmul / 1e9)
        table.add_row(row.part, *(f"{cost:.3f}" for cost in costs))
    return table
