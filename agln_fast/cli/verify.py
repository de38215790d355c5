"""`agln-fast verify`: compare a bundle's engines with its own fp32 reference, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agln_fast.cli.console import Json, out, print_json, progress_bar
from agln_fast.cli.datasets import DataOrNone, DataRoot, SkipBad, Split, tell_skipped, warn_of_names
from agln_fast.errors import ConfigError, MissingPackageError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from agln_fast.bundle import Bundle
    from agln_fast.data.dataset import SegmentationDataset
    from agln_fast.manifest import EngineRecord
    from agln_fast.runtime.verify import Reference

__all__ = ["verify"]


def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.agln.")],
    samples: Annotated[str | None, typer.Option(help="Image, folder or pattern to verify with.")] = None,
    data: DataOrNone = None,
    data_root: DataRoot = None,
    split: Split = None,
    skip_bad: SkipBad = False,
    limit: Annotated[
        int, typer.Option("-n", "--limit", min=1, help="Only so many samples of --data, evenly spread.")
    ] = 32,
    min_agreement: Annotated[float | None, typer.Option(help="Smallest agreement with fp32 that passes, 0..1.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default each engine's own.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="Show the error of each block of each engine.")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--to", help="With --blocks: a figure to write.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="With --blocks: weights, if the bundle has none.")] = None,
    json: Json = False,
) -> None:
    """Check every file's hash, run every engine that can run here, and compare its labels with the fp32 network.

    With --data it is compared on images of a dataset, and the mIoU of each engine on them is told, too.
    With --blocks, compare what each block of the network gives instead: where does an engine leave the reference?
    """
    from dataclasses import asdict, replace

    from agln_fast.bundle import Bundle
    from agln_fast.cli.blocks import BlocksRequest, check_blocks, show_blocks
    from agln_fast.cli.build import print_engines
    from agln_fast.cli.request import open_matching
    from agln_fast.manifest import Verification
    from agln_fast.precision import check_minimum
    from agln_fast.runtime.arrival import Arrivals, least_agreement
    from agln_fast.runtime.images import list_images
    from agln_fast.runtime.verify import verify_engine

    check_minimum(min_agreement)
    if samples is not None:
        list_images(samples)
    check_blocks(blocks, output, checkpoint)
    opened = open_matching(bundle, "auto", None, device, threads)
    dataset = None if data is None else _open_data(opened, data, data_root, split, samples, limit, skip_bad=skip_bad)
    if blocks:
        request = BlocksRequest(dataset or samples, min_agreement, device, threads, checkpoint, output)
        show_blocks(opened, request, json=json)
        return
    arrivals = Arrivals(opened, device, threads)
    own, wanted = arrivals.reference or (None, None)
    minimum = wanted if min_agreement is None else min_agreement

    failures: list[VerificationError] = []
    engines = []
    with progress_bar("engines") as progress:
        task = progress.add_task("reference", total=len(opened.manifest.engines))
        is_own = own is not None and samples is None and dataset is None
        references = (
            own if own is not None and is_own else _references(opened, dataset if samples is None else samples, threads)
        )
        for engine in opened.manifest.engines:
            progress.update(task, description=engine.name)
            outcome: Verification | VerificationError
            try:
                artefact = opened.artefact(engine.name)
                least = least_agreement(engine, minimum)
                outcome = verify_engine(artefact, references, minimum=least, device=device, threads=threads)
                engines.append(replace(engine, verification=outcome))
            except VerificationError as error:
                outcome = error
                failures.append(error)
                engines.append(replace(engine, verification=Verification("failed", str(error))))
            if references is own and min_agreement is None:
                arrivals.remember(engine, outcome)
            progress.advance(task)
    passed = [engine for engine in engines if engine.verification and engine.verification.status == "passed"]
    scores = {} if dataset is None else _scores(opened, passed, dataset, device, threads)
    if dataset is not None:
        tell_skipped(dataset)
    if json:
        results = {engine.name: engine.verification and asdict(engine.verification) for engine in engines}
        miou = {} if dataset is None else {"miou": scores}
        print_json({"bundle": str(opened.path), "engines": results, "failed": len(failures), **miou})
    else:
        print_engines(Bundle(opened.path, replace(opened.manifest, engines=tuple(engines))))
        if dataset is not None:
            what = f"{dataset.class_set.name} {dataset.split}, {len(dataset)} images"
            for name, score in scores.items():
                out.print(f"{name}: {score:.2%} mIoU on {what}", highlight=False, markup=False)
    if failures:
        raise VerificationError("; ".join(str(error) for error in failures))


def _open_data(
    bundle: Bundle,
    data: str,
    root: Path | None,
    split: str | None,
    samples: str | None,
    limit: int,
    *,
    skip_bad: bool,
) -> SegmentationDataset:
    """The samples of `--data`, of as many classes as the bundle's network has."""
    from importlib.util import find_spec

    from agln_fast.data.dataset import SomeSamples
    from agln_fast.data.registry import open_dataset

    if samples is not None:
        raise ConfigError("--samples and --data are both to verify with: give one of them")
    dataset = open_dataset(data, split, root, skip_bad=skip_bad)
    dataset.check_classes(len(bundle.manifest.classes), f"bundle {bundle.path}")
    if find_spec("torchmetrics") is None:
        raise MissingPackageError("torchmetrics", "eval")
    return SomeSamples(dataset, limit)


def _scores(
    bundle: Bundle,
    engines: Sequence[EngineRecord],
    dataset: SegmentationDataset,
    device: str | None,
    threads: int | None,
) -> dict[str, float]:
    """The mIoU of each engine, 0..1."""
    from agln_fast.data.classes import ClassSet
    from agln_fast.engines import open_engine
    from agln_fast.evaluation.evaluate import evaluate
    from agln_fast.runtime.segmenter import Segmenter

    manifest = bundle.manifest
    names = ClassSet("bundle", bundle.path.stem, manifest.classes, manifest.palette)
    warn_of_names(names, dataset.class_set)
    scores = {}
    for engine in engines:
        opened = open_engine(bundle.artefact(engine.name), device=device, threads=threads)
        aligned = manifest.model.align_corners
        with Segmenter(engine, opened, manifest.contract, names, align_corners=aligned) as segmenter:
            scores[engine.name] = evaluate(segmenter, dataset).metrics.mean_iou
    return scores


def _references(bundle: Bundle, source: str | SegmentationDataset | None, threads: int | None) -> list[Reference]:
    """What the bundle's fp32 network makes of samples, or of a dataset. This needs PyTorch, which takes seconds to
    load."""
    from agln_fast.engines import REFERENCE
    from agln_fast.engines.torch_network import network_of
    from agln_fast.runtime.references import dataset_frames, make_reference, sample_frames

    contract = bundle.manifest.contract
    network = network_of(bundle.artefact(bundle.matching(REFERENCE)[0].name), threads)
    if source is None or isinstance(source, str):
        frames = sample_frames(source, contract)
    else:
        frames = dataset_frames(source, contract)
    return make_reference(network, contract, frames)
