"""Published datasets as they lie on disk: PASCAL VOC 2012, PASCAL Context and ADE20K.

Every file of a split is looked for when the dataset is opened, so that a gap in it shows before an hour of training.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from agln_fast.data.classes import class_set
from agln_fast.data.dataset import IGNORE_INDEX, SPLIT_NAMES, Sample, SegmentationDataset
from agln_fast.data.decoding import read_picture
from agln_fast.errors import ConfigError, DatasetError, choose

__all__ = ["ADE20K", "FolderDataset", "PascalContext", "PascalVOC"]

_ALIASES = {**SPLIT_NAMES, "train_aug": "trainaug"}
_NAME = re.compile(r"[A-Za-z0-9_-]+")

_VOC = "PASCAL VOC 2012: VOCtrainval_11-May-2012.tar from the PASCAL VOC homepage, host.robots.ox.ac.uk"
_SBD = (
    "trainaug.txt and SegmentationClassAug: made of SBD (Hariharan 2011) by mmsegmentation's voc_aug.py, or DeepLab's"
)
_CONTEXT = "PASCAL Context: images of VOC 2010; masks and lists made by mmsegmentation's pascal_context.py"
_ADE = "ADE20K: ADEChallengeData2016.zip of the MIT Scene Parsing Benchmark, sceneparsing.csail.mit.edu"


class _Parts(NamedTuple):
    """Where the files of one split lie, relative to the dataset's folder."""

    images: str  # folder of NAME.jpg
    masks: tuple[str, ...]  # folders of NAME.png; the first that has it counts
    source: str  # where to get them, in words
    names: str | None = None  # text file of one NAME per line; None where the split is all that its folders hold


class FolderDataset(SegmentationDataset):
    """A split of `PascalVOC`, `PascalContext` or `ADE20K`: JPEG images, and PNG masks of the same size and name.

    Samples come in the order of the published list, or sorted by name where there is none. Files are decoded as they
    are: a rotation noted in EXIF is not applied, because the masks were drawn on the image that is stored.
    """

    _class_set: str
    _ignored: int | None = IGNORE_INDEX  # the mask value that becomes IGNORE_INDEX; if it is 0, class k has k + 1
    _homes: ClassVar[tuple[str, ...]]  # where the dataset's folder may lie below the root
    _splits: ClassVar[Mapping[str, _Parts]]

    def __init__(self, root: str | os.PathLike[str], split: str, *, length: int | None = None) -> None:
        """
        Args:
            root: the dataset's own folder, or one that holds it under its published name.
            split: the name of a split.
            length: take at most that many samples, the first ones; None for all.

        Raises:
            ConfigError: an unknown split, or a length below 1.
            DatasetError: a folder, list or file that is missing, or a list that cannot be used.
        """
        if length is not None and length < 1:
            raise ConfigError(f"length {length}: must be at least 1")
        self.split = self._resolve(split)
        self.class_set = class_set(self._class_set)
        self._home = next((home for name in self._homes if (home := Path(root, name)).is_dir()), Path(root))
        parts = self._splits[self.split]
        missing = [part for part in (parts.images, *parts.masks) if not (self._home / part).is_dir()]
        if parts.names and not (self._home / parts.names).is_file():
            missing.append(parts.names)
        if missing:
            what = f"{root}: holds no complete split {self.split!r} of {self.class_set.title}"
            raise DatasetError(f"{what}; {self._tree(self.split, str(self._home), missing)}")
        self._files: dict[str, tuple[str, str]] = {}  # name: image, mask
        try:
            self._find_files(parts, length)
        except OSError as error:
            raise DatasetError(f"{error.filename}: cannot be read ({error.strerror})") from None
        self._names = list(self._files)

    def _find_files(self, parts: _Parts, length: int | None) -> None:
        images, *masks = (set(os.listdir(self._home / folder)) for folder in (parts.images, *parts.masks))
        listed = self._home / (parts.names or parts.images)
        if parts.names:
            names = [line.strip() for line in listed.read_text(encoding="utf-8", errors="replace").split("\n")]
        else:  # a mask without an image is a gap, too
            names = sorted({Path(file).stem for file in images.union(*masks) if file.endswith((".jpg", ".png"))})
        names = [name for name in names if name and not name.startswith("._")][:length]  # macOS leaves ._NAME behind
        if not names:
            raise DatasetError(f"{listed}: names no image; restore it from {parts.source}")
        for name in names:
            if not _NAME.fullmatch(name):
                raise DatasetError(f"{listed}: {name[:60]!r} is no image name; needs letters, digits, _ and - alone")
            if name in self._files:
                raise DatasetError(f"{listed}: {name} stands there twice")
            image = f"{parts.images}/{name}.jpg" if f"{name}.jpg" in images else None
            found = [folder for folder, files in zip(parts.masks, masks, strict=True) if f"{name}.png" in files]
            if image is None or not found:
                lost = f"{parts.masks[0]}/{name}.png" if image else f"{parts.images}/{name}.jpg"
                raise DatasetError(f"{listed}: {name} has no {self._home / lost}; restore it from {parts.source}")
            self._files[name] = image, f"{found[0]}/{name}.png"

    @classmethod
    def layout(cls, split: str) -> str:
        """What has to lie where for `split`: the drawn tree of the dataset's folder, and where to get it.

        Raises:
            ConfigError: the dataset has no such split.
        """
        return cls._tree(cls._resolve(split), cls._homes[0])

    @classmethod
    def _tree(cls, split: str, home: str, missing: Sequence[str] = ()) -> str:
        parts = cls._splits[split]
        drawn = {
            parts.images: "/*.jpg",
            **dict.fromkeys(parts.masks, "/*.png"),
            **({parts.names: ""} if parts.names else {}),
        }
        lines = [
            f"{'└' if path == max(drawn) else '├'}── {path}{files}{'   <- missing' if path in missing else ''}"
            for path, files in sorted(drawn.items())
        ]
        where = f"expected (the root is this folder, or holds it as {' or '.join(cls._homes)}):"
        return "\n".join([where, home, *lines, f"from {parts.source}"])

    @classmethod
    def _resolve(cls, split: str) -> str:
        return choose("split", _ALIASES.get(split, split), cls._splits, where=cls.__name__)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Sample:
        """Sample number `index`; negative ones count from the end.

        Raises:
            IndexError: past either end.
            DatasetError: a file that cannot be decoded, sizes that differ, or a mask value that is no class.
        """
        name = self._names[index]
        image_path, mask_path = (self._home / file for file in self._files[name])
        image = _decode(image_path, "JPEG", "RGB")  # [H, W, 3]
        mask = _decode(mask_path, "PNG")  # [H, W]
        if image.shape[:2] != mask.shape:
            (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape
            raise DatasetError(f"{image_path}: is {width}x{height}, but {mask_path} is {mask_width}x{mask_height}")
        first, count = int(self._ignored == 0), len(self.class_set.classes)
        unknown = set(np.unique(mask).tolist()) - set(range(first, first + count)) - {self._ignored}
        if unknown:
            ignored = "" if self._ignored is None else f" and {self._ignored} (ignored)"
            raise DatasetError(
                f"{mask_path}: holds the value {min(unknown)}; "
                f"{self.class_set.title} has {first} to {first + count - 1}{ignored}"
            )
        return Sample(image, mask - np.uint8(first), name)  # 0 - 1 is 255, which is IGNORE_INDEX


class PascalVOC(FolderDataset):
    """PASCAL VOC 2012 segmentation, 20 classes and background; 255, drawn around objects, is ignored.

    Splits: train (1464 images), val (1449), trainval, and trainaug (10582): train and the images that SBD annotates,
    val left out. A mask of trainaug that is not in SegmentationClassAug is taken from SegmentationClass: converted by
    mmsegmentation, the former lacks those of train that SBD does not annotate.

    Source: Everingham et al., The Pascal Visual Object Classes (VOC) Challenge, IJCV 2010; for trainaug Hariharan et
    al., Semantic Contours from Inverse Detectors, ICCV 2011.
    """

    _class_set = "pascal_voc"
    _homes = ("VOCdevkit/VOC2012", "VOC2012")
    _splits: ClassVar[Mapping[str, _Parts]] = {
        split: _Parts("JPEGImages", masks, source, f"ImageSets/Segmentation/{split}.txt")
        for split, masks, source in (
            ("train", ("SegmentationClass",), _VOC),
            ("val", ("SegmentationClass",), _VOC),
            ("trainval", ("SegmentationClass",), _VOC),
            ("trainaug", ("SegmentationClassAug", "SegmentationClass"), f"{_VOC}; {_SBD}"),
        )
    }


class PascalContext(FolderDataset):
    """PASCAL Context with its 59 most frequent classes, as label maps converted by mmsegmentation's pascal_context.py.

    Masks hold 0 for background and 1 to 59 for the classes. With `num_classes` 59 background is ignored; with 60 it is
    class 0 and nothing is ignored. Splits: train (4998 images), val (5105).

    Source: Mottaghi et al., The Role of Context for Object Detection and Semantic Segmentation in the Wild, CVPR 2014.
    """

    _homes = ("VOCdevkit/VOC2010", "VOC2010")
    _splits: ClassVar[Mapping[str, _Parts]] = {
        split: _Parts(
            "JPEGImages", ("SegmentationClassContext",), _CONTEXT, f"ImageSets/SegmentationContext/{split}.txt"
        )
        for split in ("train", "val")
    }

    def __init__(
        self, root: str | os.PathLike[str], split: str, num_classes: int = 59, *, length: int | None = None
    ) -> None:
        """As every `FolderDataset`; ConfigError also for another number of classes than 59 or 60."""
        if num_classes not in (59, 60):
            raise ConfigError(f"PascalContext has 59 classes, or 60 with background; not {num_classes}")
        self._class_set = f"pascal_context_{num_classes}"
        self._ignored = 0 if num_classes == 59 else None
        super().__init__(root, split, length=length)


class ADE20K(FolderDataset):
    """ADE20K scene parsing, 150 classes; 0 in the masks, other objects, is ignored.

    Splits: train (20210 images), val (2000).

    Source: Zhou et al., Scene Parsing through ADE20K Dataset, CVPR 2017.
    """

    _class_set = "ade20k"
    _ignored = 0
    _homes = ("ADEChallengeData2016",)
    _splits: ClassVar[Mapping[str, _Parts]] = {
        split: _Parts(f"images/{folder}", (f"annotations/{folder}",), _ADE)
        for split, folder in {"train": "training", "val": "validation"}.items()
    }


def _decode(path: Path, file_format: str, mode: str | None = None) -> npt.NDArray[np.uint8]:
    """Pixels of a JPEG or PNG in `mode`; without one they are palette indices or grey values, as they are."""
    picture = read_picture(path, [file_format], "restore it from the archive")
    if not mode and picture.mode not in ("P", "L"):
        what = "a mask needs palette indices or 8-bit grey (modes P, L)"
        raise DatasetError(f"{path}: is of mode {picture.mode}; {what}")
    return np.array(picture.convert(mode) if mode else picture)
