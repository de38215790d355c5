"""Class names and palettes of the datasets that segmentation networks are trained on: one JSON file per class set."""

from agln_fast.data.classes import ClassSet, class_set, default_class_set, list_class_sets

__all__ = ["ClassSet", "class_set", "default_class_set", "list_class_sets"]
