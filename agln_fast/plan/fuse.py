"""From a reference network to the network for inference: all exact rewrites, one function each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn

from agln_fast.errors import ConfigError
from agln_fast.forking import use_threads
from agln_fast.models.blocks import AveragePoolingBlock, ContextFusionBlock, SemanticAggregationBlock
from agln_fast.models.networks import AGLNDecoder, FPNDecoder, SegmentationNetwork
from agln_fast.models.resnet import BasicBlock, Bottleneck, ResNet
from agln_fast.plan.convolution import FusedConv2d
from agln_fast.plan.fold_batchnorm import fold_batchnorm
from agln_fast.plan.inference import (
    Aggregation,
    ContextFusion,
    Decoder,
    Encoder,
    FusionLevel,
    FusionTerms,
    InferenceNetwork,
    PyramidLevel,
    ResidualBlock,
    SeparableConv,
)

__all__ = ["fuse"]

_Projection = tuple[Tensor, Tensor]  # a matrix (C, C) and a bias (C,)


@torch.no_grad()
def fuse(model: SegmentationNetwork) -> InferenceNetwork:
    """Make the network for inference that computes the same function, with its attention steps as fused ops.

    Every rewrite changes the order of linear operations or leaves out what cannot count, never the function: batch
    normalisation is folded into the convolutions, features are pooled before they are projected, descriptors are
    projected in the place of maps, branches with a factor of exactly zero are dropped. In float64 both networks agree
    to rounding.

    Args:
        model: a reference network, best in float32: weights are composed before `.half()` or `.to(torch.bfloat16)`
            rounds the result. It is not changed, and shares no memory with the result.

    Returns:
        A network in eval mode, of the model's dtype and device, for inference only: its weights take no gradients.

    Raises:
        ConfigError: not a `SegmentationNetwork`, or an α, β or γ of NaN or Inf.
    """
    if not isinstance(model, SegmentationNetwork):
        raise ConfigError(
            f"fuse needs a SegmentationNetwork (create_model, load_checkpoint), got {type(model).__name__}"
        )
    use_threads()
    folded = fold_batchnorm(model)
    return InferenceNetwork(
        model.config,
        _encoder(folded.encoder),
        None if folded.decoder is None else _decoder(folded.decoder),
        nn.Sequential(
            FusedConv2d(cast(nn.Conv2d, folded.classifier[0]), relu=True),
            FusedConv2d(cast(nn.Conv2d, folded.classifier[4]), relu=False),  # dropout, before it, is for training
        ),
    ).eval()


def pool_before_projection(block: SemanticAggregationBlock | AveragePoolingBlock) -> _Projection:
    """φ as a matrix and a bias, for pooled features: D = Wφ (X · attention) + bφ 1ᵀ.

    Exact because (Wφ X + bφ 1ᵀ) · attention = Wφ (X · attention) + bφ (1ᵀ · attention), and each attention map, or the
    mean, sums to 1 over the pixels.
    """
    return _matrix(block.phi)


def drop_attention_bias(block: SemanticAggregationBlock | AveragePoolingBlock) -> Tensor | None:
    """θ without its bias, (N, C); None for the mean, which needs none.

    Exact because the bias adds the same number to all pixels of an attention map, and cancels in its softmax.
    """
    return _matrix(block.theta)[0] if isinstance(block, SemanticAggregationBlock) else None


def project_descriptors(projection: _Projection, block: ContextFusionBlock) -> _Projection:
    """φ, then the release's projection of M, as one for the pooled features: Wo Wφ and Wo bφ + bo.

    Exact because Wo (D · attention) + bo 1ᵀ = (Wo D + bo 1ᵀ) · attention: each pixel's attention sums to 1 over the
    descriptors.
    """
    if block.sdm.project is None:
        return projection
    (inner, inner_bias), (outer, outer_bias) = projection, _matrix(block.sdm.project)
    weight = outer.double() @ inner.double()
    bias = outer.double() @ inner_bias.double() + outer_bias.double()
    return weight.to(inner.dtype), bias.to(inner.dtype)


def negate_energy(block: ContextFusionBlock) -> int:
    """Sign of the energy in the softmax of the channel attention.

    Exact because the release's softmax(rowmax − energy) = softmax(−energy): the same number is added to a whole row.
    """
    return -1 if block.lrm is not None and block.lrm.formulation == "release" else 1


def drop_dead_branches(block: ContextFusionBlock, name: str) -> FusionTerms:
    """α, and the factors of the gated and the plain lateral feature; the zeros among them are not computed.

    Paper: β G. Release: β (γ G + B) = βγ G + β B. Without LRM: β B.

    Exact because zero times a finite value is zero.

    Raises:
        ConfigError: α, β or γ is NaN or Inf; `name` is that of the block.
    """

    def number(scalar: str) -> float:
        value = float(getattr(block, scalar))
        if not math.isfinite(value):
            raise ConfigError(f"{name}.{scalar} is {value}: needs a finite number; the training diverged")
        return value

    alpha, beta = number("alpha"), number("beta")
    if block.lrm is None:
        gate_scale, skip_scale = 0.0, beta
    elif block.gamma is None:
        gate_scale, skip_scale = beta, 0.0
    else:
        gate_scale, skip_scale = beta * number("gamma"), beta
    lrm = block.lrm if gate_scale != 0 else None
    return FusionTerms(
        alpha,
        gate_scale,
        skip_scale,
        negate_energy(block),
        resamples=lrm is not None and lrm.channel_resampling,
        gates=lrm is not None and lrm.spatial_gating,
    )


def fuse_convolution(layers: nn.Module) -> FusedConv2d | SeparableConv:
    """A convolution (depthwise and pointwise in AGLN-Lite), BN folded into it, and ReLU as one layer."""
    first, second, *_ = cast(nn.Sequential, layers)
    if isinstance(second, nn.Conv2d):
        assert second.bias is not None
        return SeparableConv(cast(Tensor, first.weight), second.weight, second.bias)
    return FusedConv2d(cast(nn.Conv2d, first), relu=True)


def _matrix(convolution: nn.Conv2d) -> _Projection:
    """A 1x1 convolution as a matrix (out, in) and a bias (out,)."""
    assert convolution.bias is not None
    return convolution.weight.flatten(1), convolution.bias


def _encoder(encoder: ResNet) -> Encoder:
    stem = encoder.conv1.modules()
    convolutions = [FusedConv2d(layer, relu=True) for layer in stem if isinstance(layer, nn.Conv2d)]
    stages = (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4)
    return Encoder(nn.Sequential(*convolutions), [nn.Sequential(*map(_residual_block, stage)) for stage in stages])


def _residual_block(block: nn.Module) -> ResidualBlock:
    assert isinstance(block, BasicBlock | Bottleneck)
    convolutions = [block.conv1, block.conv2, *([block.conv3] if isinstance(block, Bottleneck) else [])]
    shortcut = block.downsample
    return ResidualBlock(
        [FusedConv2d(convolution, relu=True) for convolution in convolutions],
        None if shortcut is None else FusedConv2d(cast(nn.Conv2d, cast(nn.Sequential, shortcut)[0]), relu=False),
    )


def _decoder(decoder: FPNDecoder) -> Decoder:
    levels = _fusion_levels(decoder) if isinstance(decoder, AGLNDecoder) else (PyramidLevel() for _ in decoder.lateral)
    return Decoder(
        fuse_convolution(decoder.reduce),
        map(fuse_convolution, decoder.lateral),
        levels,
        map(fuse_convolution, decoder.smooth),
    )


def _fusion_levels(decoder: AGLNDecoder) -> Iterator[FusionLevel]:
    """The levels. Descriptors are numbered as they appear; an aggregation makes those that some CFB distributes."""
    chains = [cast(list[ContextFusionBlock], list(cast(nn.ModuleList, chain))) for chain in decoder.cfb]
    terms = {
        block: drop_dead_branches(block, f"decoder.cfb.{level}.{j}")
        for level, chain in enumerate(chains)
        for j, block in enumerate(chain)
    }
    sources: dict[ContextFusionBlock, int] = {}
    count = 0
    aggregations: list[Aggregation | None] = [None] * len(chains)
    for j, sab in enumerate(decoder.sab):
        assert isinstance(sab, SemanticAggregationBlock | AveragePoolingBlock)
        projections: list[_Projection] = []
        for block in (chain[j] for chain in chains if j < len(chain)):
            if not terms[block].distributes:
                continue
            if block.sdm.project is not None or not projections:  # the paper's blocks share one
                projections.append(project_descriptors(pool_before_projection(sab), block))
            sources[block] = count + len(projections) - 1
        if projections:
            aggregations[j] = Aggregation(drop_attention_bias(sab), projections)
        count += len(projections)
    for aggregation, chain in zip(aggregations, chains, strict=True):
        yield FusionLevel(
            aggregation,
            (
                ContextFusion(
                    terms[block],
                    block.sdm.phi,
                    sources.get(block),
                    None if block.enhance is None else fuse_convolution(block.enhance),
                    None if block.fuse is None else fuse_convolution(block.fuse),
                )
                for block in chain
            ),
        )
