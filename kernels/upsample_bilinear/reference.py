"""upsample_bilinear in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from agln_fast.kernels.layout import empty_maps, wide

__all__ = ["upsample_bilinear"]


def upsample_bilinear(x: Tensor, size: Sequence[int], *, align_corners: bool = True) -> Tensor:
    """Resize a map bilinearly: pixel (i, j) is x at (i (h-1)/(H-1), j (w-1)/(W-1)) with aligned corners, otherwise at
    ((i + ½) h/H - ½, (j + ½) w/W - ½), or at the border where that is beyond it.

    Sums are float32 (float64 for float64), and are rounded once. On CUDA it is fastest for channels_last maps, for
    which PyTorch's own takes several times as long.

    Args:
        x: (B, C, h, w), float16, bfloat16, float32 or float64; any memory format.
        size: (H, W) of the result, pixels; smaller than (h, w) is allowed.
        align_corners: whether the centres of the outermost pixels meet, or their outer edges.

    Returns:
        (B, C, H, W), of x's dtype; channels_last where x's channels are next to each other, else contiguous.

    Raises:
        TypeError: `x` is no tensor of such a dtype, or `size` is not two integers.
        ValueError: `x` is not of four dimensions or is empty, or `size` is not positive.
    """
    y = F.interpolate(wide(x), tuple(size), mode="bilinear", align_corners=align_corners)
    return empty_maps(x, size=size).copy_(y)
