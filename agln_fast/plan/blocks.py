"""The blocks of a network, each under one name that every form of it shares: data, which loads without PyTorch.

A block is a step of the reference whose result has a name in the paper. Its name is the path of the reference's module,
such as "decoder.cfb.0.1.sdm"; `block_of` finds it for the modules, weights and nodes of a rewritten network, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from agln_fast.models.config import ModelConfig

__all__ = ["SCALES", "Block", "block_of", "blocks_of"]

SCALES = "1/16", "1/8", "1/4"
"""Of the levels of every decoder, coarse to fine: the height of a map over that of the image."""


class Block(NamedTuple):
    """A step of a network.

    name: see above. title: what a reader calls it, such as "CFB 1/8 no. 2: semantic distribution M".
    taker: the name of the first block that takes its result; None for the last one.
    """

    name: str
    title: str
    taker: str | None


def blocks_of(model: ModelConfig) -> list[Block]:
    """The blocks of a network, in the order in which they are computed."""
    titles = {"encoder.stem": "encoder: stem"}
    titles |= {f"encoder.stage{number}": f"encoder: stage {number}" for number in range(1, 5)}
    takers: dict[str, str] = {}  # of those whose taker is not the one that comes next
    if model.concat_input:
        titles |= {f"decoder.convs.{number}": f"head: convolution {number + 1}" for number in range(2)}
        titles["decoder"] = "stage 4 and the head's convolutions"
    elif model.architecture in ("fpn", "agln"):
        titles["decoder.reduce"] = "projection of stage 4"
        takers["decoder.reduce"] = "decoder.merge.0"
        for level in range(len(SCALES)):
            _add_level(model, level, titles, takers)
        titles["decoder"] = "features of all levels"
    titles |= {"head": "head", "classifier": "classifier", "logits": "logits, full size"}
    following = dict(pairwise(titles)) | takers
    return [Block(name, title, following.get(name)) for name, title in titles.items()]


def _add_level(model: ModelConfig, level: int, titles: dict[str, str], takers: dict[str, str]) -> None:
    scale, dense = SCALES[level], model.decoder == "dense"
    lateral, smooth, first = f"decoder.lateral.{level}", f"decoder.smooth.{level}", f"decoder.cfb.{level}.0"
    titles[lateral] = f"lateral {scale}"
    if model.architecture == "fpn":
        titles[f"decoder.merge.{level}"] = f"sum {scale}"
    else:
        takers[lateral] = first
        if dense or level == 0:
            titles[f"decoder.sab.{level}"] = f"SAB {level + 1}"
            takers[f"decoder.sab.{level}"] = f"decoder.cfb.{level}.{level}.sdm"
        titles[f"decoder.merge.{level}"] = f"upsampled A {scale}"
        for number in range(level + 1 if dense else 1):
            block = f"decoder.cfb.{level}.{number}"
            for part, words in _parts(model):
                titles[block + part] = f"CFB {scale} no. {number + 1}: {words}"
            if model.formulation == "release":
                takers[f"{block}.sum"] = block
    titles[smooth] = f"smoothing {scale}"
    takers[smooth] = "decoder"


def _parts(model: ModelConfig) -> Iterator[tuple[str, str]]:
    """Of a Context Fusion Block; the symbols are those of `agln_fast.models.blocks`."""
    yield ".sdm", "semantic distribution M"
    yield ".sum", "enhancement A + αM"
    if model.formulation == "paper":
        yield ".enhance", "enhancement Ψ"
    if model.channel_resampling:
        yield ".affinity", "channel attention R"
    if model.channel_resampling or model.spatial_gating:
        yield ".lrm", "local refinement G"
    yield "", "output O"


_CFB = r"decoder\.(?:cfb|merge)\.(?P<n>\d)(?:\.fusions)?\.(?P<j>\d)"
# Paths of modules in the reference, in a rewritten network, and in the fused one; the first pattern that fits counts.
_PATHS = [
    (re.compile(pattern + r"(?![^.])"), name)
    for pattern, name in (
        (r"encoder\.layer(?P<n>\d)", "encoder.stage{n}"),
        (r"encoder\.stages\.(?P<before>\d)", "encoder.stage{n}"),
        (r"encoder", "encoder.stem"),
        (r"decoder\.(?P<part>reduce|(?:lateral|smooth|sab|convs)\.\d)", "decoder.{part}"),
        (r"decoder\.merge\.(?P<n>\d)\.aggregation", "decoder.sab.{n}"),
        (_CFB + r"\.(?:sdm|distribution)", "decoder.cfb.{n}.{j}.sdm"),
        (_CFB + r"\.enhance", "decoder.cfb.{n}.{j}.enhance"),
        (_CFB + r"\.lrm", "decoder.cfb.{n}.{j}.lrm"),
        (_CFB, "decoder.cfb.{n}.{j}"),
        (r"decoder\.merge\.(?P<n>\d)", "decoder.merge.{n}"),
        (r"mix|classifier\.[0-3]", "head"),
        (r"classifier", "classifier"),
    )
]


def block_of(path: str) -> str | None:
    """The name of the block that a module, a weight or a node of the graph belongs to; None where its path tells none.

    A node between two modules, such as a resize in the reference's decoder, belongs to none.

    Args:
        path: of the module in the network, or of the weight, such as "decoder.cfb.0.1.sdm.phi.weight", with or without
            the "network." that it begins with in an exported graph. A node's path is the last but one of its name
            scopes: see `agln_fast.export.blocks.blocks_of_nodes`.
    """
    path = path.removeprefix("network.")
    for pattern, name in _PATHS:
        if found := pattern.match(path):
            values = found.groupdict()
            return name.format(**({"n": int(values["before"]) + 1} if "before" in values else values))
    return None
