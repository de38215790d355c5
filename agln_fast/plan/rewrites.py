"""Exact rewrites: each takes a network and returns a new one that computes the same function with less work.

The argument is left alone; where there is nothing to do, it is the result. `Plan` is the table of all rewrites.
"""

from __future__ import annotations

from importlib import import_module
from itertools import pairwise

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.network import InferenceNetwork, convolution_from
from agln_fast.plan.plan import Plan

__all__ = [
    "distribute_before_upsample",
    "drop_attention_bias",
    "drop_dead_branches",
    "energy_before_upsample",
    "fold_batchnorm",
    "low_resolution_labels",
    "negate_energy",
    "pixel_major_attention",
    "pool_before_projection",
    "project_descriptors",
    "rewrite",
]


@torch.no_grad()
def rewrite(
    model: SegmentationNetwork, plan: Plan, made: dict[tuple[str, ...], InferenceNetwork] | None = None
) -> InferenceNetwork:
    """A network that computes the same function as `model`, rewritten as `plan` says; `model` is not changed.

    Weights are composed in the model's dtype: give it in float32 or better, and round the result.

    Args:
        made: networks of `model` after the first steps, by their names: looked into and filled, so that calls for
            several plans share what these have in common. The result is one of them then, and the same for plans that
            differ in nothing that this network has; do not change it.

    Raises:
        ConfigError: not a `SegmentationNetwork`, or an α, β or γ of NaN or Inf.
    """
    made = {} if made is None else made
    done: tuple[str, ...] = ()
    network = made[done] = made.get(done) or InferenceNetwork(model)
    for name, row, value in plan.steps():
        step = (*done, row.words(name, value))
        if step not in made:
            apply = getattr(import_module(row.module), name)
            made[step] = apply(network) if value is True else apply(network, value)
        if made[step] is not network:
            done, network = step, made[step]
    return network


def fold_batchnorm(network: InferenceNetwork) -> InferenceNetwork:
    """Every convolution carries the scale and shift of the batch normalisation after it as weights.

    Exact because in eval mode BN is affine per channel, s · (W x) + t = (s W) x + t, with s and t from its running
    statistics. It must happen in float32 or better, before weights are rounded to half precision.

    In this family a BN always follows the convolution that is registered right before it.
    """
    network = network.copy()
    for module in network.modules():
        for (name, before), (bn_name, bn) in pairwise(module.named_children()):
            if not isinstance(bn, nn.BatchNorm2d):
                continue
            owner, key = (before, str(len(before) - 1)) if isinstance(before, nn.Sequential) else (module, name)
            layer = getattr(owner, key)
            assert isinstance(layer, nn.Conv2d), f"{bn_name} follows no convolution"
            setattr(owner, key, fuse_conv_bn_eval(layer, bn))
            setattr(module, bn_name, nn.Identity())
    return network


def drop_attention_bias(network: InferenceNetwork) -> InferenceNetwork:
    """SAB: θ without its bias.

    Exact because the bias adds the same number to all pixels of an attention map, and cancels in its softmax.
    """
    network = network.copy()
    for _, aggregation in network.aggregations():
        if aggregation.theta is not None:
            aggregation.theta.bias = None
    return network


def drop_dead_branches(network: InferenceNetwork) -> InferenceNetwork:
    """CFB: with γ = 0 or β = 0 the channel attention and the gate vanish; with α = 0, and no gate, the whole SDM, and
    a SAB that no CFB reads any more.

    Exact because zero times a finite value is zero.
    """
    network = network.copy()
    for fusion in network.fusions():
        fusion.terms = fusion.terms.alive
    read = {fusion.source[0] for fusion in network.fusions() if fusion.terms.distributes}
    for number, level in enumerate(network.levels()):
        if number not in read:
            level.aggregation = None
    return network


def pool_before_projection(network: InferenceNetwork) -> InferenceNetwork:
    """SAB: D = Wφ (X · attention) + bφ 1ᵀ: C·C·N multiply-adds in the place of C·C·P, and X is read once, for both.

    Exact because (Wφ X + bφ 1ᵀ) · attention = Wφ (X · attention) + bφ (1ᵀ · attention), and each attention map, or the
    mean, sums to 1 over the pixels.
    """
    network = network.copy()
    for _, aggregation in network.aggregations():
        assert aggregation.phi is not None
        aggregation.projection = _composed(aggregation.projection, aggregation.phi)
        aggregation.phi = None
    return network


def project_descriptors(network: InferenceNetwork) -> InferenceNetwork:
    """SDM of the release: M = (Wo D + bo 1ᵀ) · attention: a 1x1 convolution of a map, C·C·P, becomes a product C·C·N.

    The descriptors of all CFBs that read one SAB are one product, and one with what projected them before.

    Exact because Wo (D · attention) + bo 1ᵀ = (Wo D + bo 1ᵀ) · attention: each pixel's attention sums to 1 over the
    descriptors. Without effect in the paper's formulation, which projects nothing.
    """
    network = network.copy()
    for number, aggregation in network.aggregations():
        projections: list[nn.Conv2d] = []
        for fusion in network.fusions():
            project = fusion.distribution.project
            if fusion.source[0] == number and fusion.terms.distributes and project is not None:
                fusion.source = number, len(projections)
                fusion.distribution.project = None
                projections.append(project)
        if projections:
            weight = torch.cat([project.weight for project in projections])
            bias = torch.cat([project.bias for project in projections if project.bias is not None])
            aggregation.projection = _composed(convolution_from(weight, bias), aggregation.projection)
            aggregation.count, aggregation.projects = len(projections), True
    return network


def _composed(outer: nn.Conv2d | None, inner: nn.Conv2d | None) -> nn.Conv2d | None:
    """One 1x1 convolution that does both, either of which may be missing; multiplied in float64, then rounded once."""
    if outer is None or inner is None:
        return outer or inner
    assert outer.bias is not None
    assert inner.bias is not None
    matrix, dtype = outer.weight.flatten(1).double(), outer.weight.dtype
    weight = matrix @ inner.weight.flatten(1).double()
    bias = matrix @ inner.bias.double() + outer.bias.double()
    return convolution_from(weight[..., None, None].to(dtype), bias.to(dtype))


def negate_energy(network: InferenceNetwork) -> InferenceNetwork:
    """LRM of the release: softmax(−energy) in the place of softmax(rowmax − energy): no pass for the row's maximum.

    Exact because the maximum is the same number for a whole row, and cancels in its softmax. Without effect in the
    paper's formulation.
    """
    network = network.copy()
    for fusion in network.fusions():
        fusion.negates = True
    return network


def distribute_before_upsample(network: InferenceNetwork) -> InferenceNetwork:
    """First CFB of a chain: ϕ(U a) = U ϕ(a): a quarter of the multiply-adds of ϕ, and N maps to resize beside those of
    A.

    Exact because a 1x1 convolution mixes channels and a resize mixes pixels: they commute; the bias passes through,
    because the weights of a resized pixel sum to 1. Only the first CFB of a chain reads a resized map.
    """
    rewritten = network.copy()
    fusions = [fusion for fusion in rewritten.fusions() if fusion.terms.distributes]
    for fusion in fusions:
        fusion.distribution.before_upsample = True
    return rewritten if fusions else network


def energy_before_upsample(network: InferenceNetwork) -> InferenceNetwork:
    """First CFB of a chain, release: (U a) Bᵀ = a (Uᵀ B)ᵀ: the adjoint of the resize brings B down, and the product
    sums over a quarter of the pixels.

    Exact because the sum over pixels is a scalar product, and U is linear. Where Ψ comes first, as in the paper's
    formulation, the query is no resized map, and nothing changes.
    """
    rewritten = network.copy()
    fusions = [fusion for fusion in rewritten.fusions() if fusion.enhance is None and fusion.terms.resamples]
    for fusion in fusions:
        fusion.energy_before_upsample = True
    return rewritten if fusions else network


def pixel_major_attention(network: InferenceNetwork) -> InferenceNetwork:
    """SDM and LRM as products of (pixels, channels): M = (softmax(ϕ(A))ᵀ Dᵀ)ᵀ, R = softmax((Qᵀ)ᵀ Bᵀ), F = (Bᵀ Rᵀ)ᵀ.

    Exact because (X Y)ᵀ = Yᵀ Xᵀ. It pays where convolutions keep the channels adjacent, as OpenVINO's do: maps need not
    be reordered around each product, a softmax over descriptors runs over adjacent numbers, and OpenVINO does not take
    the channel attention for one of a transformer, which it computes in a slower way.
    """
    if not any(True for _ in network.fusions()):
        return network
    network = network.copy()
    network.attend("pixels")
    return network


def low_resolution_labels(network: InferenceNetwork) -> InferenceNetwork:
    """Logits (B, K, h, w), before their last resize, for a host that does it and takes the best class at once.

    Exact because the resize is a convex combination of the four corners of a cell, computed where it is asked for: the
    K·H·W resized logits need not exist together.
    """
    network = network.copy()
    network.full_size = False
    return network
