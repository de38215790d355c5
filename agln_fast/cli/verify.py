"""`agln-fast verify`: compare a bundle's engines with its own fp32 reference, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agln_fast.cli.console import Json, print_json, progress_bar
from agln_fast.errors import VerificationError

if TYPE_CHECKING:
    from agln_fast.bundle import Bundle
    from agln_fast.runtime.verify import Reference

__all__ = ["verify"]


def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle, NAME.agln.")],
    samples: Annotated[str | None, typer.Option(help="Image, folder or pattern to verify with.")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="Smallest agreement with fp32 that passes, 0..1.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default each engine's own.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    json: Json = False,
) -> None:
    """Check every file's hash, run every engine that can run here, and compare its labels with the fp32 network."""
    from dataclasses import asdict, replace

    from agln_fast.bundle import Bundle
    from agln_fast.cli.build import print_engines
    from agln_fast.cli.request import open_matching
    from agln_fast.manifest import Verification
    from agln_fast.precision import check_minimum
    from agln_fast.runtime.arrival import Arrivals
    from agln_fast.runtime.images import list_images
    from agln_fast.runtime.verify import verify_engine

    check_minimum(min_agreement)
    if samples is not None:
        list_images(samples)
    opened = open_matching(bundle, "auto", None, device, threads)
    arrivals = Arrivals(opened, device, threads)
    own, wanted = arrivals.reference or (None, None)
    minimum = wanted if min_agreement is None else min_agreement

    failures: list[VerificationError] = []
    engines = []
    with progress_bar("engines") as progress:
        task = progress.add_task("reference", total=len(opened.manifest.engines))
        references = own if own is not None and samples is None else _references(opened, samples, threads)
        for engine in opened.manifest.engines:
            progress.update(task, description=engine.name)
            outcome: Verification | VerificationError
            try:
                artefact = opened.artefact(engine.name)
                outcome = verify_engine(artefact, references, minimum=minimum, device=device, threads=threads)
                engines.append(replace(engine, verification=outcome))
            except VerificationError as error:
                outcome = error
                failures.append(error)
                engines.append(replace(engine, verification=Verification("failed", str(error))))
            if references is own and min_agreement is None:
                arrivals.remember(engine, outcome)
            progress.advance(task)
    if json:
        results = {engine.name: engine.verification and asdict(engine.verification) for engine in engines}
        print_json({"bundle": str(opened.path), "engines": results, "failed": len(failures)})
    else:
        print_engines(Bundle(opened.path, replace(opened.manifest, engines=tuple(engines))))
    if failures:
        raise VerificationError("; ".join(str(error) for error in failures))


def _references(bundle: Bundle, samples: str | None, threads: int | None) -> list[Reference]:
    """What the bundle's fp32 network makes of the samples. This needs PyTorch, which takes seconds to load."""
    from agln_fast.engines import REFERENCE
    from agln_fast.engines.torch_network import network_of
    from agln_fast.runtime.references import make_reference, sample_frames

    contract = bundle.manifest.contract
    network = network_of(bundle.artefact(bundle.matching(REFERENCE)[0].name), threads)
    return make_reference(network, contract, sample_frames(samples, contract))
