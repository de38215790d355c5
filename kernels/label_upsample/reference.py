"""label_upsample in plain PyTorch: labels = argmax_K(resize(logits)), bilinear."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from agln_fast.decode import axis_scale, labels_dtype

__all__ = ["empty_labels", "label_upsample"]

_STRIP_BYTES = 16 * 2**20  # fastest on CPUs of 64, 16, 8, 4, 2 and 1 MiB: a strip stays in the cache, calls are few
_COPIES = 6  # of a strip that live at once: source rows as they are and widened, two gathered, a product, their sum


def label_upsample(logits: Tensor, size: Sequence[int], *, align_corners: bool = True) -> Tensor:
    """Resize class logits bilinearly to `size` and take the best class of every pixel.

    Equal to `F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners).argmax(1)` up to float32
    rounding, but the (K, H, W) tensor in between never exists: output rows are computed in strips of at most 16 MiB,
    or of one row where that is more. Ties go to the lowest class, as in `torch.argmax`.

    Args:
        logits: (B, K, h, w), float16, bfloat16, float32 or float64, finite; any memory format.
        size: (H, W) of the result, pixels; smaller than (h, w) is allowed.
        align_corners: whether the centres of the outermost pixels meet, or their outer edges.

    Returns:
        (B, H, W) class ids: uint8 for K <= 256, int32 above.

    Raises:
        TypeError: `logits` is no tensor of such a dtype, or `size` is not two integers.
        ValueError: `logits` is not of four dimensions or is empty, or `size` is not positive.
    """
    classes, source_height, source_width = logits.shape[1:]
    height, width = size
    labels = empty_labels(logits, size)
    upper, lower, weight = _rows(source_height, height, align_corners, logits.device)
    row_bytes = _COPIES * 4 * classes * max(width, source_width) * math.ceil(source_height / height)
    strip = max(1, _STRIP_BYTES // row_bytes)
    for image, labels_of_image in zip(logits.detach(), labels, strict=True):
        for start in range(0, height, strip):
            o = slice(start, start + strip)
            first, last = int(upper[o][0]), int(lower[o][-1])
            band = image[:, first : last + 1].float()
            rows = F.interpolate(band, width, mode="linear", align_corners=align_corners)
            w = weight[o]  # [S, 1]
            resized = torch.lerp(rows[:, upper[o] - first], rows[:, lower[o] - first], w)  # [K, S, W]
            labels_of_image[o] = resized.max(0).indices  # on CPUs twice as fast as argmax
    return labels


def empty_labels(logits: Tensor, size: Sequence[int]) -> Tensor:
    """An uninitialised label map for (B, K, h, w) logits: (B, H, W), of the dtype of all labels."""
    batch, classes = logits.shape[:2]
    return torch.empty(batch, *size, dtype=getattr(torch, labels_dtype(classes)), device=logits.device)


def _rows(source: int, target: int, align_corners: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Source rows above and below each target row [H] and the weight of the lower one [H, 1], rounded as in PyTorch."""
    scale = torch.tensor(axis_scale(source, target, align_corners), dtype=torch.float32, device=device)
    shift = 0.0 if align_corners else 0.5
    position = scale * (torch.arange(target, dtype=torch.float32, device=device) + shift) - shift
    upper = position.long().clamp(max=source - 1)
    return upper, (upper + 1).clamp(max=source - 1), (position - upper).clamp(0, 1).unsqueeze(1)
