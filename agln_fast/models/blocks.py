"""The building blocks of AGLN, named as in the paper (Fig. 2a), in plain differentiable PyTorch.

Shapes: X (B, C, h, w) is the feature that is aggregated, D (B, C, N) its descriptors, A (B, C, H, W) an upsampled
decoder feature, B (B, C, H, W) a lateral encoder feature, M (B, C, H, W) the semantic descriptor map, E (B, C, H, W)
the enhanced decoder feature, O (B, C, H, W) the fused one. docs/models.md tells where the paper's equations and the
network that its authors released ("release") differ.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agln_fast.models.config import Formulation, ModelConfig

__all__ = [
    "ContextFusionBlock",
    "LocalRefinementModule",
    "SemanticAggregationBlock",
    "SemanticDistributionModule",
    "conv_bn_relu",
    "resize",
    "separable_conv_bn_relu",
]


def resize(x: Tensor, size: torch.Size | tuple[int, int], align_corners: bool | None = True) -> Tensor:
    """Bilinear, to the last two numbers of `size`: the only resize of the whole family.

    With aligned corners the centres of the outermost pixels meet, otherwise their outer edges.
    """
    return F.interpolate(x, tuple(size[-2:]), mode="bilinear", align_corners=align_corners)


def conv_bn_relu(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    """(B, in, H, W) -> (B, out, H, W)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def separable_conv_bn_relu(channels: int) -> nn.Sequential:
    """Depthwise 3x3 then pointwise 1x1, the convolution of AGLN-Lite (section IV-D): (B, C, H, W) -> the same."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def _wide(x: Tensor) -> Tensor:
    """At least float32: sums over all pixels and softmaxes overflow or drown in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _softmax(x: Tensor, dim: int) -> Tensor:
    return _wide(x).softmax(dim).to(x.dtype)


class SemanticAggregationBlock(nn.Module):
    """SAB, Eq. 1: D = φ(X) · softmax over pixels of θ(X), transposed. X (B, C, h, w) -> D (B, C, N)."""

    def __init__(self, channels: int, num_descriptors: int) -> None:
        super().__init__()
        self.phi = nn.Conv2d(channels, channels, 1)
        self.theta = nn.Conv2d(channels, num_descriptors, 1)

    def forward(self, x: Tensor) -> Tensor:
        attention = _softmax(self.theta(x).flatten(2), -1)  # (B, N, P)
        descriptors: Tensor = self.phi(x).flatten(2) @ attention.transpose(1, 2)
        return descriptors


class AveragePoolingBlock(nn.Module):
    """GAP-GEM of Table IV: the mean over all pixels of φ(X) as the only descriptor. X (B, C, h, w) -> D (B, C, 1)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.phi = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.phi(x)
        return _wide(features.flatten(2)).mean(-1, keepdim=True).to(features.dtype)


class SemanticDistributionModule(nn.Module):
    """SDM, Eq. 2: M = D · softmax over descriptors of ϕ(A). A (B, C, H, W), D (B, C, N) -> M (B, C, H, W).

    The release adds a 1x1 convolution behind it, `project`.
    """

    def __init__(self, channels: int, num_descriptors: int, formulation: Formulation) -> None:
        super().__init__()
        self.phi = nn.Conv2d(channels, num_descriptors, 1)
        self.project = nn.Conv2d(channels, channels, 1) if formulation == "release" else None

    def forward(self, a: Tensor, descriptors: Tensor) -> Tensor:
        attention = _softmax(self.phi(a).flatten(2), 1)  # (B, N, P)
        m: Tensor = (descriptors @ attention).view_as(a)
        if self.project is not None:
            m = self.project(m)
        return m


class LocalRefinementModule(nn.Module):
    """LRM, Eq. 4 and 5: channel resampling, then spatial gating. It has no parameters.

    E (B, C, H, W), B (B, C, H, W), M (B, C, H, W) -> G (B, C, H, W):
    F = R B with R = softmax over B's channels of E Bᵀ (C, C); G = F ⊙ σ(M).
    The release takes A in the place of E, and softmax(rowmax − A Bᵀ), which favours channels *unlike* the decoder's.
    """

    def __init__(self, formulation: Formulation, *, channel_resampling: bool, spatial_gating: bool) -> None:
        super().__init__()
        self.formulation = formulation
        self.channel_resampling = channel_resampling
        self.spatial_gating = spatial_gating

    def affinity(self, e: Tensor, b: Tensor) -> Tensor:
        """R (B, C, C), at least float32: E Bᵀ sums over all pixels and overflows float16 on large maps."""
        kind = e.device.type
        autocast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if autocast else nullcontext():
            energy = _wide(e).flatten(2) @ _wide(b).flatten(2).transpose(1, 2)
        if self.formulation == "release":
            energy = energy.amax(-1, keepdim=True) - energy
        return energy.softmax(-1)

    def forward(self, e: Tensor, b: Tensor, m: Tensor) -> Tensor:
        g = b
        if self.channel_resampling:
            g = (self.affinity(e, b).to(b.dtype) @ b.flatten(2)).view_as(b)
        return g * m.sigmoid() if self.spatial_gating else g


class ContextFusionBlock(nn.Module):
    """CFB, Eq. 3 and 6. A (B, C, H, W), B (B, C, H, W), D (B, C, N) -> O (B, C, H, W).

    paper:   E = Ψ(A + αM),  O = Φ(E + βG); in AGLN−, which has no LRM, O = E + B.
    release: O = Φ(A + αM + β(γG + B)); without LRM, O = Φ(A + αM + βB).
    Ψ (`enhance`) and Φ (`fuse`) are 3x3 convolution, BN, ReLU; α starts at 0, β at 1, γ at 0.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.num_descriptors is not None
        channels = config.channels
        refined = config.channel_resampling or config.spatial_gating
        released = config.formulation == "release"

        def convolution() -> nn.Module:
            return separable_conv_bn_relu(channels) if config.lite else conv_bn_relu(channels, channels, 3)

        self.sdm = SemanticDistributionModule(channels, config.num_descriptors, config.formulation)
        self.alpha = nn.Parameter(torch.zeros(1)) if config.learnable_alpha else 1.0
        self.enhance = None if released else convolution()
        self.lrm = None
        if refined:
            self.lrm = LocalRefinementModule(
                config.formulation,
                channel_resampling=config.channel_resampling,
                spatial_gating=config.spatial_gating,
            )
        self.gamma = nn.Parameter(torch.zeros(1)) if released and refined else None
        has_beta = released or refined
        self.beta = nn.Parameter(torch.ones(1)) if has_beta and config.learnable_beta else 1.0
        self.fuse = convolution() if has_beta else None

    def forward(self, a: Tensor, b: Tensor, descriptors: Tensor) -> Tensor:
        m = self.sdm(a, descriptors)
        enhanced = a + self.alpha * m
        if self.enhance is not None:
            enhanced = self.enhance(enhanced)
        refined = b
        if self.lrm is not None:
            refined = self.lrm(a if self.enhance is None else enhanced, b, m)
            if self.gamma is not None:
                refined = self.gamma * refined + b
        fused: Tensor = enhanced + self.beta * refined
        if self.fuse is not None:
            fused = self.fuse(fused)
        return fused
