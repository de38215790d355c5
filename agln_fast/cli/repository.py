"""`agln-fast export-repository`: bundles as the folder from which another server serves them."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agln_fast.cli.console import Json, out, print_json, print_wide, shown
from agln_fast.cli.serve import named_bundle
from agln_fast.errors import ConfigError

__all__ = ["export_repository"]


def export_repository(
    bundles: Annotated[list[str], typer.Argument(help="Bundles: PATH or NAME=PATH.")],
    server: Annotated[str, typer.Option("--for", help="triton, openvino-model-server, mlserver or ray.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    force: Annotated[bool, typer.Option("--force", help="Replace a repository that this verb wrote.")] = False,
    json: Json = False,
) -> None:
    """Write bundles as the repository of another server: Triton, OpenVINO Model Server, MLServer or Ray.

    Bundles of one network that were built on several GPUs may share a name: Triton gets a plan for each.

    Example: agln-fast export-repository street=street.agln --for triton -o models
    """
    from agln_fast.serving.repositories import export_repository as write

    named = [named_bundle(argument) for argument in bundles]
    for name, version, _ in named:
        if version is not None:
            raise ConfigError(f"{name}:{version}: a repository holds one version of a bundle; use NAME=PATH")
    written = write([(name, path) for name, _, path in named], server, output, overwrite=force)
    start = shlex.join(written.start)
    if json:
        print_json({"repository": str(output), "server": server, **asdict(written), "start": start})
        return
    table = Table(box=SIMPLE_HEAD)
    for column in ("model", "run by", "takes", "gives"):
        table.add_column(column)
    for model in written.models:
        table.add_row(*map(shown, (model.name, model.backend, model.takes, model.gives)))
    print_wide(table)
    for name, reason in written.left_out.items():
        out.print(f"left out: {name}: {reason}", highlight=False, markup=False)
    for note in written.notes:
        out.print(f"note: {note}", highlight=False, markup=False)
    out.print(f"start it: {start}", highlight=False, markup=False)
    out.print(f"wrote {output}", highlight=False, markup=False)
