"""The bilinear resize with aligned corners, and its shifts, as matrices along one axis."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from agln_fast.decode import axis_scale

__all__ = ["shifted_upsample_matrix", "upsample_matrix"]


def upsample_matrix(source: int, target: int, like: Tensor) -> Tensor:
    """U (target, source) of the resize, of the type and device of `like`.

    A row has two entries that are not zero, which sum to 1.
    """
    position = np.arange(target) * axis_scale(source, target)
    matrix = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(source)))
    # As a list it becomes a constant of an exported graph, rather than the operations that make it.
    return torch.tensor(matrix.tolist(), dtype=like.dtype, device=like.device)


def shifted_upsample_matrix(source: int, target: int, like: Tensor) -> Tensor:
    """[S₋₁ U, S₀ U, S₁ U] (target, 3·source): row y of S_d U is row y + d of U, or zero outside."""
    u = upsample_matrix(source, target, like)
    edge = torch.zeros_like(u[:1])
    return torch.cat([torch.cat([edge, u[:-1]]), u, torch.cat([u[1:], edge])], 1)
