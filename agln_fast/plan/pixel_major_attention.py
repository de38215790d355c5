"""SDM and LRM as products of (pixels, channels), in the place of (channels, pixels)."""

from agln_fast.plan.network import PlannedNetwork

__all__ = ["pixel_major_attention"]


def pixel_major_attention(network: PlannedNetwork) -> PlannedNetwork:
    """M = (softmax(ϕ(A))ᵀ Dᵀ)ᵀ, R = softmax((Qᵀ)ᵀ Bᵀ), F = (Bᵀ Rᵀ)ᵀ: the same products, transposed.

    Exact because (X Y)ᵀ = Yᵀ Xᵀ. It pays where convolutions keep the channels adjacent, as OpenVINO's do: maps need not
    be reordered around each product, a softmax over descriptors runs over adjacent numbers, and OpenVINO does not take
    the channel attention for one of a transformer, which it computes in a slower way.
    """
    network = network.copy()
    for fusion in network.fusions():
        fusion.pixel_major = fusion.distribution.pixel_major = True
    return network
