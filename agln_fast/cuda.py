"""What CUDA devices there are."""

from __future__ import annotations

__all__ = ["compute_capability"]


def compute_capability(device: int | None = None) -> str | None:
    """The compute capability of a CUDA device (None: the current one), e.g. "sm89"; None where there is no device."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"
