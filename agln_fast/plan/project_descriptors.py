"""SDM of the release: project the descriptors in the place of the map."""

from agln_fast.plan.network import PlannedNetwork

__all__ = ["project_descriptors"]


def project_descriptors(network: PlannedNetwork) -> PlannedNetwork:
    """M = (Wo D + bo 1ᵀ) · attention: a 1x1 convolution of a map, C·C·P, becomes a product C·C·N.

    Exact because Wo (D · attention) + bo 1ᵀ = (Wo D + bo 1ᵀ) · attention: each pixel's attention sums to 1 over the
    descriptors. Without effect in the paper's formulation, which projects nothing.
    """
    network = network.copy()
    for fusion in network.fusions():
        fusion.distribution.projects_descriptors = True
    return network
