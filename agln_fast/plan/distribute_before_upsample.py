"""First CFB of a chain: the scores of the descriptors at the resolution that A was resized from."""

from agln_fast.plan.network import PlannedNetwork

__all__ = ["distribute_before_upsample"]


def distribute_before_upsample(network: PlannedNetwork) -> PlannedNetwork:
    """ϕ(U a) = U ϕ(a): a quarter of the multiply-adds of ϕ, and N maps to resize beside those of A.

    Exact because a 1x1 convolution mixes channels and a resize mixes pixels: they commute; the bias passes through,
    because the weights of a resized pixel sum to 1. Only the first CFB of a chain reads a resized map.
    """
    network = network.copy()
    for fusion in network.fusions():
        fusion.distribution.before_upsample = True
    return network
