"""First CFB of a chain, release: the energy at the resolution that A was resized from."""

from agln_fast.plan.network import PlannedNetwork

__all__ = ["energy_before_upsample"]


def energy_before_upsample(network: PlannedNetwork) -> PlannedNetwork:
    """(U a) Bᵀ = a (Uᵀ B)ᵀ: the adjoint of the resize brings B down, and the product sums over
    a quarter of the pixels.

    Exact because the sum over pixels is a scalar product, and U is linear. Where Ψ comes first, as in the paper's
    formulation, the query is no resized map, and nothing changes.
    """
    network = network.copy()
    for fusion in network.fusions():
        fusion.energy_before_upsample = True
    return network
