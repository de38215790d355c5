"""Test-time augmentation: an image at several scales, and mirrored, the probabilities averaged."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import Image

from agln_fast.contract import IOContract
from agln_fast.errors import ConfigError
from agln_fast.runtime.images import ImageArray
from agln_fast.runtime.scores import Scores, resized, softmax
from agln_fast.runtime.sliding import Run, slide

__all__ = ["TestTimeAugmentation", "multiscale"]


@dataclass(frozen=True)
class TestTimeAugmentation:
    """Multi-scale testing as in PyTorch-Encoding (`MultiEvalModule`), whose settings are the paper's.

    scales: at scale s the longer side of the image becomes ceil(base_size * s) pixels, the ratio kept.
    flip: whether the mirrored image is seen, too.
    base_size: pixels; None for 520/480 of the longer side of the engine's window: the paper has base 520, crop 480.

    Raises:
        ConfigError: no scale, or a scale or base that is not above 0.
    """

    __test__: ClassVar[bool] = False  # pytest would take the name for that of a test

    scales: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
    flip: bool = True
    base_size: int | None = None

    def __post_init__(self) -> None:
        if not self.scales or not all(0 < scale < math.inf for scale in self.scales):
            raise ConfigError(f"scales {', '.join(map(str, self.scales)) or '(none)'}: needs numbers above 0")
        if self.base_size is not None and self.base_size < 1:
            raise ConfigError(f"base size {self.base_size}: must be at least 1 pixel")

    def sizes(self, height: int, width: int, contract: IOContract) -> list[tuple[int, int]]:
        """(height, width) at each scale, pixels, of an image of height x width."""
        base = self.base_size or round(max(contract.height, contract.width) * 520 / 480)
        short, long = sorted((height, width))
        longer = [math.ceil(base * scale) for scale in self.scales]
        shorter = [max(1, (2 * side * short + long) // (2 * long)) for side in longer]  # rounded, half up
        return list(zip(longer, shorter, strict=True) if height > width else zip(shorter, longer, strict=True))


def multiscale(run: Run, image: ImageArray, contract: IOContract, tta: TestTimeAugmentation) -> Scores:
    """Mean class probabilities (K, H, W) float32 of `image` (H, W, 3) over the scales of `tta`, and over flips.

    At each scale the image is resized (bilinear, antialiased where it shrinks, as training does), windows of the
    contract's size slide over it (`slide`), and the mean of their logits is brought to H x W (bilinear,
    align_corners=True). The softmax is taken there, for the image and its mirror image apart, and the probabilities
    are averaged, as mmsegmentation does; PyTorch-Encoding sums exp(logits + mirrored logits), in which one confident
    scale outweighs all others.

    One array (K, H, W) and the logits of one scale are held at a time.
    """
    height, width = image.shape[:2]
    total: Scores | None = None
    for size in tta.sizes(height, width, contract):
        scaled = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        for logits in np.concatenate(list(slide(run, scaled, contract, flip=tta.flip)), 2):
            if total is None:
                total = np.zeros((len(logits), height, width), np.float32)
            top = 0
            for strip in resized(logits, (height, width)):
                total[:, top : top + strip.shape[1]] += softmax(strip)
                top += strip.shape[1]
    assert total is not None, "there is at least one scale"
    total /= len(tta.scales) * (1 + tta.flip)
    return total
