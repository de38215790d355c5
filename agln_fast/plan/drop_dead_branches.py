"""CFB: leave out what is multiplied by zero."""

from agln_fast.plan.network import PlannedNetwork

__all__ = ["drop_dead_branches"]


def drop_dead_branches(network: PlannedNetwork) -> PlannedNetwork:
    """With γ = 0 or β = 0 the channel attention and the gate vanish; with α = 0, and no gate, the whole SDM.

    Exact because zero times a finite value is zero.
    """
    network = network.copy()
    for fusion in network.fusions():
        fusion.drops_dead = True
    return network
