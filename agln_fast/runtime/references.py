"""What the fp32 reference network makes of sample images. It needs PyTorch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from agln_fast import interruption
from agln_fast.contract import IOContract
from agln_fast.data.dataset import SegmentationDataset
from agln_fast.data.scenes import Scenes
from agln_fast.deployment import DeployedNetwork
from agln_fast.errors import VerificationError
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.runtime.images import fit, list_images, load_image, pack
from agln_fast.runtime.verify import Reference, batch_sizes

__all__ = ["SAMPLES", "dataset_frames", "make_batches", "make_reference", "sample_frames", "sample_images"]

SAMPLES = 4
"""Pictures to verify with, where nobody names some."""

_LARGEST_DRAWN = 512  # pixels; larger scenes would take longer to draw than to segment


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
        return sample_images(SAMPLES, contract.height, contract.width)
    # What slides over an image at run time is compared on the whole image here: the engine cannot tell.
    whole = replace(contract, resize="stretch")
    return [fit(load_image(path), whole)[0] for path in list_images(os.fspath(samples))]


def dataset_frames(dataset: SegmentationDataset, contract: IOContract) -> list[npt.NDArray[np.uint8]]:
    """Frames (height, width, 3) of the contract's size: the images of a dataset.

    Raises:
        DatasetError: one of them cannot be used.
    """
    return [fit(sample.image, contract.whole())[0] for sample in dataset]


def make_batches(contract: IOContract, frames: Sequence[npt.NDArray[np.uint8]]) -> Iterator[npt.NDArray[Any]]:
    """What an engine takes, of frames (height, width, 3) of the contract's size.

    They go in batches of `batch_sizes`, in turn and from the beginning again.
    """
    endless = cycle(frames)
    for size in batch_sizes(contract, len(frames)):
        yield pack(list(islice(endless, size)), contract)


def make_reference(
    network: SegmentationNetwork, contract: IOContract, frames: Sequence[npt.NDArray[np.uint8]]
) -> list[Reference]:
    """Run the fp32 reference on frames (height, width, 3) of the contract's size, in `make_batches`.

    Raises:
        VerificationError: the network itself gives NaN or Inf.
    """
    deployed = DeployedNetwork(network, replace(contract, output="logits"), network.config.num_classes)
    references = []
    for image in make_batches(contract, frames):
        interruption.check()
        with torch.inference_mode():
            logits = deployed(torch.from_numpy(image))
            top = logits.topk(min(2, logits.shape[1]), 1).values
            margin = top[:, 0] - top[:, -1]
        if not logits.isfinite().all():
            raise VerificationError("the fp32 network gives NaN or Inf on the sample images; check its weights")
        kept = logits.numpy() if contract.output == "logits" else None
        references.append(Reference(image, kept, logits.argmax(1).to(torch.int32).numpy(), margin.numpy()))
    return references
