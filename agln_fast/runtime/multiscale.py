"""Test-time augmentation: an image at several scales, and mirrored, the probabilities averaged."""

from __future__ import annotations

import numpy as np
from PIL import Image

from agln_fast.contract import IOContract
from agln_fast.runtime.augmentation import TestTimeAugmentation
from agln_fast.runtime.images import ImageArray
from agln_fast.runtime.scores import Scores, joined, resized, softmax, zeros
from agln_fast.runtime.sliding import Run, slide

__all__ = ["multiscale"]


def multiscale(
    run: Run, image: ImageArray, contract: IOContract, tta: TestTimeAugmentation, *, align_corners: bool = True
) -> Scores:
    """Mean class probabilities (K, H, W) float32 of `image` (H, W, 3) over the scales of `tta`, and over flips.

    At each scale the image is resized (bilinear, antialiased where it shrinks, as training does), windows of the
    contract's size slide over it (`slide`), and the mean of their logits is brought to H x W (bilinear, as the network
    itself resizes). The softmax is taken there, for the image and its mirror image apart, and the probabilities
    are averaged, as mmsegmentation does; PyTorch-Encoding sums exp(logits + mirrored logits), in which one confident
    scale outweighs all others.

    One array (K, H, W) and the logits of one scale are held at a time, where the engine's logits lie.
    """
    height, width = image.shape[:2]
    total: Scores = None
    for size in tta.sizes(height, width, contract):
        scaled = np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
        for logits in joined(list(slide(run, scaled, contract, flip=tta.flip)), 2):
            if total is None:
                total = zeros((len(logits), height, width), logits)
            top = 0
            for strip in resized(logits, (height, width), align_corners=align_corners):
                total[:, top : top + strip.shape[1]] += softmax(strip)
                top += strip.shape[1]
    assert total is not None, "there is at least one scale"
    total /= len(tta.scales) * (1 + tta.flip)
    return total
