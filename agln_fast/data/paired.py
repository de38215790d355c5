"""Datasets of the user: a folder of images and masks, in any of the layouts that `read_layout` knows."""

from __future__ import annotations

import os
from pathlib import Path

from agln_fast.data.dataset import SPLIT_NAMES, Sample, SegmentationDataset
from agln_fast.data.decoding import MASK_FORMATS, read_image, read_picture
from agln_fast.data.layout import ALL, read_layout
from agln_fast.data.partners import first_few
from agln_fast.errors import ConfigError, DatasetError, choose

__all__ = ["PairedDataset"]


class PairedDataset(SegmentationDataset):
    """A split of a folder of images and masks. docs/your-data.md says what it may hold.

    class_set: bears the name of the folder.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        split: str | None = "val",
        *,
        length: int | None = None,
        skip_gaps: bool = False,
    ) -> None:
        """
        Args:
            path: the folder, or the JSON or YAML file that describes it.
            split: its name, "all" in a folder that is not divided; None for "val", or that.
            length: take at most that many samples, the first ones; None for all.
            skip_gaps: leave out images without masks and masks without images, and list them in `skipped`.

        Raises:
            ConfigError: an unknown split, or a length below 1.
            DatasetError: the folder says nothing that makes sense; a partner is missing.
            MissingPackageError: YAML without PyYAML.
        """
        if length is not None and length < 1:
            raise ConfigError(f"length {length}: must be at least 1")
        layout = read_layout(path)
        self.splits = tuple(layout.splits)
        """Names of all that the folder has."""
        if split is None:
            split = ALL if ALL in self.splits else "val"
        if ALL in self.splits and split != ALL:
            raise ConfigError(
                f"{path}: is not divided into splits, so there is no {split!r}: give split {ALL!r}, or write "
                "train.txt and val.txt"
            )
        self.split = choose("split", SPLIT_NAMES.get(split, split), self.splits, where=str(path))
        self.class_set = layout.classes.class_set(layout.name)
        self._code = layout.code
        pairs, gaps = layout.pairs(self.split)
        if gaps and not skip_gaps:
            share = f"{len(gaps)} of {len(pairs) + len(gaps)}"
            raise DatasetError(f"{path}: {share} in split {self.split!r} have no partner: {first_few(gaps)}")
        if not pairs:
            raise DatasetError(f"{path}: split {self.split!r} is empty")
        self.skipped = tuple(gaps)
        self._pairs = list(pairs.items())[:length]

    def __len__(self) -> int:
        return len(self._pairs)

    def files(self, index: int) -> tuple[Path, Path]:
        """Image and mask of sample number `index`."""
        return self._pairs[index][1]

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`; negative ones count from the end.

        Raises:
            IndexError: past either end.
            DatasetError: a file that cannot be decoded, sizes that differ, a mask value or colour that is no class.
        """
        name, (image_path, mask_path) = self._pairs[index]
        if mask_path.suffix.lower() in (".jpg", ".jpeg"):
            raise DatasetError(f"{mask_path}: JPEG changes values where classes meet; save masks as PNG")
        mask = read_picture(mask_path, MASK_FORMATS, "restore it, or take it out of the dataset")
        image = read_image(image_path, (mask.height, mask.width))  # [H, W, 3]
        height, width = image.shape[:2]
        if mask.size != (width, height):
            raise DatasetError(f"{image_path}: is {width}x{height}, but {mask_path} is {mask.width}x{mask.height}")
        return Sample(image, self._code.labels(mask, str(mask_path)), name)
