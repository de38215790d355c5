"""What every dataset is: numbered images with label maps, and the class set that the labels mean."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from agln_fast import interruption
from agln_fast.data.classes import ClassSet
from agln_fast.errors import ConfigError, DatasetError

__all__ = [
    "IGNORE_INDEX",
    "SPLIT_NAMES",
    "CachedDataset",
    "Sample",
    "SegmentationDataset",
    "SomeSamples",
    "SoundSamples",
]

IGNORE_INDEX = 255
"""Label of pixels that belong to no class: neither trained on nor counted."""

SPLIT_NAMES = {"training": "train", "validation": "val", "valid": "val"}
"""Other names of splits -> ours."""

_Array: TypeAlias = npt.NDArray[np.uint8]


class Sample(NamedTuple):
    """image: (H, W, 3) uint8 RGB; labels: (H, W) uint8 class ids or IGNORE_INDEX; name: unique within the split."""

    image: _Array
    labels: _Array
    name: str


class SegmentationDataset(ABC):
    """A split of a dataset; a map-style dataset for `torch.utils.data.DataLoader` too.

    class_set: names and colours of the K classes.
    split: which part it is, e.g. "train".
    skipped: a line for each sample that was left out because it cannot be used.
    """

    class_set: ClassSet
    split: str
    skipped: tuple[str, ...] = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`, from the end if it is negative; IndexError where there is none."""

    def check_classes(self, count: int, network: str) -> None:
        """Refuse a network, called `network`, of another number of classes.

        Raises:
            ConfigError: it has another.
        """
        known = len(self.class_set.classes)
        if known != count:
            raise ConfigError(
                f"{network} has {count} classes, dataset {self.class_set.name} has {known}: take the dataset that the "
                "network was trained on"
            )

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))


class CachedDataset(SegmentationDataset):
    """Keeps in memory what it has read once: for datasets that are small, or slow to read, such as Scenes."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.class_set, self.split, self.skipped = dataset.class_set, dataset.split, dataset.skipped
        self._dataset = dataset
        self._samples: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Sample:
        if index not in self._samples:
            self._samples[index] = self._dataset[index]
        return self._samples[index]

    def fill(self) -> None:
        """Read all that has not been read."""
        for index in range(len(self)):
            self[index]


class SomeSamples(SegmentationDataset):
    """At most `count` samples of a dataset, evenly spread over it."""

    def __init__(self, dataset: SegmentationDataset, count: int) -> None:
        self.class_set, self.split, self.skipped = dataset.class_set, dataset.split, dataset.skipped
        self._dataset = dataset
        self._count = min(count, len(dataset))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[range(self._count)[index] * len(self._dataset) // self._count]


class SoundSamples(SegmentationDataset):
    """Those samples of a dataset that can be used; each is read once to find out."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        """
        Raises:
            DatasetError: none can.
        """
        self.class_set, self.split = dataset.class_set, dataset.split
        self._dataset = dataset
        self._indices: list[int] = []
        skipped = []
        for index in range(len(dataset)):
            interruption.check()
            try:
                dataset[index]
            except DatasetError as error:
                skipped.append(str(error))
            else:
                self._indices.append(index)
        self.skipped = (*dataset.skipped, *skipped)
        if not self._indices:
            raise DatasetError(f"none of the {len(self.skipped)} samples can be used; the first: {self.skipped[0]}")

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[self._indices[index]]
