"""The paper's augmentation (section IV-A): random scale, left-right flip, random crop."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from agln_fast.data.dataset import IGNORE_INDEX, Sample
from agln_fast.errors import ConfigError

__all__ = ["Augmentation"]


@dataclass(frozen=True)
class Augmentation:
    """Sample (H, W) -> sample (crop, crop).

    crop: side of the square that is cut out, pixels.
    base_size: what the longer side of the image is scaled to at scale 1, pixels; the paper's 480 is cut out of 520.
    scale: the range, uniform; images bilinear and antialiased, labels nearest.
    fill: RGB 0..255 where the scaled image is smaller than the crop; labels are IGNORE_INDEX there.
    """

    crop: int = 480
    base_size: int = 520
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    fill: tuple[int, int, int] = (124, 116, 104)

    def __post_init__(self) -> None:
        low, high = self.scale
        if not (self.crop >= 32 and self.base_size >= 32 and 0 < low <= high < 100 and 0 <= self.flip <= 1):
            raise ConfigError(
                f"crop {self.crop}, base size {self.base_size}, scale {low} to {high}, flip {self.flip}: crop and base "
                "size must be at least 32, scales above 0 and rising, flip from 0 to 1"
            )

    def __call__(self, sample: Sample, random: np.random.Generator) -> Sample:
        factor = random.uniform(*self.scale) * self.base_size / max(sample.labels.shape)
        height, width = (max(1, round(side * factor)) for side in sample.labels.shape)
        # Cut before scaling: what the crop does not show need not be scaled.
        top = random.uniform(0, max(0, height - self.crop)) if height > self.crop else 0.0
        left = random.uniform(0, max(0, width - self.crop)) if width > self.crop else 0.0
        rows, columns = min(height, self.crop), min(width, self.crop)
        box = (left / factor, top / factor, (left + columns) / factor, (top + rows) / factor)
        limits = (sample.labels.shape[1], sample.labels.shape[0])
        box = (box[0], box[1], min(box[2], limits[0]), min(box[3], limits[1]))
        scaled = Image.fromarray(sample.image).resize((columns, rows), Image.Resampling.BILINEAR, box)
        labelled = Image.fromarray(sample.labels).resize((columns, rows), Image.Resampling.NEAREST, box)
        if random.random() < self.flip:
            scaled = scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            labelled = labelled.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = np.empty((self.crop, self.crop, 3), np.uint8)
        image[:] = self.fill
        labels = np.full((self.crop, self.crop), IGNORE_INDEX, np.uint8)
        image[:rows, :columns], labels[:rows, :columns] = np.asarray(scaled), np.asarray(labelled)
        return Sample(image, labels, sample.name)
