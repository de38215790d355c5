"""upsample_taps in plain PyTorch: resize (bilinear, align_corners=True), shift and sum as two matrix products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agln_fast.kernels.layout import empty_maps, wide
from agln_fast.kernels.matrices import shifted_upsample_matrix

__all__ = ["upsample_taps"]


def upsample_taps(base: Tensor, taps: Sequence[Tensor], bias: Tensor) -> Tensor:
    """The rest of a 3x3 convolution whose coarse inputs were mixed before they are upsampled, with bias and ReLU.

    A 3x3 convolution with zero padding of 1 over maps that are resized to (H, W) and concatenated is linear, and a
    resize commutes with the sum over channels. So each coarse map can go through all nine taps at its own resolution,
    as a 1x1 convolution of 9C outputs, and what is resized is the result:

        y = relu(base + bias + Σ_g Σ_t shift_t(resize(taps_g[:, tC:(t+1)C])))

    Tap t = 3(dy + 1) + dx + 1, with dy and dx of -1, 0, 1, is the kernel's element [dy + 1, dx + 1]: shift_t takes
    pixel (y, x) from (y + dy, x + dx), zero outside the target. `base` is the convolution of the finest map.

    Sums are float32 (float64 for float64), and no resized map is rounded to half precision. On CUDA maps are read
    fastest where they are channels_last.

    Args:
        base: (B, C, H, W), float16, bfloat16, float32 or float64; any memory format.
        taps: one or more maps (B, 9C, h, w), each of its own size, of the same dtype and device; any memory format.
        bias: (C,), of the same dtype and device.

    Returns:
        (B, C, H, W), of base's dtype; channels_last where base's channels are next to each other, else contiguous.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, dtype, shape or device.
    """
    height, width = base.shape[2:]
    columns, rows = [], []
    for coarse in taps:
        h, w = coarse.shape[2:]
        x = wide(coarse).reshape(len(coarse), 3, 3, -1, h, w)  # dy, dx, C
        x = x.permute(0, 3, 1, 4, 2, 5).reshape(*base.shape[:2], 3 * h, 3 * w)
        columns.append(x @ shifted_upsample_matrix(w, width, x).T)  # (B, C, 3h, W)
        rows.append(shifted_upsample_matrix(h, height, x))
    y = torch.cat(rows, 1) @ torch.cat(columns, 2) + wide(base) + wide(bias).view(-1, 1, 1)
    return empty_maps(base).copy_(y.relu_())
