"""The one network for inference: what a `SegmentationNetwork` computes, in forms that rewrites choose between.

`InferenceNetwork(model)` has the form of the reference; each rewrite returns a copy in another form. What a form
changes stands beside the plain form, in one `forward`, so that both can be compared line by line. The symbols are those
of `agln_fast.models.blocks`; α, β and γ are plain numbers, which no dtype rounds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Self, cast

import torch
from torch import Tensor, nn

from agln_fast.errors import ConfigError
from agln_fast.kernels.attention_pool import attention_pool
from agln_fast.kernels.channel_resample import channel_affinity, channel_apply
from agln_fast.kernels.context_fusion import context_fusion
from agln_fast.kernels.layout import wide
from agln_fast.kernels.matrices import upsample_matrix
from agln_fast.kernels.semantic_distribution import semantic_distribution
from agln_fast.kernels.upsample_bilinear import upsample_bilinear
from agln_fast.models.blocks import AveragePoolingBlock, ContextFusionBlock, SemanticAggregationBlock, resize
from agln_fast.models.networks import AGLNDecoder, FCNDecoder, FPNDecoder, SegmentationNetwork, check_image

__all__ = [
    "Aggregation",
    "Attention",
    "Concatenation",
    "Decoder",
    "Distribution",
    "Fusion",
    "FusionTerms",
    "InferenceNetwork",
    "convolution_from",
]

Attention = Literal["channels", "pixels", "kernels"]
"""How the steps of the attention are computed: as products of (channels, pixels), of (pixels, channels), or by the
fused ops, as are the resizes then. The second are what the ops' references compute, but in the type of the maps: the
references widen all they read, and an exported graph in half precision would multiply in float32."""


def convolution_from(weight: Tensor, bias: Tensor | None, padding: tuple[int, int] = (0, 0)) -> nn.Conv2d:
    """A convolution of stride 1 of the given weight (out, in, h, w) and bias (out,), which it takes over."""
    out, channels, *size = weight.shape
    layer = nn.Conv2d(channels, out, cast(tuple[int, int], tuple(size)), padding=padding, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    return layer


def _softmax(x: Tensor, dim: int) -> Tensor:
    return wide(x).softmax(dim).to(x.dtype)


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, HW, C): a view, if the channels are adjacent in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _map(x: Tensor, like: Tensor) -> Tensor:
    """(B, HW, C) -> (B, C, H, W), the inverse of `_pixels`."""
    return x.reshape(x.shape[0], *like.shape[2:], x.shape[2]).permute(0, 3, 1, 2)


def _resized(x: Tensor, size: torch.Size, attention: Attention, align_corners: bool = True) -> Tensor:
    if attention == "kernels":
        return upsample_bilinear(x, size, align_corners=align_corners)
    return resize(x, size, align_corners)


class Aggregation(nn.Module):
    """SAB, or its mean: X (B, C, h, w) -> `count` descriptors D, each (B, C, N).

    The features that are pooled are φ(X), with `phi`, or X itself without. `projection`, a 1x1 convolution, is of what
    has been pooled: see `pool_before_projection` and `project_descriptors`. "pixels" is as "channels".
    """

    def __init__(self, block: SemanticAggregationBlock | AveragePoolingBlock) -> None:
        super().__init__()
        self.phi: nn.Conv2d | None = block.phi
        self.theta = block.theta if isinstance(block, SemanticAggregationBlock) else None
        self.projection: nn.Conv2d | None = None
        self.projects = False
        self.count = 1
        self.attention: Attention = "channels"

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        descriptors = self.pooled_by_kernel(x) if self.attention == "kernels" else self.pooled(x)
        return descriptors.chunk(self.count, 1) if self.count > 1 else (descriptors,)

    def pooled_by_kernel(self, x: Tensor) -> Tensor:
        assert self.theta is not None
        assert self.phi is None
        assert self.projection is not None
        assert self.projection.bias is not None
        return attention_pool(x, self.theta.weight.flatten(1), self.projection.weight.flatten(1), self.projection.bias)

    def pooled(self, x: Tensor) -> Tensor:
        features = x if self.phi is None else self.phi(x)
        if self.theta is None:
            pooled = wide(features.flatten(2)).mean(-1, keepdim=True).to(x.dtype)
        else:
            pooled = features.flatten(2) @ _softmax(self.theta(x).flatten(2), -1).transpose(1, 2)
        if self.projection is not None:
            assert self.projection.bias is not None
            pooled = self.projection.weight.flatten(1) @ pooled + self.projection.bias.unsqueeze(1)
        return pooled


class Distribution(nn.Module):
    """SDM and the sum after it: A (B, C, H, W), D (B, C, N) -> M and A + αM, each (B, C, H, W).

    `before_upsample`: see `distribute_before_upsample`.
    """

    def __init__(self, phi: nn.Conv2d, project: nn.Conv2d | None) -> None:
        super().__init__()
        self.phi = phi
        self.project = project
        self.before_upsample = False
        self.attention: Attention = "channels"

    def forward(self, a: Tensor, descriptors: Tensor, alpha: float, coarse: Tensor | None) -> tuple[Tensor, Tensor]:
        """`coarse` (B, C, h, w) is what A was resized from, None where A is no resized map."""
        if self.attention == "kernels":
            assert self.phi.bias is not None
            assert self.project is None
            return semantic_distribution(a, self.phi.weight.flatten(1), self.phi.bias, descriptors, alpha)
        scores = self.phi(a) if coarse is None or not self.before_upsample else resize(self.phi(coarse), a.shape)
        if self.attention == "pixels":
            m = _map(_softmax(_pixels(scores), -1) @ descriptors.transpose(1, 2), a)
        else:
            m = (descriptors @ _softmax(scores.flatten(2), 1)).view_as(a)
        m = m if self.project is None else self.project(m)
        return m, torch.add(a, m, alpha=alpha) if alpha != 0 else a


@dataclass(frozen=True)
class FusionTerms:
    """The sum in a CFB: base + gate_scale · (R B) ⊙ σ(M) + skip_scale · B, with R = softmax(sign · Q Bᵀ).

    Without `resamples` R is the identity, without `gates` σ(M) is 1; without both the gated term does not exist.
    Without `distributes` nothing reads M.
    """

    alpha: float
    gate_scale: float
    skip_scale: float
    sign: int
    resamples: bool
    gates: bool
    distributes: bool = True

    @property
    def refines(self) -> bool:
        """The gated term exists."""
        return self.resamples or self.gates

    @property
    def alive(self) -> FusionTerms:
        """Without what a factor of zero keeps from counting."""
        counts = self.gate_scale != 0
        resamples, gates = self.resamples and counts, self.gates and counts
        return replace(self, resamples=resamples, gates=gates, distributes=self.alpha != 0 or gates)


class Passage(nn.Module):
    """Where a tensor that no module makes passes through unchanged, for the hooks of `agln_fast.plan.watch`."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Fusion(nn.Module):
    """CFB: A (B, C, H, W), B (B, C, H, W), D (B, C, N) -> O (B, C, H, W); Ψ is `enhance`, Φ is `fuse`.

    Paper: base = Q = Ψ(A + αM). Release: base = A + αM, Q = A. Then the sum of `FusionTerms`, then Φ. "kernels" has one
    op for the release's distribution, gate and sum, on every GPU; where a term is missing or Ψ stands between, two.

    `source`: which of the aggregations D is from, and its place among what that one makes. `negates`: see
    `negate_energy`; `energy_before_upsample`: see the rewrite of this name. R passes through `affinity`, G through
    `refinement`.
    """

    def __init__(self, block: ContextFusionBlock, name: str, aggregation: int) -> None:
        """
        Raises:
            ConfigError: α, β or γ is NaN or Inf; `name` is that of the block.
        """
        super().__init__()
        self.distribution = Distribution(block.sdm.phi, block.sdm.project)
        self.enhance = block.enhance
        self.fuse = block.fuse
        self.affinity, self.refinement = Passage(), Passage()
        self.terms = _terms(block, name)
        self.source = aggregation, 0
        self.negates = False
        self.energy_before_upsample = False
        self.attention: Attention = "channels"

    def forward(
        self, a: Tensor, b: Tensor, descriptors: list[tuple[Tensor, ...]], coarse: Tensor | None = None
    ) -> Tensor:
        """`descriptors` of each aggregation; `coarse` is what A was resized from, None where A is no resized map."""
        terms = self.terms
        is_joint = self.attention == "kernels" and self.enhance is None and terms.distributes and terms.refines
        base = self.joint(a, b, descriptors) if is_joint else self.in_steps(a, b, descriptors, coarse)
        return base if self.fuse is None else cast(Tensor, self.fuse(base))

    def in_steps(self, a: Tensor, b: Tensor, descriptors: list[tuple[Tensor, ...]], coarse: Tensor | None) -> Tensor:
        """What Φ takes: the distribution, Ψ, and the sum of `FusionTerms`."""
        terms, m, base, query = self.terms, None, a, a
        if terms.distributes:
            aggregation, place = self.source
            m, base = self.distribution(a, descriptors[aggregation][place], terms.alpha, coarse)
        if self.enhance is not None:
            query = base = self.enhance(base)
            coarse = None
        m = m if terms.gates else None
        if terms.refines and self.attention == "kernels":
            r = self.affinity_by_kernel(query, b)
            base = channel_apply(r, b, m, base, terms.gate_scale, terms.skip_scale)
        else:
            if terms.refines:
                g = self.resampled(query, b, coarse) if terms.resamples else b
                g = self.refinement(g if m is None else g * m.sigmoid())
                base = torch.add(base, g, alpha=terms.gate_scale)
            if terms.skip_scale != 0:
                base = torch.add(base, b, alpha=terms.skip_scale)
        return base

    def joint(self, a: Tensor, b: Tensor, descriptors: list[tuple[Tensor, ...]]) -> Tensor:
        """What Φ takes, by one op: where Q = A, R needs no M, and goes first."""
        terms, phi, (aggregation, place) = self.terms, self.distribution.phi, self.source
        assert phi.bias is not None
        assert self.distribution.project is None
        r = self.affinity_by_kernel(a, b)
        weight, scales = phi.weight.flatten(1), (terms.alpha, terms.gate_scale, terms.skip_scale)
        d = descriptors[aggregation][place]
        return context_fusion(a, weight, phi.bias, d, r, b, *scales, gates=terms.gates)

    def affinity_by_kernel(self, query: Tensor, b: Tensor) -> Tensor | None:
        """R (B, C, C), where there is one."""
        if not self.terms.resamples:
            return None
        return cast(Tensor, self.affinity(channel_affinity(query, b, self.terms.sign, dtype=b.dtype)))

    def resampled(self, query: Tensor, b: Tensor, coarse: Tensor | None) -> Tensor:
        """R B, with the energy and its softmax in at least float32."""
        if coarse is not None and self.energy_before_upsample:
            (h, w), (height, width) = coarse.shape[2:], b.shape[2:]
            rows, columns = upsample_matrix(h, height, wide(b)), upsample_matrix(w, width, wide(b))
            energy = self._product(wide(coarse), rows.T @ (wide(b) @ columns))
        else:
            energy = self._product(wide(query), wide(b))
        if self.terms.sign < 0:
            energy = -energy if self.negates else energy.amax(-1, keepdim=True) - energy
        r: Tensor = self.affinity(energy.softmax(-1)).to(b.dtype)
        if self.attention == "pixels":
            return _map(_pixels(b) @ r.transpose(1, 2), b)
        return (r @ b.flatten(2)).view_as(b)

    def _product(self, query: Tensor, b: Tensor) -> Tensor:
        """Q Bᵀ (B, C, C), summed over the pixels."""
        if self.attention == "pixels":
            return _pixels(query).transpose(1, 2) @ _pixels(b)
        return query.flatten(2) @ b.flatten(2).transpose(1, 2)


def _terms(block: ContextFusionBlock, name: str) -> FusionTerms:
    """Paper: β G. Release: β (γ G + B) = βγ G + β B. Without LRM: β B."""

    def number(scalar: str) -> float:
        value = float(getattr(block, scalar))
        if not math.isfinite(value):
            raise ConfigError(f"{name}.{scalar} is {value}: needs a finite number; the training diverged")
        return value

    alpha, beta, lrm = number("alpha"), number("beta"), block.lrm
    if lrm is None:
        return FusionTerms(alpha, 0.0, beta, 1, resamples=False, gates=False)
    gate_scale, skip_scale = (beta, 0.0) if block.gamma is None else (beta * number("gamma"), beta)
    sign = -1 if lrm.formulation == "release" else 1
    return FusionTerms(alpha, gate_scale, skip_scale, sign, lrm.channel_resampling, lrm.spatial_gating)


class Level(nn.Module):
    """A level of the pyramid: FPN's sum where `fusions` is empty, otherwise a chain of CFBs."""

    def __init__(self, aggregation: Aggregation | None, fusions: list[Fusion]) -> None:
        super().__init__()
        self.aggregation = aggregation
        self.fusions = nn.ModuleList(fusions)
        self.attention: Attention = "channels"

    def forward(self, d: Tensor, b: Tensor, descriptors: list[tuple[Tensor, ...]]) -> Tensor:
        """d (B, C, h, w) of the level before, b (B, C, H, W) -> d of this level; `descriptors` grows in place."""
        descriptors.append(() if self.aggregation is None else self.aggregation(d))
        a = _resized(d, b.shape[2:], self.attention)
        if not self.fusions:
            return a.add_(b)
        coarse: Tensor | None = d
        for fusion in self.fusions:
            a = fusion(a, b, descriptors, coarse)
            coarse = None
        return a


class Decoder(nn.Module):
    """Stages c1..c4 -> four features (B, C, h, w), coarse to fine, each at its own size."""

    def __init__(self, decoder: FPNDecoder) -> None:
        super().__init__()
        self.reduce = decoder.reduce
        self.lateral = decoder.lateral
        self.smooth = decoder.smooth
        self.merge = nn.ModuleList(_levels(decoder))

    def forward(self, c1: Tensor, c2: Tensor, c3: Tensor, c4: Tensor) -> list[Tensor]:
        d = self.reduce(c4)
        outputs = [d]
        descriptors: list[tuple[Tensor, ...]] = []
        for c, lateral, merge, smooth in zip((c3, c2, c1), self.lateral, self.merge, self.smooth, strict=True):
            d = merge(d, lateral(c), descriptors)
            outputs.append(smooth(d))
        return outputs


def _levels(decoder: FPNDecoder) -> Iterator[Level]:
    for level in range(len(decoder.lateral)):
        if not isinstance(decoder, AGLNDecoder):
            yield Level(None, [])
            continue
        sab = decoder.sab[level] if level < len(decoder.sab) else None
        assert sab is None or isinstance(sab, SemanticAggregationBlock | AveragePoolingBlock)
        chain = cast(list[ContextFusionBlock], list(cast(nn.ModuleList, decoder.cfb[level])))
        yield Level(
            None if sab is None else Aggregation(sab),
            [Fusion(block, f"decoder.cfb.{level}.{j}", j) for j, block in enumerate(chain)],
        )


class Concatenation(nn.Module):
    """Features (B, C, h, w), coarse to fine -> all of them at the size of the finest, (B, ΣC, H, W)."""

    def forward(self, features: list[Tensor]) -> Tensor:
        *coarse, finest = features
        if not coarse:
            return finest
        size = finest.shape[2:]
        return torch.cat([*(x if x.shape[2:] == size else resize(x, size) for x in coarse), finest], 1)


class InferenceNetwork(nn.Module):
    """Normalised image (B, 3, H, W) -> logits (B, K, H, W), for any H, W >= 32, in the dtype of the weights.

    `encoder` gives the stages, `decoder` makes features of them, coarse to fine; without one, as in FCN-8s, the only
    feature is the last stage. `mix` is conv5 of all features with its ReLU, `classifier` the 1x1 convolution to the
    classes. `full_size`: see `low_resolution_labels`. `align_corners`: of the last resize.
    """

    def __init__(self, model: SegmentationNetwork) -> None:
        """Of copies of `model`'s modules, in eval mode, without gradients.

        Raises:
            ConfigError: not a `SegmentationNetwork`, or an α, β or γ of NaN or Inf.
        """
        if not isinstance(model, SegmentationNetwork):
            raise ConfigError(
                f"inference needs a SegmentationNetwork (create_model, load_checkpoint), got {type(model).__name__}"
            )
        super().__init__()
        model = copy.deepcopy(model).requires_grad_(False)
        self.config = model.config
        self.encoder = model.encoder
        self.decoder = Decoder(model.decoder) if isinstance(model.decoder, FPNDecoder) else model.decoder
        *mix, _dropout, classifier = model.classifier
        self.mix = nn.Sequential(Concatenation(), *mix)
        self.classifier = classifier
        self.full_size = True
        self.align_corners = bool(model.config.align_corners)
        self.attention: Attention = "channels"
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        logits = self.logits(x)
        return _resized(logits, x.shape[2:], self.attention, self.align_corners) if self.full_size else logits

    def logits(self, x: Tensor) -> Tensor:
        """Before the last resize: (B, K, h, w).

        Raises:
            ConfigError: `x` is not of such a shape.
        """
        check_image(x)
        stages = self.encoder(x)
        logits: Tensor = self.classifier(self.mix(self._features(stages)))
        return logits

    def _features(self, stages: tuple[Tensor, Tensor, Tensor, Tensor]) -> list[Tensor]:
        if self.decoder is None:
            return [stages[-1]]
        features: list[Tensor] = (
            self.decoder.features(*stages) if isinstance(self.decoder, FCNDecoder) else self.decoder(*stages)
        )
        return features

    def copy(self) -> Self:
        """A network of its own, to rewrite, with the weights in the same memory: no rewrite changes one in place."""
        memo: dict[int, Tensor] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in self.parameters()}
        memo |= {id(buffer): buffer.detach() for buffer in self.buffers()}
        return copy.deepcopy(self, memo)

    def levels(self) -> list[Level]:
        """Of the decoder, from 1/16 to 1/4."""
        return cast(list[Level], list(self.decoder.merge)) if isinstance(self.decoder, Decoder) else []

    def aggregations(self) -> Iterator[tuple[int, Aggregation]]:
        """Every SAB, with the number by which its readers know it."""
        for number, level in enumerate(self.levels()):
            if level.aggregation is not None:
                yield number, level.aggregation

    def fusions(self) -> Iterator[Fusion]:
        """Every CFB."""
        for level in self.levels():
            yield from cast(list[Fusion], level.fusions)

    def attend(self, attention: Attention) -> None:
        """Compute every step of the attention so."""
        for module in self.modules():
            if isinstance(module, Aggregation | Distribution | Fusion | Level | InferenceNetwork):
                module.attention = attention
