"""`agln-fast verify`: compare a bundle's engines with its own fp32 reference, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from agln_fast.cli.console import Json, print_json, progress_bar
from agln_fast.errors import VerificationError

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
    from agln_fast.runtime.images import list_images

    check_minimum(min_agreement)
    if samples is not None:
        list_images(samples)
    opened = open_matching(bundle, "auto", None, device, threads)

    # From here on PyTorch is needed, which takes seconds to load.
    from agln_fast.engines import REFERENCE
    from agln_fast.engines.torch_network import network_of
    from agln_fast.runtime.verify import make_reference, sample_frames, verify_engine

    failures: list[VerificationError] = []
    engines = []
    with progress_bar("engines") as progress:
        task = progress.add_task("reference", total=len(opened.manifest.engines))
        network = network_of(opened.artefact(opened.matching(REFERENCE)[0].name), threads)
        references = make_reference(network, opened.manifest.contract, sample_frames(samples, opened.manifest.contract))
        for engine in opened.manifest.engines:
            progress.update(task, description=engine.name)
            try:
                artefact = opened.artefact(engine.name)
                outcome = verify_engine(artefact, references, minimum=min_agreement, device=device, threads=threads)
                engines.append(replace(engine, verification=outcome))
            except VerificationError as error:
                failures.append(error)
                engines.append(replace(engine, verification=Verification("failed", str(error))))
            progress.advance(task)
    if json:
        results = {engine.name: engine.verification and asdict(engine.verification) for engine in engines}
        print_json({"bundle": str(opened.path), "engines": results, "failed": len(failures)})
    else:
        print_engines(Bundle(opened.path, replace(opened.manifest, engines=tuple(engines))))
    if failures:
        raise VerificationError("; ".join(str(error) for error in failures))
