"""What a verb is asked to run, checked by names and files alone: without PyTorch, which takes seconds to load."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from agln_fast.bundle import Bundle

__all__ = ["WeightsName", "check_engine", "may_be_bundle", "open_matching"]

WeightsName = Annotated[
    str | None,
    typer.Option("--weights", help="Of a checkpoint that holds several: the name of those to take, e.g. ema."),
]


def may_be_bundle(path: Path) -> bool:
    """Any folder but that of a training."""
    from agln_fast.models.shipped import CONFIG_FILE

    return path.is_dir() and not (path / CONFIG_FILE).exists()


def check_engine(backend: str, precision: str | None, device: str | None, threads: int | None) -> None:
    """Refuse a backend (or "auto"), precision (None for any), device or number of threads that cannot be.

    Raises:
        ConfigError: one of them makes no sense.
        BackendError: a GPU is asked for, and there is no driver of one.
    """
    from agln_fast.engines import check_device, check_threads, kind_of
    from agln_fast.engines.driver import check_driver
    from agln_fast.precision import check_precision

    if backend != "auto":
        kind_of(backend)
    if precision is not None:
        check_precision(precision)
    check_device(device)
    check_threads(threads)
    check_driver(device)


def open_matching(path: Path, backend: str, precision: str | None, device: str | None, threads: int | None) -> Bundle:
    """The bundle at `path`, which has an engine of that backend in that precision.

    Raises:
        ConfigError, BackendError: as `check_engine`.
        BundleError: it is damaged, or has no such engine.
    """
    from agln_fast.bundle import open_bundle

    check_engine(backend, precision, device, threads)
    bundle = open_bundle(path)
    bundle.matching(backend, precision)
    return bundle
