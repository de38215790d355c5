"""`agln-fast verify --blocks`: where an engine leaves the reference, block by block."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from agln_fast.cli.console import out, print_json, print_wide, progress_bar, shown
from agln_fast.errors import BackendError, BundleError, ConfigError

if TYPE_CHECKING:
    from agln_fast.bundle import Bundle
    from agln_fast.data.dataset import SegmentationDataset
    from agln_fast.engines.base import Array
    from agln_fast.models.networks import SegmentationNetwork
    from agln_fast.runtime.blocks import BlockError, EngineBlocks

__all__ = ["BlocksRequest", "check_blocks", "show_blocks"]


class BlocksRequest(NamedTuple):
    """The options of `agln-fast verify` that count with `--blocks`."""

    samples: str | SegmentationDataset | None
    min_agreement: float | None
    device: str | None
    threads: int | None
    checkpoint: Path | None
    figure: Path | None


def check_blocks(asked: bool, figure: Path | None, checkpoint: Path | None) -> None:
    """Refuse what cannot be, before any work.

    Raises:
        ConfigError: an option that means nothing without `--blocks`.
        CheckpointError: there is no such checkpoint.
        ImageError, MissingPackageError: the figure could not be written.
    """
    from agln_fast.cli.places import check_figure
    from agln_fast.models.shipped import find_checkpoint

    for name, value in (("-o", figure), ("--checkpoint", checkpoint)):
        if value is not None and not asked:
            raise ConfigError(f"{name} {value}: is for what --blocks shows; add --blocks")
    check_figure(figure)
    if checkpoint is not None:
        find_checkpoint(checkpoint)


def show_blocks(bundle: Bundle, request: BlocksRequest, *, json: bool) -> None:
    """Compare every engine that can show its blocks with the reference, and print, or draw, their errors.

    Raises:
        BackendError: no engine can show its blocks here.
        BundleError: the bundle holds no weights, and no checkpoint is given.
        CheckpointError: the checkpoint does not fit the network that the bundle was built of.
    """
    from agln_fast.runtime.blocks import BlockReference, compare_blocks

    reference = BlockReference(_network(bundle, request), bundle.manifest.contract)
    images, minimum = _images(bundle, request)
    compared: list[EngineBlocks] = []
    failed: dict[str, str] = {}
    where: dict[str, Any] = {"device": request.device, "threads": request.threads}
    with progress_bar("engines") as progress:
        task = progress.add_task("reference", total=len(bundle.manifest.engines))
        for engine in bundle.manifest.engines:
            progress.update(task, description=engine.name)
            try:
                artefact = bundle.artefact(engine.name)
                compared.append(compare_blocks(artefact, reference, images, minimum=minimum, **where))
            except BackendError as error:
                failed[engine.name] = str(error)
            progress.advance(task)
    if not compared:
        raise BackendError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    if request.figure is not None:
        _draw(bundle, compared, request.figure)
    if json:
        engines = {each.engine: _values(each) for each in compared}
        print_json({"bundle": str(bundle.path), "engines": engines, "not_compared": failed})
        return
    _print(bundle, compared, failed)
    if request.figure is not None:
        out.print(f"wrote {request.figure}", highlight=False, markup=False)


def _network(bundle: Bundle, request: BlocksRequest) -> SegmentationNetwork:
    """The reference: of the checkpoint if one is given, or of the bundle's own weights."""
    from agln_fast.engines import REFERENCE
    from agln_fast.engines.torch_network import network_of
    from agln_fast.models.checkpoint import load_checkpoint

    if request.checkpoint is not None:
        return load_checkpoint(request.checkpoint, bundle.manifest.model)
    try:
        weights = bundle.matching(REFERENCE)[0]
    except BundleError:
        raise BundleError(
            f"{bundle.path}: holds no weights of the reference; give those it was built of: --checkpoint FILE"
        ) from None
    return network_of(bundle.artefact(weights.name), request.threads)


def _images(bundle: Bundle, request: BlocksRequest) -> tuple[list[Array], float | None]:
    """Batches of the smallest size, of the bundle's own pictures or those asked for; and the agreement asked for."""
    from agln_fast.runtime.arrival import Arrivals
    from agln_fast.runtime.references import dataset_frames, make_batches, sample_frames

    contract = bundle.manifest.contract
    own, wanted = Arrivals(bundle).reference or (None, None)
    if own is not None and request.samples is None:
        batches = [reference.image for reference in own]
    else:
        if request.samples is None or isinstance(request.samples, str):
            frames = sample_frames(request.samples, contract)
        else:
            frames = dataset_frames(request.samples, contract)
        batches = list(make_batches(contract, frames))
    minimum = wanted if request.min_agreement is None else request.min_agreement
    return [batch for batch in batches if len(batch) == contract.min_batch], minimum


def _draw(bundle: Bundle, compared: Sequence[EngineBlocks], path: Path) -> None:
    from agln_fast.figures.blocks import draw_blocks
    from agln_fast.figures.saving import save_figure

    model, contract = bundle.manifest.model, bundle.manifest.contract
    title = f"{bundle.path.name}: {model.architecture}, {model.encoder}, {contract.height}x{contract.width}"
    save_figure(draw_blocks(compared, title=title), path)


def _values(compared: EngineBlocks) -> dict[str, Any]:
    first = compared.first
    return {
        "precision": compared.precision,
        "bound": compared.bound,
        "first_above": None if first is None else first.block.name,
        "blocks": [
            {
                "block": each.block.name,
                "title": each.block.title,
                "status": _status(each),
                "error": _finite(each.error),
                "largest": _finite(each.largest),
                "shown_by": each.shown_by,
            }
            for each in compared.errors
        ],
    }


def _status(error: BlockError) -> str:
    if error.error is None:
        return "inside a rewrite"
    return "compared" if math.isfinite(error.error) else "not finite"


def _finite(number: float | None) -> float | None:
    """JSON has no infinity."""
    return None if number is None or not math.isfinite(number) else number


def _print(bundle: Bundle, compared: Sequence[EngineBlocks], failed: dict[str, str]) -> None:
    table = Table(title=f"{shown(bundle.path.name)}: relative error of each block", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("block", no_wrap=True)
    for engine in compared:
        table.add_column(shown("\n".join(engine.engine.split("-"))), justify="right", no_wrap=True)
    for row in zip(*(engine.errors for engine in compared), strict=True):
        cells = [_cell(each, engine) for each, engine in zip(row, compared, strict=True)]
        table.add_row(row[0].block.title, *cells)
    print_wide(table)
    for engine in compared:
        out.print(_verdict(engine), highlight=False, markup=False)
    if any(each.error is None for engine in compared for each in engine.errors):
        out.print("· inside a rewrite: no tensor of the engine equals it; it counts in what is computed from it")
    for name, reason in failed.items():
        out.print(f"{name}: not compared: {reason}", highlight=False, markup=False)


def _cell(each: BlockError, engine: EngineBlocks) -> str:
    if each.error is None:
        return "·"
    number = f"{each.error:.1e}" if math.isfinite(each.error) else "not finite"
    return f"[bold red]> {number}[/]" if each is engine.first else number


def _verdict(engine: EngineBlocks) -> str:
    first = engine.first
    if first is None:
        return f"{engine.engine}: every block is within {engine.bound:.2%}"
    words = f"{engine.engine}: the first block above {engine.bound:.2%} is {first.block.title} ({first.block.name})"
    if hidden := engine.inside(first):
        words += f", or inside the rewrite before it: {', '.join(each.block.title for each in hidden)}"
    return words
