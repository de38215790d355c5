"""The network that rewrites work on: what a `SegmentationNetwork` computes, in plain PyTorch that exporters take.

`plan_network` makes it, in the form of the reference; each rewrite returns a copy in another form. What a form changes
stands beside the plain form, in one `forward`, so that both can be compared line by line.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from agln_fast.errors import ConfigError
from agln_fast.models.blocks import AveragePoolingBlock, ContextFusionBlock, SemanticAggregationBlock, resize
from agln_fast.models.networks import AGLNDecoder, FPNDecoder, SegmentationNetwork, check_image

__all__ = ["Aggregation", "Distribution", "Fusion", "FusionTerms", "PlannedNetwork", "plan_network", "upsample_matrix"]


def upsample_matrix(source: int, target: int, like: Tensor) -> Tensor:
    """U (target, source) of the bilinear resize with aligned corners along one axis, of the type and device of `like`.

    A row has two entries that are not zero, which sum to 1.
    """
    position = np.arange(target) * ((source - 1) / max(1, target - 1))
    matrix = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(source)))
    # As a list it becomes a constant of an exported graph, rather than the operations that make it.
    return torch.tensor(matrix.tolist(), dtype=like.dtype, device=like.device)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _softmax(x: Tensor, dim: int) -> Tensor:
    return _wide(x).softmax(dim).to(x.dtype)


def _affine(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution of x (B, C, N)."""
    assert convolution.bias is not None
    return convolution.weight.flatten(1) @ x + convolution.bias[:, None]


def _pixels(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, HW, C): a view, if the channels are adjacent in memory."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _map(x: Tensor, like: Tensor) -> Tensor:
    """(B, HW, C) -> (B, C, H, W), the inverse of `_pixels`."""
    return x.reshape(x.shape[0], *like.shape[2:], x.shape[2]).permute(0, 3, 1, 2)


class Aggregation(nn.Module):
    """SAB, or its average: X (B, C, h, w) -> D (B, C, N). `pools_first`: see `pool_before_projection`."""

    def __init__(self, block: SemanticAggregationBlock | AveragePoolingBlock) -> None:
        super().__init__()
        self.phi = block.phi
        self.theta = block.theta if isinstance(block, SemanticAggregationBlock) else None
        self.pools_first = False

    def forward(self, x: Tensor) -> Tensor:
        features = (x if self.pools_first else self.phi(x)).flatten(2)
        if self.theta is None:
            pooled = _wide(features).mean(-1, keepdim=True).to(x.dtype)
        else:
            pooled = features @ _softmax(self.theta(x).flatten(2), -1).transpose(1, 2)
        return _affine(self.phi, pooled) if self.pools_first else pooled


class Distribution(nn.Module):
    """SDM: A (B, C, H, W), D (B, C, N) -> M (B, C, H, W).

    `projects_descriptors`: see `project_descriptors`; `before_upsample`: see `distribute_before_upsample`;
    `pixel_major`: see `pixel_major_attention`.
    """

    def __init__(self, phi: nn.Conv2d, project: nn.Conv2d | None) -> None:
        super().__init__()
        self.phi = phi
        self.project = project
        self.projects_descriptors = False
        self.before_upsample = False
        self.pixel_major = False

    def forward(self, a: Tensor, descriptors: Tensor, coarse: Tensor | None) -> Tensor:
        """`coarse` (B, C, h, w) is what A was resized from, None where A is no resized map."""
        if self.projects_descriptors and self.project is not None:
            descriptors = _affine(self.project, descriptors)
        scores = self.phi(a) if coarse is None or not self.before_upsample else resize(self.phi(coarse), a.shape)
        if self.pixel_major:
            m = _map(_softmax(_pixels(scores), -1) @ descriptors.transpose(1, 2), a)
        else:
            m = (descriptors @ _softmax(scores.flatten(2), 1)).view_as(a)
        return m if self.projects_descriptors or self.project is None else self.project(m)


@dataclass(frozen=True)
class FusionTerms:
    """The sum in a CFB: base + gate_scale · (R B) ⊙ σ(M) + skip_scale · B, with R = softmax(sign · Q Bᵀ).

    A term whose scale is 0 need not be computed. Without `resamples` R is the identity, without `gates` σ(M) is 1.
    """

    alpha: float
    gate_scale: float
    skip_scale: float
    sign: int
    resamples: bool
    gates: bool

    @property
    def refines(self) -> bool:
        """The gated term counts."""
        return self.gate_scale != 0 and (self.resamples or self.gates)

    @property
    def distributes(self) -> bool:
        """Something reads M."""
        return self.alpha != 0 or (self.refines and self.gates)


class Fusion(nn.Module):
    """CFB: A (B, C, H, W), B (B, C, H, W), D (B, C, N) -> O (B, C, H, W); Ψ is `enhance`, Φ is `fuse`.

    `negates`: see `negate_energy`; `drops_dead`: see `drop_dead_branches`; `energy_before_upsample` and `pixel_major`:
    see the rewrites of these names.
    """

    def __init__(self, block: ContextFusionBlock, name: str) -> None:
        """
        Raises:
            ConfigError: α, β or γ is NaN or Inf; `name` is that of the block.
        """
        super().__init__()
        self.distribution = Distribution(block.sdm.phi, block.sdm.project)
        self.enhance = block.enhance
        self.fuse = block.fuse
        self.terms = _terms(block, name)
        self.negates = False
        self.drops_dead = False
        self.energy_before_upsample = False
        self.pixel_major = False

    def forward(self, a: Tensor, b: Tensor, descriptors: Tensor, coarse: Tensor | None) -> Tensor:
        """`coarse` is what A was resized from, None where A is no resized map."""
        terms = self.terms
        m, base = None, a
        if terms.distributes or not self.drops_dead:
            m = self.distribution(a, descriptors, coarse)
        if m is not None and (terms.alpha != 0 or not self.drops_dead):
            base = a + terms.alpha * m
        query = a
        if self.enhance is not None:
            query = base = self.enhance(base)
            coarse = None
        if terms.refines or (not self.drops_dead and (terms.resamples or terms.gates)):
            g = self.resampled(query, b, coarse) if terms.resamples else b
            base = base + terms.gate_scale * (g * m.sigmoid() if terms.gates and m is not None else g)
        if terms.skip_scale != 0:
            base = base + terms.skip_scale * b
        return base if self.fuse is None else cast(Tensor, self.fuse(base))

    def resampled(self, query: Tensor, b: Tensor, coarse: Tensor | None) -> Tensor:
        """R B, with the energy and its softmax in at least float32."""
        if coarse is not None and self.energy_before_upsample:
            (h, w), (height, width) = coarse.shape[2:], b.shape[2:]
            rows, columns = upsample_matrix(h, height, _wide(b)), upsample_matrix(w, width, _wide(b))
            energy = self._product(_wide(coarse), rows.T @ (_wide(b) @ columns))
        else:
            energy = self._product(_wide(query), _wide(b))
        if self.terms.sign < 0:
            energy = -energy if self.negates else energy.amax(-1, keepdim=True) - energy
        r = energy.softmax(-1).to(b.dtype)
        return _map(_pixels(b) @ r.transpose(1, 2), b) if self.pixel_major else (r @ b.flatten(2)).view_as(b)

    def _product(self, query: Tensor, b: Tensor) -> Tensor:
        """Q Bᵀ (B, C, C), summed over the pixels."""
        if self.pixel_major:
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


class PlannedLevel(nn.Module):
    """A level of the pyramid: FPN's sum where `fusions` is empty, otherwise a chain of CFBs."""

    def __init__(self, aggregation: Aggregation | None, fusions: list[Fusion]) -> None:
        super().__init__()
        self.aggregation = aggregation
        self.fusions = nn.ModuleList(fusions)

    def forward(self, d: Tensor, b: Tensor, descriptors: list[Tensor]) -> Tensor:
        """d (B, C, h, w) of the level before, b (B, C, H, W) -> d of this level; `descriptors` grows in place."""
        if self.aggregation is not None:
            descriptors.append(self.aggregation(d))
        a = resize(d, b.shape)
        if not self.fusions:
            return a + b
        coarse: Tensor | None = d
        for j, fusion in enumerate(self.fusions):
            a = fusion(a, b, descriptors[j], coarse)
            coarse = None
        return a


class PlannedDecoder(nn.Module):
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
        descriptors: list[Tensor] = []
        for c, lateral, merge, smooth in zip((c3, c2, c1), self.lateral, self.merge, self.smooth, strict=True):
            d = merge(d, lateral(c), descriptors)
            outputs.append(smooth(d))
        return outputs


def _levels(decoder: FPNDecoder) -> Iterator[PlannedLevel]:
    for level in range(len(decoder.lateral)):
        if not isinstance(decoder, AGLNDecoder):
            yield PlannedLevel(None, [])
            continue
        sab = decoder.sab[level] if level < len(decoder.sab) else None
        assert sab is None or isinstance(sab, SemanticAggregationBlock | AveragePoolingBlock)
        chain = cast(list[ContextFusionBlock], list(cast(nn.ModuleList, decoder.cfb[level])))
        yield PlannedLevel(
            None if sab is None else Aggregation(sab),
            [Fusion(block, f"decoder.cfb.{level}.{j}") for j, block in enumerate(chain)],
        )


class PlannedNetwork(nn.Module):
    """Normalised image (B, 3, H, W) -> logits (B, K, H, W), for any H, W >= 32, in the dtype of the weights."""

    def __init__(self, model: SegmentationNetwork) -> None:
        """Takes over the modules of `model`."""
        super().__init__()
        self.config = model.config
        self.encoder = model.encoder
        self.decoder = None if model.decoder is None else PlannedDecoder(model.decoder)
        self.classifier = model.classifier
        self.mix: nn.Module | None = None  # in the place of the classifier's first layer: see mix_before_upsample

    def forward(self, x: Tensor) -> Tensor:
        return resize(self.logits(x), x.shape)

    def logits(self, x: Tensor) -> Tensor:
        """Before the last resize: (B, K, h, w).

        Raises:
            ConfigError: `x` is not of such a shape.
        """
        check_image(x)
        stages = self.encoder(x)
        if self.decoder is None:
            y = self.classifier[0](stages[-1])
        else:
            features = self.decoder(*stages)
            if self.mix is None:
                y = self.classifier[0](torch.cat([resize(feature, features[-1].shape) for feature in features], 1))
            else:
                y = self.mix(features)
        logits: Tensor = self.classifier[1:](y)
        return logits

    def copy(self) -> Self:
        """A network of its own, to rewrite, with the weights in the same memory: no rewrite changes one in place."""
        memo: dict[int, Tensor] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in self.parameters()}
        memo |= {id(buffer): buffer.detach() for buffer in self.buffers()}
        return copy.deepcopy(self, memo)

    def aggregations(self) -> Iterator[Aggregation]:
        """Every SAB."""
        return (module for module in self.modules() if isinstance(module, Aggregation))

    def fusions(self) -> Iterator[Fusion]:
        """Every CFB."""
        return (module for module in self.modules() if isinstance(module, Fusion))


@torch.no_grad()
def plan_network(model: SegmentationNetwork) -> PlannedNetwork:
    """A copy of `model`, in eval mode and for inference only, that rewrites can work on.

    Raises:
        ConfigError: not a `SegmentationNetwork`, or an α, β or γ of NaN or Inf.
    """
    if not isinstance(model, SegmentationNetwork):
        raise ConfigError(
            f"rewrites need a SegmentationNetwork (create_model, load_checkpoint), got {type(model).__name__}"
        )
    return PlannedNetwork(copy.deepcopy(model)).eval().requires_grad_(False)
