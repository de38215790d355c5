"""`agln-fast plugins`: the library of our layers, for programs that open engines without this package."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from agln_fast.artefact import LAYERS_FILE
from agln_fast.cli.console import out

__all__ = ["plugins"]


def plugins(
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write.")] = Path(LAYERS_FILE),
) -> None:
    """Write the library with which TensorRT and TensorRT-RTX open engines that have our kernels.

    It is compiled here for the first time, by the system's C++ compiler.
    """
    from agln_fast.cli.places import check_file
    from agln_fast.errors import BuildError
    from agln_fast.export.plugins import library
    from agln_fast.files import replacing

    check_file(output, BuildError)
    compiled = library()
    with replacing(output, BuildError) as part:
        shutil.copyfile(compiled, part)
    out.print(f"wrote {output}", highlight=False, markup=False)
