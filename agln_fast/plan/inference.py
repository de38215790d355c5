"""What `fuse` makes: the network for inference alone, its attention steps as fused ops, all maps in channels_last.

The symbols are those of `agln_fast.models.blocks`. Weights are parameters without gradients, so `.to(dtype)` and
`.to(device)` move them; α, β and γ are plain numbers, which no dtype rounds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agln_fast.kernels.attention_pool import attention_pool
from agln_fast.kernels.channel_resample import channel_affinity, channel_apply
from agln_fast.kernels.semantic_distribution import semantic_distribution
from agln_fast.kernels.separable_conv import separable_conv
from agln_fast.models.blocks import resize
from agln_fast.models.config import ModelConfig
from agln_fast.models.networks import check_image
from agln_fast.plan.convolution import FusedConv2d

__all__ = [
    "Aggregation",
    "ContextFusion",
    "Decoder",
    "Encoder",
    "FusionLevel",
    "FusionTerms",
    "InferenceNetwork",
    "PyramidLevel",
    "ResidualBlock",
    "SeparableConv",
]


def _frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach(), requires_grad=False)


class ResidualBlock(nn.Module):
    """relu(convolutions(x) + shortcut(x)): (B, in, H, W) -> (B, out, H/stride, W/stride)."""

    def __init__(self, convolutions: Iterable[FusedConv2d], shortcut: FusedConv2d | None) -> None:
        """The last of `convolutions` adds the shortcut."""
        super().__init__()
        *first, last = convolutions
        self.first = nn.Sequential(*first)
        self.last = last
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x), x if self.shortcut is None else self.shortcut(x))
        return y


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> the four stages c1..c4."""

    def __init__(self, stem: nn.Module, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        outputs: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class SeparableConv(nn.Module):
    """Depthwise 3x3, pointwise 1x1, bias, ReLU: (B, C, H, W) -> the same."""

    def __init__(self, depthwise: Tensor, pointwise: Tensor, bias: Tensor) -> None:
        """`depthwise` (C, 1, 3, 3), `pointwise` (C, C, 1, 1), `bias` (C,)."""
        super().__init__()
        # In memory the channels come last, as in the map that it filters.
        self.depthwise = _frozen(depthwise.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2))
        self.pointwise = _frozen(pointwise)
        self.bias = _frozen(bias)

    def forward(self, x: Tensor) -> Tensor:
        return separable_conv(x, self.depthwise, self.pointwise, self.bias)


class Aggregation(nn.Module):
    """SAB, pooled before it is projected: X (B, C, h, w) -> descriptors, each (B, C, N), one for each projection."""

    def __init__(self, w_theta: Tensor | None, projections: list[tuple[Tensor, Tensor]]) -> None:
        """`w_theta` (N, C), None to pool by the mean; each projection is a matrix (C, C) and a bias (C,)."""
        super().__init__()
        self.w_theta = None if w_theta is None else _frozen(w_theta)
        self.weight = _frozen(torch.cat([weight for weight, _ in projections]))  # one product computes them all
        self.bias = _frozen(torch.cat([bias for _, bias in projections])[:, None])
        self.count = len(projections)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        # PyTorch sums half precision in float32.
        pooled = x.mean((2, 3)).unsqueeze(2) if self.w_theta is None else attention_pool(x, self.w_theta)
        return torch.baddbmm(self.bias, self.weight.expand(x.shape[0], -1, -1), pooled).chunk(self.count, 1)


@dataclass(frozen=True)
class FusionTerms:
    """The sum in a CFB: base + gate_scale · (R B) ⊙ σ(M) + skip_scale · B, with R = softmax(sign · Q Bᵀ).

    A term whose scale is 0 is not computed. Without `resamples` R is the identity, without `gates` σ(M) is 1; both
    are off where `gate_scale` is 0.
    """

    alpha: float
    gate_scale: float
    skip_scale: float
    sign: int
    resamples: bool
    gates: bool

    @property
    def distributes(self) -> bool:
        """Something reads M."""
        return self.alpha != 0 or self.gates


class ContextFusion(nn.Module):
    """CFB: A (B, C, H, W), B (B, C, H, W), a list of descriptors, each (B, C, N) -> O (B, C, H, W).

    M = D · softmax over descriptors of ϕ(A). Paper: base = Q = Ψ(A + αM). Release: base = A + αM, Q = A. Then the sum
    of `FusionTerms`, then Φ.
    """

    def __init__(
        self, terms: FusionTerms, phi: nn.Conv2d, source: int | None, enhance: nn.Module | None, fuse: nn.Module | None
    ) -> None:
        """`phi` is ϕ; `source` is the place of D in the list, None where nothing reads M; `enhance` is Ψ, `fuse` Φ."""
        super().__init__()
        assert phi.bias is not None
        self.terms = terms
        self.source = source
        self.w_phi = None if source is None else _frozen(phi.weight.flatten(1))
        self.b_phi = None if source is None else _frozen(phi.bias)
        self.enhance = enhance
        self.fuse = fuse

    def forward(self, a: Tensor, b: Tensor, descriptors: list[Tensor]) -> Tensor:
        terms = self.terms
        m, base = None, a
        if self.source is not None:
            assert self.w_phi is not None
            assert self.b_phi is not None
            m, base = semantic_distribution(a, self.w_phi, self.b_phi, descriptors[self.source], terms.alpha)
        query = a
        if self.enhance is not None:
            query = base = self.enhance(base)
        if terms.gate_scale != 0:
            r = channel_affinity(query, b, terms.sign, dtype=b.dtype) if terms.resamples else None
            base = channel_apply(r, b, m if terms.gates else None, base, terms.gate_scale, terms.skip_scale)
        elif terms.skip_scale != 0:
            base = torch.add(base, b, alpha=terms.skip_scale)
        return base if self.fuse is None else self.fuse(base)


class PyramidLevel(nn.Module):
    """A level of FPN: the decoder feature at the size of the lateral one, and their sum."""

    def forward(self, d: Tensor, b: Tensor, descriptors: list[Tensor]) -> Tensor:
        """d (B, C, h, w) of the level before, b (B, C, H, W) -> d of this level (B, C, H, W)."""
        return resize(d, b.shape).add_(b)


class FusionLevel(nn.Module):
    """A level of AGLN: what the feature before it is aggregated to joins the descriptors, then a chain of CFBs."""

    def __init__(self, aggregation: Aggregation | None, fusions: Iterable[ContextFusion]) -> None:
        super().__init__()
        self.aggregation = aggregation
        self.fusions = nn.ModuleList(fusions)

    def forward(self, d: Tensor, b: Tensor, descriptors: list[Tensor]) -> Tensor:
        """d (B, C, h, w) of the level before, b (B, C, H, W) -> d of this level; `descriptors` grows in place."""
        if self.aggregation is not None:
            descriptors.extend(self.aggregation(d))
        a = resize(d, b.shape)
        for fusion in self.fusions:
            a = fusion(a, b, descriptors)
        return a


class Decoder(nn.Module):
    """Stages c1..c4 -> (B, 4C, H/4, W/4), coarse to fine; the arguments but `reduce` are one for each level."""

    def __init__(
        self,
        reduce: nn.Module,
        lateral: Iterable[nn.Module],
        merge: Iterable[PyramidLevel | FusionLevel],
        smooth: Iterable[nn.Module],
    ) -> None:
        super().__init__()
        self.reduce = reduce
        self.lateral = nn.ModuleList(lateral)
        self.merge = nn.ModuleList(merge)
        self.smooth = nn.ModuleList(smooth)

    def forward(self, c1: Tensor, c2: Tensor, c3: Tensor, c4: Tensor) -> Tensor:
        d = self.reduce(c4)
        outputs = [d]
        descriptors: list[Tensor] = []
        for c, lateral, merge, smooth in zip((c3, c2, c1), self.lateral, self.merge, self.smooth, strict=True):
            d = merge(d, lateral(c), descriptors)
            outputs.append(smooth(d))
        *coarse, finest = outputs  # the finest has the size that all are brought to
        return torch.cat([*(resize(output, finest.shape) for output in coarse), finest], 1)


class InferenceNetwork(nn.Module):
    """Normalised image (B, 3, H, W) -> logits (B, K, H, W), for any H, W >= 32, in the dtype of the weights.

    The same function as the `SegmentationNetwork` of `config` that it was made from.
    """

    def __init__(self, config: ModelConfig, encoder: Encoder, decoder: Decoder | None, classifier: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.encoder = encoder
        self.decoder = decoder
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return resize(self.logits(x), x.shape)

    def logits(self, x: Tensor) -> Tensor:
        """Before the last resize: (B, K, h, w), of which `label_upsample` makes labels.

        Raises:
            ConfigError: `x` is not of such a shape.
        """
        check_image(x)
        stages = self.encoder(x.to(memory_format=torch.channels_last))
        features = stages[-1] if self.decoder is None else self.decoder(*stages)
        logits: Tensor = self.classifier(features)
        return logits
