"""What a dataset is like: counts, sizes, shares of classes, and what may be wrong with it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from agln_fast import interruption
from agln_fast.data.classes import ClassSet
from agln_fast.data.dataset import IGNORE_INDEX, SegmentationDataset
from agln_fast.data.partners import first_few
from agln_fast.errors import DatasetError

__all__ = ["SplitSurvey", "Survey", "survey"]

_FEW_SAMPLES = 20  # below it, one image moves the mIoU of a split by points
_MUCH_IGNORED = 0.5
_Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SplitSurvey:
    """A split.

    names: of the samples that can be used. sizes: (N, 2) height and width of each, pixels.
    pixels, images: (K,) pixels of each class, and images that show it. ignored: pixels that belong to none.
    single: the names of samples whose mask has one class alone, or none.
    digests: of the pixels of each image. bad: a line for each sample that cannot be used.
    """

    names: tuple[str, ...]
    sizes: _Counts
    pixels: _Counts
    images: _Counts
    ignored: int
    single: tuple[str, ...]
    digests: tuple[bytes, ...]
    bad: tuple[str, ...]

    @property
    def ignored_share(self) -> float:
        """Of all pixels, 0..1."""
        return self.ignored / max(1, int(self.pixels.sum()) + self.ignored)

    @property
    def pixel_shares(self) -> npt.NDArray[np.float64]:
        """(K,) the share of each class, 0..1, in the pixels that are not ignored."""
        return self.pixels / max(1, int(self.pixels.sum()))

    @property
    def image_shares(self) -> npt.NDArray[np.float64]:
        """(K,) the share of images that show each class, 0..1."""
        return self.images / max(1, len(self.names))

    def extent(self) -> list[tuple[int, int]]:
        """(height, width) of the smallest image, the middle one and the largest; empty without a sample."""
        by_area = sorted(map(tuple, self.sizes.tolist()), key=lambda size: (size[0] * size[1], size))
        return [by_area[index] for index in (0, len(by_area) // 2, -1)] if by_area else []


@dataclass(frozen=True, eq=False)
class Survey:
    """What was found: `splits` by name, of one class set."""

    class_set: ClassSet
    splits: Mapping[str, SplitSurvey]

    @property
    def bad(self) -> list[str]:
        """A line for each sample that cannot be used."""
        return [line for split in self.splits.values() for line in split.bad]

    def warnings(self) -> list[str]:
        """What a person should look at, a line each."""
        return list(self._warnings())

    def _warnings(self) -> Iterator[str]:
        classes = np.array(self.class_set.classes)
        seen = {name: split.images > 0 for name, split in self.splits.items()}
        never = classes[~np.logical_or.reduce(list(seen.values()))]
        if len(never):
            yield f"{len(never)} of {len(classes)} classes are never seen: {first_few(never)}"
        if "train" in seen and "val" in seen:
            for here, there, what in (
                ("train", "val", "nothing validates them"),
                ("val", "train", "nothing teaches them"),
            ):
                missing = classes[seen[here] & ~seen[there]]
                if len(missing):
                    yield f"{len(missing)} classes are in {here} and not in {there}, {what}: {first_few(missing)}"
        for name, split in self.splits.items():
            yield from _of_split(name, split)
        yield from self._duplicates()

    def _duplicates(self) -> Iterator[str]:
        by_digest: dict[bytes, list[str]] = {}
        for name, split in self.splits.items():
            for sample, digest in zip(split.names, split.digests, strict=True):
                by_digest.setdefault(digest, []).append(f"{name}: {sample}")
        groups = [group for group in by_digest.values() if len(group) > 1]
        across = [group for group in groups if len({text.partition(": ")[0] for text in group}) > 1]
        within = [group for group in groups if group not in across]
        if across:
            pairs = first_few(" = ".join(group) for group in across)
            yield f"{len(across)} images are in several splits, which makes scores too good: {pairs}"
        if within:
            yield f"{len(within)} images are in one split several times: {first_few(' = '.join(g) for g in within)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; shares in 0..1."""
        return {
            "classes": list(self.class_set.classes),
            "splits": {name: _plain(split, self.class_set.classes) for name, split in self.splits.items()},
            "warnings": self.warnings(),
        }


def survey(datasets: Mapping[str, SegmentationDataset], advance: Callable[[], object] = lambda: None) -> Survey:
    """Read every sample of the splits of one dataset; those that cannot be read are told, not raised.

    `advance` is called after each.

    Raises:
        Interrupted: a signal asked the program to end.
    """
    class_set = next(iter(datasets.values())).class_set
    return Survey(class_set, {name: _survey(dataset, advance) for name, dataset in datasets.items()})


def _survey(dataset: SegmentationDataset, advance: Callable[[], object]) -> SplitSurvey:
    count = len(dataset.class_set.classes)
    pixels, images, ignored = np.zeros(count, np.int64), np.zeros(count, np.int64), 0
    names, sizes, single, digests, bad = [], [], [], [], list(dataset.skipped)
    for index in range(len(dataset)):
        interruption.check()
        try:
            image, labels, name = dataset[index]
        except DatasetError as error:
            bad.append(str(error))
        else:
            counts = np.bincount(labels.reshape(-1), minlength=IGNORE_INDEX + 1)
            pixels += counts[:count]
            images += counts[:count] > 0
            ignored += int(counts[IGNORE_INDEX])
            names.append(name)
            sizes.append(labels.shape)
            digests.append(hashlib.blake2b(f"{image.shape}".encode() + image.tobytes(), digest_size=16).digest())
            if np.count_nonzero(counts[:count]) < 2:
                single.append(name)
        advance()
    found = np.array(sizes, np.int64).reshape(-1, 2)
    return SplitSurvey(tuple(names), found, pixels, images, ignored, tuple(single), tuple(digests), tuple(bad))


def _of_split(name: str, split: SplitSurvey) -> Iterator[str]:
    count = len(split.names)
    if split.single:
        yield f"{name}: {len(split.single)} of {count} masks have one class alone, or none: {first_few(split.single)}"
    if split.ignored_share > _MUCH_IGNORED:
        yield f"{name}: {split.ignored_share:.0%} of the pixels are ignored"
    shapes = Counter(map(tuple, split.sizes.tolist()))
    if len(shapes) > 1:
        (height, width), most = shapes.most_common(1)[0]
        yield f"{name}: images have {len(shapes)} sizes; {most} of {count} have {height}x{width}"
    if name in ("val", "test") and count < _FEW_SAMPLES:
        yield f"{name}: {count} samples are few, so its mIoU is a rough number"


def _plain(split: SplitSurvey, classes: Sequence[str]) -> dict[str, Any]:
    shares = zip(classes, split.pixel_shares.tolist(), split.image_shares.tolist(), strict=True)
    extent = split.extent()
    return {
        "samples": len(split.names),
        "sizes": dict(zip(("min", "median", "max"), map(list, extent), strict=True)) if extent else None,
        "ignored": round(split.ignored_share, 6),
        "classes": {name: {"pixels": round(p, 6), "images": round(i, 6)} for name, p, i in shares},
        "bad": list(split.bad),
    }
