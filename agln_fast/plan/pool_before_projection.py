"""SAB: pool the features by attention first, then project them."""

from agln_fast.plan.network import PlannedNetwork

__all__ = ["pool_before_projection"]


def pool_before_projection(network: PlannedNetwork) -> PlannedNetwork:
    """D = Wφ (X · attention) + bφ 1ᵀ: C·C·N multiply-adds in the place of C·C·P, and X is read once, for both.

    Exact because (Wφ X + bφ 1ᵀ) · attention = Wφ (X · attention) + bφ (1ᵀ · attention), and each attention map, or the
    mean, sums to 1 over the pixels.
    """
    network = network.copy()
    for aggregation in network.aggregations():
        aggregation.pools_first = True
    return network
