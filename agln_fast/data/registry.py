"""Datasets by name, as the command line asks for them."""

from __future__ import annotations

import os
from collections.abc import Mapping

from agln_fast.data.dataset import SegmentationDataset
from agln_fast.data.readers import ADE20K, FolderDataset, PascalContext, PascalVOC
from agln_fast.data.scenes import Scenes
from agln_fast.errors import ConfigError, choose

__all__ = ["DATASETS", "open_dataset"]

_ON_DISK: Mapping[str, tuple[type[FolderDataset], Mapping[str, int]]] = {
    "pascal_voc": (PascalVOC, {}),
    "pascal_context_59": (PascalContext, {"num_classes": 59}),
    "pascal_context_60": (PascalContext, {"num_classes": 60}),
    "ade20k": (ADE20K, {}),
}

DATASETS = ("scenes", *_ON_DISK)
"""Names that `open_dataset` knows; each is the name of its class set, too."""


def open_dataset(
    name: str,
    split: str = "val",
    root: str | os.PathLike[str] | None = None,
    *,
    size: tuple[int, int] | None = None,
    length: int | None = None,
    seed: int = 0,
) -> SegmentationDataset:
    """Open a split of the dataset called `name`.

    Args:
        name: one of DATASETS.
        split: "train" or "val", or another split that the dataset has.
        root: the folder of a dataset on disk; None for "scenes", which is drawn.
        size: (height, width) of scenes in pixels; None for their own. A dataset on disk has the sizes of its images.
        length: the number of scenes; of a dataset on disk, take at most that many samples, the first ones.
        seed: of scenes; a dataset on disk has nothing random.

    Raises:
        ConfigError: an unknown name or split, or an option that is missing or does not belong to that dataset.
        DatasetError: the dataset on disk is missing, incomplete or damaged.
    """
    choose("dataset", name, DATASETS)
    if name == "scenes":
        if root is not None:
            raise ConfigError("dataset 'scenes' is drawn, not read: leave --data-root (root) away")
        return Scenes(split, size=size, length=length, seed=seed)
    kind, options = _ON_DISK[name]
    if root is None:
        raise ConfigError(
            f"dataset {name!r} lies on disk: give its folder with --data-root (root); {kind.layout(split)}"
        )
    if size is not None:
        raise ConfigError(f"size {size[0]}x{size[1]}: the images of {name!r} have sizes of their own; leave it away")
    return kind(root, split, length=length, **options)
