"""SAB: the attention without its bias."""

from torch import nn

from agln_fast.plan.network import PlannedNetwork

__all__ = ["drop_attention_bias"]


def drop_attention_bias(network: PlannedNetwork) -> PlannedNetwork:
    """θ without its bias.

    Exact because the bias adds the same number to all pixels of an attention map, and cancels in its softmax.
    """
    network = network.copy()
    for aggregation in network.aggregations():
        if aggregation.theta is not None:
            aggregation.theta.register_parameter("bias", None)
            assert isinstance(aggregation.theta, nn.Conv2d)
    return network
