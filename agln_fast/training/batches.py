"""From a dataset to batches: which crops an iteration sees, and how they become tensors; nothing here has a state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from agln_fast.contract import IOContract
from agln_fast.data.augment import Augmentation
from agln_fast.data.dataset import Sample, SegmentationDataset
from agln_fast.errors import AglnError
from agln_fast.runtime.images import pack
from agln_fast.training.config import TrainingConfig

__all__ = ["Batches", "Crops", "Images", "Item", "collate"]

Item: TypeAlias = tuple[Tensor, Tensor] | AglnError
"""Image and labels, or what is wrong with them: an exception that crosses processes would lose its one line."""


class Crops(Dataset[Item]):
    """(epoch, index) -> normalised image (3, crop, crop) float32 and labels (crop, crop) int64."""

    def __init__(self, dataset: SegmentationDataset, augmentation: Augmentation, seed: int) -> None:
        self.dataset, self.augmentation, self.seed = dataset, augmentation, seed

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        try:
            sample = self.dataset[index]
        except AglnError as error:
            return error
        return _tensors(self.augmentation(sample, np.random.default_rng([self.seed, epoch, index])))


class Images(Dataset[Item]):
    """index -> normalised image (3, H, W) float32 and labels (H, W) int64."""

    def __init__(self, dataset: SegmentationDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Item:
        try:
            return _tensors(self.dataset[index])
        except AglnError as error:
            return error


def collate(items: list[Item]) -> Item:
    errors = [item for item in items if isinstance(item, AglnError)]
    if errors:
        return errors[0]
    images, labels = zip(*(item for item in items if not isinstance(item, AglnError)), strict=True)
    return torch.stack(images), torch.stack(labels)


class Batches(Sampler[list[tuple[int, int]]]):
    """Keys of `Crops` for each of `iterations`: one shuffled epoch behind the other; process `rank` gets its part."""

    def __init__(self, length: int, config: TrainingConfig, iterations: range, rank: int, world: int) -> None:
        self.length, self.config, self.iterations, self.rank, self.world = length, config, iterations, rank, world

    def __len__(self) -> int:
        return len(self.iterations)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        batch, current, order = self.config.batch_size, -1, np.arange(0)
        for iteration in self.iterations:
            keys = []
            for position in range(iteration * batch, (iteration + 1) * batch):
                epoch, place = divmod(position, self.length)
                if epoch != current:
                    current, order = epoch, np.random.default_rng([self.config.seed, epoch]).permutation(self.length)
                keys.append((epoch, int(order[place])))
            yield keys[self.rank :: self.world]


def _tensors(sample: Sample) -> tuple[Tensor, Tensor]:
    """Image and labels as a network takes them: normalised as for every engine."""
    height, width = sample.labels.shape
    image = pack([sample.image], IOContract(height, width, layout="float_nchw"))[0]
    return torch.from_numpy(image), torch.from_numpy(sample.labels.astype(np.int64))
