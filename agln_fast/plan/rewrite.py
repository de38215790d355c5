"""A plan carried out: the network that it makes of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


def _steps(plan: Plan) -> Iterator[tuple[str, Callable[[PlannedNetwork], PlannedNetwork]]]:
    """What `plan` asks for, in the order in which it is applied, each under a name that says all about it."""
    for step in _REWRITES:
        if getattr(plan, step.__name__):
            yield step.__name__, step
    if plan.mix_before_upsample != NOT_MIXED:
        forms = plan.mix_before_upsample
        yield f"mix_before_upsample{forms}", lambda network: mix_before_upsample(network, forms)
    if plan.winograd:
        yield f"winograd({plan.winograd})", lambda network: winograd(network, plan.winograd)


@torch.no_grad()
def rewrite(
    model: SegmentationNetwork, plan: Plan, made: dict[tuple[str, ...], PlannedNetwork] | None = None
) -> PlannedNetwork:
    """A network that computes the same function as `model`, rewritten as `plan` says; `model` is not changed.

    Weights are composed in the model's dtype: give it in float32 or better, and round the result.

    Args:
        made: networks of `model` after the first steps, by their names: looked into and filled, so that calls for
            several plans share what these have in common. The result is one of them then; do not change it.

    Raises:
        ConfigError: not a `SegmentationNetwork`, or an α, β or γ of NaN or Inf.
    """
    made = {} if made is None else made
    done: tuple[str, ...] = ()
    network = made[done] = made.get(done) or plan_network(model)
    for name, step in _steps(plan):
        done = (*done, name)
        network = made[done] = made.get(done) or step(network)
    return network
