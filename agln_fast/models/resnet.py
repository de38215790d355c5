"""The encoder: ResNet (He et al., 2016) with torchvision's parameter names, so that its ImageNet weights load.

Differences from torchvision, all optional: a deep stem of three 3x3 convolutions, a width factor, and dilation (stages
3 and 4 keep the resolution of stage 2, for FCN). The first block of a dilated stage has the dilation of the stage
before, as torchvision's with `replace_stride_with_dilation` and MMSegmentation's with `contract_dilation`.
"""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from agln_fast.models.config import Encoder

__all__ = ["BasicBlock", "Bottleneck", "ResNet"]


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (B, in, H, W) -> (B, planes, H/stride, W/stride)."""

    expansion: ClassVar[int] = 1

    def __init__(
        self, in_channels: int, planes: int, stride: int, dilations: tuple[int, int], shortcut: nn.Module | None
    ) -> None:
        super().__init__()
        first, second = dilations
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, first, first, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, second, second, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride), 1x1 and a shortcut: (B, in, H, W) -> (B, 4 * planes, H/stride, W/stride)."""

    expansion: ClassVar[int] = 4

    def __init__(
        self, in_channels: int, planes: int, stride: int, dilations: tuple[int, int], shortcut: nn.Module | None
    ) -> None:
        super().__init__()
        first, _ = dilations  # a bottleneck has one spatial convolution
        self.conv1 = nn.Conv2d(in_channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, first, first, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.downsample = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


_BLOCKS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(nn.Module):
    """Image (B, 3, H, W) -> the four stages c1..c4 at 1/4, 1/8, 1/16, 1/32 (dilated: 1/4, 1/8, 1/8, 1/8).

    `stage_channels` are their channels: 256, 512, 1024, 2048 for ResNet-50 and -101 at width 1.
    """

    def __init__(self, encoder: Encoder, *, width: float = 1.0, dilated: bool = False) -> None:
        super().__init__()
        block, depths = _BLOCKS[encoder.rstrip("sc")]
        planes = [max(1, round(width * p)) for p in (64, 128, 256, 512)]
        if encoder.endswith(("s", "c")):
            channels = 2 * planes[0] if encoder.endswith("s") else planes[0]
            half = max(1, channels // 2)
            self.conv1: nn.Module = nn.Sequential(
                nn.Conv2d(3, half, 3, 2, 1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(),
                nn.Conv2d(half, half, 3, 1, 1, bias=False),
                nn.BatchNorm2d(half),
                nn.ReLU(),
                nn.Conv2d(half, channels, 3, 1, 1, bias=False),
            )
        else:
            channels = planes[0]
            self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)

        stages: list[nn.Sequential] = []
        for i_stage, (plane, depth) in enumerate(zip(planes, depths, strict=True)):
            stride, dilation, first_dilation = (1 if i_stage == 0 else 2), 1, 1
            if dilated and i_stage >= 2:
                stride, dilation, first_dilation = 1, 2 ** (i_stage - 1), 2 ** (i_stage - 2)
            blocks: list[nn.Module] = []
            for i_block in range(depth):
                if i_block > 0:
                    stride, first_dilation = 1, dilation
                shortcut = None
                if stride != 1 or channels != plane * block.expansion:
                    shortcut = nn.Sequential(
                        nn.Conv2d(channels, plane * block.expansion, 1, stride, bias=False),
                        nn.BatchNorm2d(plane * block.expansion),
                    )
                blocks.append(block(channels, plane, stride, (first_dilation, dilation), shortcut))
                channels = plane * block.expansion
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.stage_channels = tuple(plane * block.expansion for plane in planes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        c1 = self.layer1(x)
        c2 = self.layer2(c1)
        c3 = self.layer3(c2)
        return c1, c2, c3, self.layer4(c3)
