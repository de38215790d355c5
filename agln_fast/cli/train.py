"""`agln-fast train`: the paper's recipe. Every field of `TrainingConfig` is a flag."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agln_fast.cli.console import Json, out, print_json, progress_bar
from agln_fast.cli.datasets import tell_skipped
from agln_fast.training.config import TrainingConfig

__all__ = ["train"]


def _with_config_flags(verb: Callable[..., None]) -> Callable[..., None]:
    """Give `verb` a flag for each field of `TrainingConfig` in the place of its `**flags`; None means not given."""
    parameters = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
    hints = get_type_hints(TrainingConfig)
    for field in fields(TrainingConfig):
        kinds = [kind for kind in get_args(hints[field.name]) or (hints[field.name],) if kind is not NoneType]
        kind: Any = str if get_origin(hints[field.name]) is Literal else kinds[0]
        shown = False if field.default is None else str(field.default)
        flag = f"--{field.name.replace('_', '-')}"
        flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [*field.metadata["flags"], flag]
        annotation = Annotated[kind | None, typer.Option(*flags, help=field.metadata["help"], show_default=shown)]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    verb.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    verb.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return verb


@_with_config_flags
def train(
    output: Annotated[Path, typer.Option("-o", "--to", help="Folder for weights, state, log and config.")],
    config: Annotated[Path | None, typer.Option(help="YAML file; flags win over it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state in the folder, bit for bit.")] = False,
    json: Json = False,
    **flags: Any,
) -> None:
    """Train a network by the paper's recipe. It may be killed at any moment: --resume goes on.

    Example: agln-fast train --from agln_nano --data pascal_voc --data-root VOCdevkit -o runs/voc
    """
    from agln_fast.cli.places import check_folder
    from agln_fast.errors import ConfigError, TrainingError
    from agln_fast.training.folder import CONFIG_FILE, check_start, open_split

    given = {name: value for name, value in flags.items() if value is not None}
    if resume and "initial_weights" in given:
        raise ConfigError(
            f"--from starts a training, --resume goes on with the one in {output}: give one of them; "
            "a training that was started with --from is resumed without it"
        )
    if resume and config is None and (output / CONFIG_FILE).is_file():
        config = output / CONFIG_FILE
    settings = TrainingConfig.from_dict(given) if config is None else TrainingConfig.from_yaml(config, **given)
    check_start(settings, output, resume=resume)
    check_folder(output, TrainingError)
    train_set, val_set = open_split(settings, "train"), open_split(settings, "val")

    # From here on PyTorch is needed, which takes seconds to load.
    from agln_fast.training.trainer import train

    with progress_bar("iterations", remaining=True) as progress:
        run = train(settings, output, resume=resume, progress=progress, train_set=train_set, val_set=val_set)
    if run.rank > 0:  # one of several processes speaks
        return
    tell_skipped(train_set, val_set)
    if json:
        log = [asdict(row) for row in run.log]
        print_json({"weights": str(run.weights), "start": run.start or None, "log": log})
        return
    table = Table(title=f"{settings.title} on {settings.data}, seed {settings.seed}", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("epoch", "iteration", "rate", "loss", "train mIoU", "val mIoU", "pixel accuracy", "minutes"):
        table.add_column(column, justify="right")
    for row in run.log:
        table.add_row(
            f"{row.epoch:g}",
            str(row.iteration),
            f"{row.learning_rate:.2g}",
            f"{row.loss:.3f}",
            f"{row.train_miou:.2%}",
            f"{row.val_miou:.2%}",
            f"{row.val_pixel_accuracy:.2%}",
            f"{row.seconds / 60:.1f}",
        )
    out.print(table)
    out.print(str(run.weights), highlight=False, markup=False)
