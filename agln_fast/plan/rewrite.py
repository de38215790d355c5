"""A plan carried out: the network that it makes of another."""

from __future__ import annotations

import torch

from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.distribute_before_upsample import distribute_before_upsample
from agln_fast.plan.drop_attention_bias import drop_attention_bias
from agln_fast.plan.drop_dead_branches import drop_dead_branches
from agln_fast.plan.energy_before_upsample import energy_before_upsample
from agln_fast.plan.fold_batchnorm import fold_batchnorm
from agln_fast.plan.mix_before_upsample import mix_before_upsample
from agln_fast.plan.negate_energy import negate_energy
from agln_fast.plan.network import PlannedNetwork, plan_network
from agln_fast.plan.pixel_major_attention import pixel_major_attention
from agln_fast.plan.plan import NOT_MIXED, Plan
from agln_fast.plan.pool_before_projection import pool_before_projection
from agln_fast.plan.project_descriptors import project_descriptors
from agln_fast.plan.winograd import winograd

__all__ = ["rewrite"]

_REWRITES = (
    fold_batchnorm,
    pool_before_projection,
    drop_attention_bias,
    project_descriptors,
    negate_energy,
    drop_dead_branches,
    distribute_before_upsample,
    energy_before_upsample,
    pixel_major_attention,
)


@torch.no_grad()
def rewrite(model: SegmentationNetwork, plan: Plan) -> PlannedNetwork:
    """A network that computes the same function as `model`, rewritten as `plan` says; `model` is not changed.

    Weights are composed in the model's dtype: give it in float32 or better, and round the result.

    Raises:
        ConfigError: not a `SegmentationNetwork`, or an α, β or γ of NaN or Inf.
    """
    network = plan_network(model)
    for step in _REWRITES:
        if getattr(plan, step.__name__):
            network = step(network)
    if plan.mix_before_upsample != NOT_MIXED:
        network = mix_before_upsample(network, plan.mix_before_upsample)
    if plan.winograd:
        network = winograd(network, plan.winograd)
    return network
