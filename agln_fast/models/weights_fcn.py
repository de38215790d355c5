"""FCN as torchvision and MMSegmentation save it: the names of its weights, and the classes of the latter."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TypeVar

from agln_fast.data.classes import ClassSet, default_class_set
from agln_fast.errors import CheckpointError, ConfigError, printable
from agln_fast.models.weights_account import Account

__all__ = ["CLASSES_KEY", "fcn_names", "stored_classes"]

CLASSES_KEY = "agln_fast.classes"
"""Of the metadata of a checkpoint: what its classes are called, as `ClassSet.to_json` writes it."""

_Value = TypeVar("_Value")

# Their names -> ours. MMSegmentation's stem has its last batch normalisation inside.
_NAMES = [
    (r"^backbone\.stem\.7\.", "encoder.bn1."),
    (r"^backbone\.stem\.", "encoder.conv1."),
    (r"^backbone\.", "encoder."),
    (r"^decode_head\.conv_cat\.conv\.", "classifier.0."),
    (r"^decode_head\.conv_cat\.bn\.", "classifier.1."),
    (r"^decode_head\.conv_seg\.", "classifier.4."),
    (r"^decode_head\.convs\.(\d)\.conv\.", r"decoder.convs.\1.0."),
    (r"^decode_head\.convs\.(\d)\.bn\.", r"decoder.convs.\1.1."),
]
# Without concatenation the only convolution of a head is its last one.
_ALONE = (r"^decoder\.convs\.0\.", "classifier.")
_KNOWN = re.compile(r"encoder\..+|decoder\.convs\.\d\.[01]\.\w+|classifier\.[014]\.\w+")
_AUXILIARY = ("aux_classifier.", "auxiliary_head.")

_log = logging.getLogger("agln_fast.checkpoint")


def fcn_names(state: Mapping[str, _Value], account: Account) -> dict[str, _Value] | None:
    """`state` under our names, if its names are torchvision's or MMSegmentation's, otherwise None.

    The auxiliary head, which only training needs, is left out; `account` says so.

    Raises:
        CheckpointError: it has another head than FCN's. The message does not name the file.
    """
    first_parts = {name.partition(".")[0] for name in state}
    if "backbone" not in first_parts or not first_parts & {"classifier", "decode_head"}:
        return None
    kept = {name: value for name, value in state.items() if not name.startswith(_AUXILIARY)}
    account.strangers.update(name.partition(".")[0] for name in state if name not in kept)
    concatenates = any(name.startswith("decode_head.conv_cat.") for name in state)
    names = _NAMES if concatenates else [*_NAMES, _ALONE]
    translated = {}
    for name, value in kept.items():
        ours = name
        for pattern, replacement in names:
            ours = re.sub(pattern, replacement, ours)
        if not _KNOWN.fullmatch(ours):
            raise CheckpointError(
                f"a network of torchvision or MMSegmentation, but not FCN: '{printable(name)}' is of another one"
            )
        translated[ours] = value
    return translated


def stored_classes(content: object) -> dict[str, str]:
    """Names and colours of the classes that a file of MMSegmentation holds in its `meta`, as metadata of ours.

    Nothing where there are none, or none that can be used, which is logged. Where colours do not belong to the names,
    they are those of `default_class_set`.
    """
    meta = content.get("meta") if isinstance(content, dict) else None
    inner = meta.get("dataset_meta") if isinstance(meta, dict) else None  # of MMEngine, since 1.0
    found = inner if isinstance(inner, dict) else meta
    if not isinstance(found, dict):
        return {}
    entries = {name.lower(): value for name, value in found.items() if isinstance(name, str)}
    classes, palette = entries.get("classes"), entries.get("palette")
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        return {}
    if not isinstance(palette, list | tuple) or len(palette) != len(classes) or not all(map(_is_colour, palette)):
        palette = default_class_set(max(1, len(classes))).palette
    try:
        red_green_blue = tuple((red, green, blue) for red, green, blue in palette)
        return {CLASSES_KEY: ClassSet("checkpoint", "of the checkpoint", tuple(classes), red_green_blue).to_json()}
    except ConfigError as error:
        _log.warning("the names of classes in its meta are not used: %s", printable(error))
        return {}


def _is_colour(value: object) -> bool:
    return (
        isinstance(value, list | tuple)
        and len(value) == 3
        and all(type(part) is int and 0 <= part < 256 for part in value)
    )
