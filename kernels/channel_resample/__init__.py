"""Channels of the encoder mixed by their likeness to the decoder's, gated and added: local refinement in two ops."""

from agln_fast.kernels.channel_resample.op import channel_affinity, channel_apply

__all__ = ["channel_affinity", "channel_apply"]
