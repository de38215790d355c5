"""Compare an engine with the fp32 reference network on sample images."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from agln_fast import interruption
from agln_fast.artefact import Artefact
from agln_fast.contract import IOContract
from agln_fast.data.scenes import Scenes
from agln_fast.decode import best_classes
from agln_fast.deployment import DeployedNetwork
from agln_fast.engines import obstacle_to, open_engine
from agln_fast.errors import BackendError, VerificationError
from agln_fast.manifest import Verification
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.precision import PRECISIONS
from agln_fast.runtime.images import fit, list_images, load_image, pack

__all__ = [
    "Reference",
    "make_reference",
    "sample_frames",
    "sample_images",
    "verify_engine",
]

_SAMPLES = 4
_LARGEST_DRAWN = 512  # pixels; larger scenes would take longer to draw than to segment
_Batch = npt.NDArray[Any]


@dataclass(frozen=True)
class Reference:
    """One batch of engine input and what the fp32 reference makes of it.

    image: as the contract says; labels (B, H, W); margin (B, H, W), top-1 minus top-2; logits (B, K, H, W) float32,
        kept only where engines return logits, because they are large.
    """

    image: _Batch
    logits: _Batch | None
    labels: _Batch
    margin: _Batch


def sample_images(
    count: int, height: int, width: int, seed: int = 0, split: str = "test"
) -> list[npt.NDArray[np.uint8]]:
    """Scenes (height, width, 3) of a split, the first ones; drawn at up to 512 pixels a side, then enlarged."""
    scenes = Scenes(split, size=(_drawn(height), _drawn(width)), length=count, seed=seed)
    stretch = IOContract(height, width)
    return [fit(sample.image, stretch)[0] for sample in scenes]


def _drawn(side: int) -> int:
    return min(max(side, 32), _LARGEST_DRAWN)


def sample_frames(samples: str | os.PathLike[str] | None, contract: IOContract) -> list[npt.NDArray[np.uint8]]:
    """Frames (height, width, 3) of the contract's size: an image, folder or pattern, or None for Scenes.

    Raises:
        ImageError: there is no image, or one cannot be used.
    """
    if samples is None:
        return sample_images(_SAMPLES, contract.height, contract.width)
    # What slides over an image at run time is compared on the whole image here: the engine cannot tell.
    whole = replace(contract, resize="stretch")
    return [fit(load_image(path), whole)[0] for path in list_images(os.fspath(samples))]


def make_reference(
    network: SegmentationNetwork, contract: IOContract, frames: Sequence[npt.NDArray[np.uint8]]
) -> list[Reference]:
    """Run the fp32 reference on frames (height, width, 3) of the contract's size.

    All frames go in batches of the smallest size that the engine accepts; one more batch has the largest.

    Raises:
        VerificationError: the network itself gives NaN or Inf.
    """
    deployed = DeployedNetwork(network, replace(contract, output="logits"), network.config.num_classes)
    sizes = [contract.min_batch] * -(-len(frames) // contract.min_batch)
    if contract.max_batch > contract.min_batch:
        sizes.append(contract.max_batch)
    endless = cycle(frames)
    references = []
    for size in sizes:
        interruption.check()
        image = pack(list(islice(endless, size)), contract)
        with torch.inference_mode():
            logits = deployed(torch.from_numpy(image))
            top = logits.topk(min(2, logits.shape[1]), 1).values
            margin = top[:, 0] - top[:, -1]
        if not logits.isfinite().all():
            raise VerificationError("the fp32 network gives NaN or Inf on the sample images; check its weights")
        kept = logits.numpy() if contract.output == "logits" else None
        references.append(Reference(image, kept, logits.argmax(1).to(torch.int32).numpy(), margin.numpy()))
    return references


def verify_engine(
    artefact: Artefact,
    references: Sequence[Reference],
    *,
    minimum: float | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> Verification:
    """Run an engine on the reference's input and compare; one that cannot run here is recorded as such.

    Args:
        minimum: smallest agreement that passes (weighted by margin below fp32); None for that of its precision.

    Raises:
        VerificationError: the agreement is below the minimum, or the output is not finite or of the wrong shape.
    """
    if obstacle := obstacle_to(artefact, device):
        return Verification("not verified on this machine", obstacle)
    seconds = []
    equal, total, weight, weighted, worst = 0, 0, 0.0, 0.0, None
    try:
        with open_engine(artefact, device=device, threads=threads) as opened:
            where = opened.device
            opened.run(references[0].image)
            for reference in references:
                interruption.check()
                before = time.perf_counter()
                output = opened.run(reference.image)
                seconds.append(time.perf_counter() - before)
                if reference.logits is not None:
                    if output.shape != reference.logits.shape or not np.isfinite(output).all():
                        raise VerificationError(f"{artefact.name}: logits of shape {output.shape} or not finite")
                    worst = max(worst or 0.0, float(np.abs(output - reference.logits).max()))
                    output = np.stack([best_classes(logits) for logits in output])
                if output.shape != reference.labels.shape:
                    raise VerificationError(
                        f"{artefact.name}: labels {output.shape}, reference {reference.labels.shape}"
                    )
                same = output == reference.labels
                equal, total = equal + int(same.sum()), total + same.size
                weight += float(reference.margin.sum(dtype=np.float64))
                weighted += float(reference.margin[same].sum(dtype=np.float64))
    except BackendError as error:
        raise VerificationError(f"{artefact.name}: {error}") from None
    # The last batch may be the one of the largest size, which takes its own time.
    differs = len(references[-1].image) != len(references[0].image)
    agreement, weighted_agreement = equal / total, min(1.0, weighted / weight) if weight > 0 else 1.0
    judged = agreement if artefact.precision == "fp32" else weighted_agreement
    minimum = PRECISIONS[artefact.precision].agreement if minimum is None else minimum
    if judged < minimum:
        kind = "" if artefact.precision == "fp32" else " weighted by margin"
        raise VerificationError(
            f"{artefact.name}: agrees with the fp32 reference on {judged:.4%} of the pixels{kind}, "
            f"below the minimum of {minimum:.4%}; try another precision, or lower the minimum if you accept that"
        )
    return Verification(
        "passed",
        images=sum(len(reference.labels) for reference in references),
        agreement=agreement,
        weighted_agreement=weighted_agreement,
        max_logit_error=worst,
        latency_ms=1e3 * statistics.median(seconds[:-1] if differs else seconds),
        device=where,
    )
