"""How far a fused result may be from the exact one: twice as far as plain PyTorch in the same dtype, and one ulp."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assert_as_exact"]


def assert_as_exact(actual: Tensor, exact: Tensor, plain: Tensor, allowance: float = 0.0) -> None:
    """`actual` and `plain`, the same operations one by one in PyTorch, are of one dtype; `exact` is float64.

    One ulp is that of the largest exact value: sums of large terms round by it wherever they are small. In float64 both
    are computed alike, and the bound is 64 ulp. `allowance` is for what the hardware is known to do otherwise.
    """
    assert exact.dtype == torch.float64
    assert plain.dtype == actual.dtype
    assert actual.shape == exact.shape
    assert bool(actual.isfinite().all()), "not finite, or not written"
    ulp = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    own = 32 * ulp if actual.dtype == torch.float64 else (plain.double() - exact).abs().max().item()
    error = (actual.double() - exact).abs().max().item()
    assert error <= 2 * own + ulp + allowance, f"error {error:.3g}, PyTorch's own {own:.3g}, one ulp {ulp:.3g}"
