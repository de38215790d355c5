"""LRM of the release: the softmax of the negative energy."""

from agln_fast.plan.network import PlannedNetwork

__all__ = ["negate_energy"]


def negate_energy(network: PlannedNetwork) -> PlannedNetwork:
    """softmax(−energy) in the place of softmax(rowmax − energy): no pass for the row's maximum.

    Exact because the maximum is the same number for a whole row, and cancels in its softmax. Without effect in the
    paper's formulation.
    """
    network = network.copy()
    for fusion in network.fusions():
        fusion.negates = True
    return network
