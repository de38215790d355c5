"""Datasets as the command line asks for them: by name, or by the folder of the user's own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from agln_fast.data.dataset import SegmentationDataset, SoundSamples
from agln_fast.data.layout import read_layout
from agln_fast.data.paired import PairedDataset
from agln_fast.data.readers import ADE20K, FolderDataset, PascalContext, PascalVOC
from agln_fast.data.scenes import Scenes
from agln_fast.errors import ConfigError, choose

__all__ = ["DATASETS", "check_dataset", "is_path", "open_dataset", "open_splits"]

_ON_DISK: Mapping[str, tuple[type[FolderDataset], Mapping[str, int]]] = {
    "pascal_voc": (PascalVOC, {}),
    "pascal_context_59": (PascalContext, {"num_classes": 59}),
    "pascal_context_60": (PascalContext, {"num_classes": 60}),
    "ade20k": (ADE20K, {}),
}

DATASETS = ("scenes", *_ON_DISK)
"""Names that `open_dataset` knows; each is the name of its class set, too."""


def is_path(data: str | os.PathLike[str]) -> bool:
    """Whether it stands for a dataset of the user's: not a known name, but a path, or something that is there."""
    return data not in DATASETS and (os.sep in os.fspath(data) or Path(data).exists())


def check_dataset(data: str | os.PathLike[str]) -> None:
    """
    Raises:
        ConfigError: it is neither a known name nor a path.
    """
    if not is_path(data):
        choose("dataset", data, DATASETS, listed=f"{', '.join(DATASETS)}, and the folder of your own")


def open_dataset(
    name: str | os.PathLike[str],
    split: str | None = "val",
    root: str | os.PathLike[str] | None = None,
    *,
    size: tuple[int, int] | None = None,
    length: int | None = None,
    seed: int = 0,
    skip_bad: bool = False,
) -> SegmentationDataset:
    """Open a split of a dataset.

    Args:
        name: one of DATASETS, or the folder or `data.yaml` of your own (docs/your-data.md).
        split: "train" or "val", or another split that the dataset has; None for "val", or all of a folder that is not
            divided.
        root: the folder of a published dataset; None for all others.
        size: (height, width) of scenes in pixels; None for their own. A dataset on disk has the sizes of its images.
        length: the number of scenes; of a dataset on disk, take at most that many samples, the first ones.
        seed: of scenes; a dataset on disk has nothing random.
        skip_bad: read all that lies on disk, and leave out what cannot be used; `skipped` lists it.

    Raises:
        ConfigError: an unknown name or split, or an option that is missing or does not belong to that dataset.
        DatasetError: the dataset on disk is missing, incomplete or damaged.
    """
    check_dataset(name)
    if name == "scenes":
        if root is not None:
            raise ConfigError("dataset 'scenes' is drawn, not read: leave --data-root (root) away")
        return Scenes(split or "val", size=size, length=length, seed=seed)
    dataset = _open_on_disk(name, split, root, size, length, skip_gaps=skip_bad)
    return SoundSamples(dataset) if skip_bad else dataset


def open_splits(
    name: str | os.PathLike[str],
    splits: Sequence[str] = (),
    root: str | os.PathLike[str] | None = None,
    *,
    length: int | None = None,
) -> tuple[str, dict[str, SegmentationDataset]]:
    """What kind of dataset it is, and its splits by name, all or some. Gaps are no errors: `skipped` lists them.

    Args and errors are those of `open_dataset`.
    """
    check_dataset(name)
    kind = "images and masks" if is_path(name) else os.fspath(name)
    opened = {}
    for split in splits or _split_names(name):
        if name == "scenes":
            dataset = open_dataset(name, split, root, length=length)
        else:
            dataset = _open_on_disk(name, split, root, None, length, skip_gaps=True)
        opened[dataset.split] = dataset
    return kind, opened


def _split_names(name: str | os.PathLike[str]) -> Sequence[str]:
    return ("train", "val") if name in DATASETS else tuple(read_layout(name).splits)


def _open_on_disk(
    name: str | os.PathLike[str],
    split: str | None,
    root: str | os.PathLike[str] | None,
    size: tuple[int, int] | None,
    length: int | None,
    *,
    skip_gaps: bool,
) -> SegmentationDataset:
    if size is not None:
        raise ConfigError(f"size {size[0]}x{size[1]}: the images of {name!r} have sizes of their own; leave it away")
    if name not in DATASETS:
        if root is not None:
            raise ConfigError(f"{name}: is the folder itself: leave --data-root (root) away")
        return PairedDataset(name, split, length=length, skip_gaps=skip_gaps)
    kind, options = _ON_DISK[os.fspath(name)]
    split = split or "val"
    if root is None:
        raise ConfigError(
            f"dataset {name!r} lies on disk: give its folder with --data-root (root); {kind.layout(split)}"
        )
    return kind(root, split, length=length, **options)
