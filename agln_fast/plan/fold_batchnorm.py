"""Fold every batch normalisation into the convolution before it."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["fold_batchnorm"]

_Module = TypeVar("_Module", bound=nn.Module)


def fold_batchnorm(network: _Module) -> _Module:
    """Return a copy of `network`, in eval mode, whose convolutions carry the scale and shift of their BN as weights.

    Exact because in eval mode BN is affine per channel, s · (W x) + t = (s W) x + t, with s and t from its running
    statistics. It must happen in float32 or better, before weights are rounded to half precision.

    In this family a BN always follows the convolution that is registered right before it.
    """
    folded = copy.deepcopy(network).eval()
    for module in folded.modules():
        for (name, before), (bn_name, bn) in pairwise(module.named_children()):
            if not isinstance(bn, nn.BatchNorm2d):
                continue
            owner, key = (before, str(len(before) - 1)) if isinstance(before, nn.Sequential) else (module, name)
            convolution = getattr(owner, key)
            assert isinstance(convolution, nn.Conv2d), f"{bn_name} follows no convolution"
            setattr(owner, key, fuse_conv_bn_eval(convolution, bn))
            setattr(module, bn_name, nn.Identity())
    return folded
