"""Deterministic weights, for measuring and demonstrating without a trained checkpoint.

They are random: nothing they segment means anything, but every branch of the network carries signal, and every class
occurs, so that equal labels prove something.
"""

from __future__ import annotations

import math
import re
import zlib

import torch
from torch import Tensor, nn

from agln_fast.contract import IOContract
from agln_fast.models.networks import SegmentationNetwork, create_model
from agln_fast.runtime.images import pack
from agln_fast.runtime.references import sample_images

__all__ = ["random_network", "released_state_dict"]

# Our names -> those of released checkpoints; the inverse of what `load_checkpoint` does.
_RELEASED_NAMES = [
    (r"^encoder\.", "pretrained."),
    (r"^decoder\.reduce\.", "head.{reduce}."),
    (r"^decoder\.lateral\.(\d)", "head.fpn_lateral.{fine}"),
    (r"^decoder\.smooth\.(\d)", "head.fpn_out.{fine}"),
    (r"^decoder\.sab\.(\d)\.phi", "head.sab_d{stage}.conv_feat"),
    (r"^decoder\.sab\.(\d)\.theta", "head.sab_d{stage}.conv_atten"),
    (r"^decoder\.cfb\.(\d)\.(\d)", "head.cfb_d{chain}.{fine}"),
    (r"\.sdm\.phi\.", ".sdm.conv_de."),
    (r"\.sdm\.project\.", ".sdm.out_conv."),
    (r"\.fuse\.", ".conv_fusion."),
    (r"^classifier\.", "head.conv5."),
]


def random_network(name: str, num_classes: int, seed: int = 0) -> SegmentationNetwork:
    """The preset `name` in eval mode with weights that depend on nothing but the parameters' names and `seed`.

    The last layer is scaled so that each class has logits of mean 0 and deviation 1 on Scenes: otherwise
    one class would win everywhere.
    """
    network = create_model(name, num_classes).eval()
    with torch.no_grad():
        for key, tensor in network.state_dict().items():
            if not tensor.is_floating_point():
                continue
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{key}".encode()))
            kind = key.rpartition(".")[2]
            if kind in ("alpha", "beta", "gamma"):
                tensor.uniform_(0.3, 0.9, generator=generator)
            elif kind == "running_var":
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif kind in ("running_mean", "bias"):
                tensor.normal_(0, 0.1, generator=generator)
            elif tensor.ndim == 1:
                # A small last scale keeps the residual sums of a deep encoder from growing.
                low, high = (0.1, 0.3) if ".bn3." in key else (0.5, 1.5)
                tensor.uniform_(low, high, generator=generator)
            else:
                tensor.normal_(0, math.sqrt(2 / tensor[0].numel()), generator=generator)
        pictures = pack(sample_images(2, 128, 128, seed), IOContract(128, 128, layout="float_nchw"))
        logits = network(torch.from_numpy(pictures)).transpose(0, 1).flatten(1)
        classifier = network.classifier[-1]
        assert isinstance(classifier, nn.Conv2d)
        assert classifier.bias is not None
        classifier.bias.sub_(logits.mean(1)).div_(logits.std(1))
        classifier.weight.div_(logits.std(1)[:, None, None, None])
    return network


def released_state_dict(network: SegmentationNetwork) -> dict[str, Tensor]:
    """The network's weights under the names that the released checkpoints use."""
    reduce = "c4conv" if network.config.architecture == "fpn" else "e4conv"
    released = {}
    for key, tensor in network.state_dict().items():
        name = key
        for pattern, replacement in _RELEASED_NAMES:
            match = re.search(pattern, name)
            if match is not None:
                numbers = [int(group) for group in match.groups()] or [0]
                text = replacement.format(
                    reduce=reduce, fine=2 - numbers[0], stage=4 - numbers[0], chain=4 - numbers[-1]
                )
                name = name[: match.start()] + text + name[match.end() :]
        released[name] = tensor
    return released
