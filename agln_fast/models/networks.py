"""The whole networks: encoder, decoder, classifier (Fig. 2b and Fig. 4)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from agln_fast.data.classes import ClassSet
from agln_fast.errors import ConfigError
from agln_fast.models.blocks import (
    AveragePoolingBlock,
    ContextFusionBlock,
    SemanticAggregationBlock,
    conv_bn_relu,
    resize,
)
from agln_fast.models.config import ModelConfig, preset
from agln_fast.models.resnet import ResNet

__all__ = ["AGLNDecoder", "FCNDecoder", "FPNDecoder", "SegmentationNetwork", "check_image", "create_model"]


class FCNDecoder(nn.Module):
    """What MMSegmentation's `FCNHead` has before its last 3x3 convolution: c4 (B, C4, H/8, W/8), and two 3x3
    convolutions of it to 2C channels, concatenated: (B, C4 + 2C, H/8, W/8).
    """

    def __init__(self, in_channels: int, config: ModelConfig) -> None:
        super().__init__()
        hidden = 2 * config.channels
        self.convs = nn.ModuleList(conv_bn_relu(channels, hidden, 3) for channels in (in_channels, hidden))
        self.out_channels = in_channels + hidden

    def forward(self, *stages: Tensor) -> Tensor:
        return torch.cat(self.features(*stages), 1)

    def features(self, *stages: Tensor) -> list[Tensor]:
        """The two that `forward` concatenates."""
        c4 = y = stages[-1]
        for convolution in self.convs:
            y = convolution(y)
        return [c4, y]


class FPNDecoder(nn.Module):
    """Feature Pyramid Network, the baseline: stages c1..c4 -> (B, 4C, H/4, W/4), coarse to fine.

    The lists run from the coarsest level (1/16, of c3) to the finest (1/4, of c1).
    """

    def __init__(self, stage_channels: tuple[int, ...], config: ModelConfig) -> None:
        super().__init__()
        channels = config.channels
        *laterals, coarsest = stage_channels
        self.reduce = conv_bn_relu(coarsest, channels, 3)
        self.lateral = nn.ModuleList(conv_bn_relu(c, channels, 1) for c in reversed(laterals))
        self.smooth = nn.ModuleList(conv_bn_relu(channels, channels, 3) for _ in laterals)

    def forward(self, c1: Tensor, c2: Tensor, c3: Tensor, c4: Tensor) -> Tensor:
        d = self.reduce(c4)
        outputs = [d]
        descriptors: list[Tensor] = []
        for level, c in enumerate((c3, c2, c1)):
            d = self.merge(level, d, self.lateral[level](c), descriptors)
            outputs.append(self.smooth[level](d))
        return torch.cat([resize(output, c1.shape) for output in outputs], 1)

    def merge(self, level: int, d: Tensor, b: Tensor, descriptors: list[Tensor]) -> Tensor:
        """d (B, C, h, w) of the level before and the lateral feature b (B, C, H, W) -> d of this level (B, C, H, W)."""
        return resize(d, b.shape) + b


class AGLNDecoder(FPNDecoder):
    """The decoder of AGLN, straight (Fig. 4a) or dense (Fig. 4b): Context Fusion Blocks in the place of the sum.

    `sab[i]` reads the feature before level i; `cfb[i][j]` distributes the descriptors of `sab[j]` at level i.
    """

    def __init__(self, stage_channels: tuple[int, ...], config: ModelConfig) -> None:
        super().__init__(stage_channels, config)
        assert config.num_descriptors is not None
        levels = len(self.lateral)
        dense = config.decoder == "dense"

        def aggregation() -> nn.Module:
            if config.pooling == "average":
                return AveragePoolingBlock(config.channels)
            assert config.num_descriptors is not None
            return SemanticAggregationBlock(config.channels, config.num_descriptors)

        self.sab = nn.ModuleList(aggregation() for _ in range(levels if dense else 1))
        self.cfb = nn.ModuleList(
            nn.ModuleList(ContextFusionBlock(config) for _ in range(level + 1 if dense else 1))
            for level in range(levels)
        )

    def merge(self, level: int, d: Tensor, b: Tensor, descriptors: list[Tensor]) -> Tensor:
        if level < len(self.sab):
            descriptors.append(self.sab[level](d))
        a = resize(d, b.shape)
        for j, block in enumerate(cast(nn.ModuleList, self.cfb[level])):
            a = block(a, b, descriptors[j])
        return a


def check_image(x: Tensor) -> None:
    """Refuse what no network of the family takes.

    Raises:
        ConfigError: `x` is not (B, 3, H, W) with H, W >= 32.
    """
    if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] < 32 or x.shape[3] < 32:
        raise ConfigError(f"input of shape {tuple(x.shape)}: needs (batch, 3, height >= 32, width >= 32)")


class SegmentationNetwork(nn.Module):
    """A network of the family: normalised image (B, 3, H, W) -> logits (B, K, H, W), for any H, W >= 32.

    class_set: names and colours of the K classes, where its training or its checkpoint told; else None.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.class_set: ClassSet | None = None
        self.encoder = ResNet(config.encoder, width=config.width, dilated=config.architecture in ("fcn8s", "fcn"))
        self.decoder: FPNDecoder | FCNDecoder | None = None
        features = self.encoder.stage_channels[-1]
        if config.concat_input:
            self.decoder = FCNDecoder(features, config)
            features = self.decoder.out_channels
        elif config.architecture in ("fpn", "agln"):
            decoder = FPNDecoder if config.architecture == "fpn" else AGLNDecoder
            self.decoder = decoder(self.encoder.stage_channels, config)
            features = 4 * config.channels
        hidden = 2 * config.channels
        self.classifier = nn.Sequential(
            *conv_bn_relu(features, hidden, 3), nn.Dropout(0.1), nn.Conv2d(hidden, config.num_classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        stages = self.encoder(x)
        features = stages[-1] if self.decoder is None else self.decoder(*stages)
        return resize(self.classifier(features), x.shape, self.config.align_corners)


def create_model(name: str, num_classes: int, **overrides: Any) -> SegmentationNetwork:
    """Create a network with fresh random weights, in training mode.

    Args:
        name: a preset, e.g. "agln_resnet101s" (`list_models` names them all).
        num_classes: K.
        overrides: fields of `ModelConfig` to set otherwise than the preset does.

    Raises:
        ConfigError: an unknown name or field (with the closest known ones), or an impossible value.
    """
    return SegmentationNetwork(preset(name, num_classes, **overrides))
