"""conv5 of [U₈ x₄, U₄ x₃, U₂ x₂, x₁]: convolve the coarse features at their own resolution, then resize."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor, nn

from agln_fast.errors import ConfigError
from agln_fast.kernels.matrices import shifted_upsample_matrix
from agln_fast.models.blocks import resize
from agln_fast.plan.network import InferenceNetwork, convolution_from
from agln_fast.plan.plan import MixForm

__all__ = ["MixedConvolution", "mix_before_upsample"]


class MixedConvolution(nn.Module):
    """A 3x3 convolution, zero padding, of features (B, C, h_g, w_g), coarse to fine, that are resized to the finest.

    (B, out, H, W) = Σ over g and taps (dy, dx) of S_dy Uy (W x_g) (S_dx Ux)ᵀ, S_d being the shift by d with zero fill,
    which is the padding. A group's form says at which resolution its channels are mixed: "none" after both resizes,
    "rows" between them, by a 1x3 convolution to three maps for the three dy; "full" before both, by a 1x1 convolution
    to nine maps. The products with S_dy Uy of all groups are one.
    """

    def __init__(self, convolution: nn.Conv2d, forms: tuple[MixForm, ...]) -> None:
        """`forms` has one for each group but the finest, coarse to fine; `convolution` has a bias."""
        super().__init__()
        assert convolution.bias is not None
        self.forms = forms
        weights = convolution.weight.detach().chunk(len(forms) + 1, 1)
        direct = [weight for weight, form in zip(weights, (*forms, "none"), strict=True) if form == "none"]
        self.direct = convolution_from(torch.cat(direct, 1), convolution.bias.detach(), (1, 1))
        self.mixed = nn.ModuleList(_mixed(w, form) for w, form in zip(weights, forms, strict=False) if form != "none")
        self.channels = convolution.out_channels

    def forward(self, features: list[Tensor]) -> Tensor:
        *coarse, finest = features
        height, width = finest.shape[2:]
        mixed = iter(self.mixed)
        direct, columns, rows = [], [], []
        for x, form in zip(coarse, self.forms, strict=True):
            if form == "none":
                direct.append(resize(x, finest.shape))
                continue
            h, w = x.shape[2:]
            if form == "rows":
                y = next(mixed)(resize(x, (h, width)))  # (B, out·3, h, W)
                columns.append(y.reshape(-1, self.channels, 3 * h, width))
            else:
                y = next(mixed)(x).reshape(-1, self.channels, 3, 3, h, w)  # out, dy, dx
                y = y.transpose(3, 4).reshape(-1, self.channels, 3 * h, 3 * w)
                columns.append(y @ shifted_upsample_matrix(w, width, x).T)
            rows.append(shifted_upsample_matrix(h, height, x))
        base: Tensor = self.direct(torch.cat([*direct, finest], 1))
        return base + torch.cat(rows, 1) @ torch.cat(columns, 2) if rows else base


def _mixed(weight: Tensor, form: MixForm) -> nn.Conv2d:
    """(out, C, 3, 3) -> the convolution of the form, its output channels ordered (out, dy) or (out, dy, dx)."""
    if form == "rows":
        return convolution_from(weight.transpose(1, 2).flatten(0, 1).unsqueeze(2), None, (0, 1))
    return convolution_from(weight.permute(0, 2, 3, 1).flatten(0, 2)[..., None, None], None)


def mix_before_upsample(network: InferenceNetwork, forms: tuple[MixForm, ...]) -> InferenceNetwork:
    """Split conv5 by group and mix the channels of coarse groups before they are resized, in the given `forms`.

    Exact because a convolution mixes channels and a resize mixes pixels: they commute, and the shifts of the taps are
    matrices like the resize. At 512x512, "full" in all groups takes conv5 from 77 G multiply-adds to about 30 G.

    Args:
        forms: for the groups of 1/32, 1/16 and 1/8: "none", "rows" or "full". FCN-8s has no groups: nothing changes.

    Raises:
        ConfigError: not a form for each group, or BN is not folded yet.
    """
    groups = len(network.levels())
    if not groups:
        return network
    if len(forms) != groups or not set(forms) <= set(get_args(MixForm)):
        raise ConfigError(f"mix_before_upsample {forms!r}: needs {groups} of {', '.join(get_args(MixForm))}")
    convolution = network.mix[1]
    if not isinstance(convolution, nn.Conv2d) or convolution.bias is None:
        raise ConfigError("mix_before_upsample splits a convolution, once, that BN has been folded into")
    network = network.copy()
    network.mix = nn.Sequential(MixedConvolution(convolution, forms), nn.ReLU())
    return network
