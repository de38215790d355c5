"""What networks are trained and judged on: datasets, augmentation, and class sets (one JSON file each)."""

from agln_fast.data.augment import Augmentation
from agln_fast.data.classes import ClassSet, class_set, default_class_set, list_class_sets
from agln_fast.data.dataset import IGNORE_INDEX, CachedDataset, Sample, SegmentationDataset
from agln_fast.data.paired import PairedDataset
from agln_fast.data.readers import ADE20K, PascalContext, PascalVOC
from agln_fast.data.registry import DATASETS, open_dataset
from agln_fast.data.scenes import Scenes

__all__ = [
    "ADE20K",
    "DATASETS",
    "IGNORE_INDEX",
    "Augmentation",
    "CachedDataset",
    "ClassSet",
    "PairedDataset",
    "PascalContext",
    "PascalVOC",
    "Sample",
    "Scenes",
    "SegmentationDataset",
    "class_set",
    "default_class_set",
    "list_class_sets",
    "open_dataset",
]
