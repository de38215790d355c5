"""The pictures of a build: which ones are calibrated on, which ones engines are held against the reference on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from agln_fast.contract import IOContract
from agln_fast.data.classes import default_class_set
from agln_fast.data.dataset import IGNORE_INDEX, CachedDataset, Sample, SegmentationDataset, SomeSamples
from agln_fast.data.scenes import Scenes
from agln_fast.engines.base import CALIBRATION
from agln_fast.errors import ConfigError
from agln_fast.runtime.images import fit, list_images, load_image

__all__ = ["Pictures", "Unlabelled"]

_Frame = npt.NDArray[np.uint8]


class Unlabelled(SegmentationDataset):
    """Images without masks: a file, a folder or a pattern, as `list_images` takes it. Every pixel is ignored.

    Raises:
        ConfigError: two have the same name but for the suffix, as images and masks have.
        ImageError: there is no image; one cannot be used, when it is read.
    """

    def __init__(self, images: str | os.PathLike[str]) -> None:
        self._files = list_images(os.fspath(images))
        seen: dict[str, Path] = {}
        for file in self._files:
            if (other := seen.setdefault(file.stem, file)) is not file and other.parent == file.parent:
                raise ConfigError(
                    f"{file.parent}: {other.name} and {file.name} have one name; if one is the mask of the other, put "
                    "images into images/, masks into masks/, and the names of the classes into classes.txt"
                )
        self.class_set, self.split = replace(default_class_set(1), name="images without masks"), "all"

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Sample:
        image = load_image(self._files[index])
        return Sample(image, np.full(image.shape[:2], IGNORE_INDEX, np.uint8), self._files[index].name)


class _Some(SegmentationDataset):
    """The samples of a dataset of the given indices."""

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self.class_set, self.split = dataset.class_set, dataset.split
        self._dataset, self._indices = dataset, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        return self._dataset[self._indices[index]]


@dataclass(frozen=True)
class Pictures:
    """Pictures of a dataset of the user's, or of Scenes where there is none.

    What is calibrated on is not judged by: of a dataset, every so many-th image is for the one, and all others are for
    the other. Of Scenes, it is the train split and the test split.

    dataset: the user's; None for Scenes. calibrates: whether something will be calibrated.
    count: images to calibrate on; None for 128, or half of the dataset where it has fewer than 256.

    Raises:
        ConfigError: a count below one, or of more images than there are.
    """

    dataset: SegmentationDataset | None = None
    count: int | None = None
    calibrates: bool = True

    def __post_init__(self) -> None:
        if self.count is not None and (type(self.count) is not int or self.count < 1):
            raise ConfigError(f"calibration on {self.count} images: must be a whole number of at least 1")
        if not self.calibrates:
            return
        there = len(self._source)
        if self.dataset is not None and there < 2:
            raise ConfigError("int8 needs two images at least: one to calibrate on, and one to judge by")
        if self.number > there - (self.dataset is not None):
            left = "" if self.dataset is None else ", and one at least must be left to judge by"
            raise ConfigError(f"calibration on {self.number} images: there are {there}{left}")

    @property
    def labelled(self) -> SegmentationDataset | None:
        """The user's, if it has masks."""
        return None if isinstance(self.dataset, Unlabelled) else self.dataset

    @property
    def number(self) -> int:
        """Of the images to calibrate on."""
        if self.count is not None or self.dataset is None:
            return self.count or CALIBRATION
        return min(CALIBRATION, len(self.dataset) // 2)

    @cached_property
    def _source(self) -> SegmentationDataset:
        return Scenes("train") if self.dataset is None else self.dataset

    @property
    def _calibration(self) -> list[int]:
        """Indices, evenly spread over the dataset."""
        return [place * len(self._source) // self.number for place in range(self.number)]

    @cached_property
    def judged(self) -> SegmentationDataset:
        """What engines are held against the reference on, again and again: scenes are drawn once."""
        if self.dataset is None:
            return CachedDataset(Scenes("test"))
        taken = set(self._calibration if self.calibrates else ())
        judged = _Some(self.dataset, [index for index in range(len(self.dataset)) if index not in taken])
        return CachedDataset(judged) if isinstance(self.dataset, Scenes) else judged

    def frames(self, contract: IOContract) -> list[_Frame]:
        """Those of the user's to calibrate on, (height, width, 3) as they come to the engine.

        What slides over an image sees the whole of it.
        """
        return [fit(self._source[index].image, contract.whole())[0] for index in self._calibration]

    def calibrated_on(self, count: int) -> SegmentationDataset:
        """Of those that are calibrated on, at most `count`, evenly spread."""
        return SomeSamples(_Some(self._source, self._calibration), count)

    def some(self, count: int) -> SegmentationDataset:
        """Of those that are judged by, at most `count`, evenly spread."""
        return SomeSamples(self.judged, count)

    def samples(self, contract: IOContract, count: int) -> list[_Frame]:
        """`some` of the user's, as `frames`."""
        return [fit(sample.image, contract.whole())[0] for sample in self.some(count)]
