"""label_upsample in plain PyTorch: labels = argmax_K(resize(logits)), bilinear with align_corners=True."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["label_upsample"]

_STRIP_BYTES = 64 * 2**20
_COPIES = 6  # of a strip that live at once: source rows as they are and widened, two gathered, a product, their sum


def label_upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize class logits bilinearly (align_corners=True) to `size` and take the best class of every pixel.

    Equal to `F.interpolate(logits.float(), size, mode="bilinear", align_corners=True).argmax(1)` up to float32
    rounding, but the (K, H, W) tensor in between never exists: output rows are computed in strips of at most 64 MiB,
    or of one row where that is more. Ties go to the lowest class, as in `torch.argmax`.

    Args:
        logits: (B, K, h, w), floating-point, finite; any memory format.
        size: (H, W) of the result, pixels; smaller than (h, w) is allowed.

    Returns:
        (B, H, W) class ids: uint8 for K <= 256, int16 for K <= 32767, int32 above.

    Raises:
        TypeError: `logits` is no floating-point tensor, or `size` is not two integers.
        ValueError: `logits` is not of four dimensions or is empty, or `size` is not positive.
    """
    _check(logits, size)
    batch, classes, source_height, source_width = logits.shape
    height, width = size
    dtype = torch.uint8 if classes <= 256 else torch.int16 if classes <= 32767 else torch.int32
    labels = torch.empty(batch, height, width, dtype=dtype, device=logits.device)
    upper, lower, weight = _rows(source_height, height, logits.device)
    row_bytes = _COPIES * 4 * classes * max(width, source_width) * math.ceil(source_height / height)
    strip = max(1, _STRIP_BYTES // row_bytes)
    for image, labels_of_image in zip(logits.detach(), labels, strict=True):
        for start in range(0, height, strip):
            o = slice(start, start + strip)
            first, last = int(upper[o][0]), int(lower[o][-1])
            rows = F.interpolate(image[:, first : last + 1].float(), width, mode="linear", align_corners=True)
            w = weight[o]  # [S, 1]
            resized = rows[:, upper[o] - first] * (1 - w) + rows[:, lower[o] - first] * w  # [K, S, W]
            labels_of_image[o] = resized.argmax(0)
    return labels


def _rows(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Source rows above and below each target row [H] and the weight of the lower one [H, 1], rounded as in PyTorch."""
    scale = torch.tensor((source - 1) / max(1, target - 1), dtype=torch.float32, device=device)
    position = scale * torch.arange(target, dtype=torch.float32, device=device)
    upper = position.long().clamp(max=source - 1)
    return upper, (upper + 1).clamp(max=source - 1), (position - upper).clamp(0, 1).unsqueeze(1)


def _check(logits: Tensor, size: tuple[int, int]) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        came = logits.dtype if isinstance(logits, Tensor) else type(logits).__name__
        raise TypeError(f"logits: needs a floating-point tensor, got {came}")
    if logits.ndim != 4 or logits.numel() == 0:
        raise ValueError(f"logits: needs shape (B, K, h, w), none of them 0, got {tuple(logits.shape)}")
    if not (isinstance(size, tuple) and len(size) == 2 and all(isinstance(side, int) for side in size)):
        raise TypeError(f"size: needs two integers (H, W), got {size!r}")
    if min(size) < 1:
        raise ValueError(f"size: needs H and W of at least 1, got {size}")
