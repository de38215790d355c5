"""From a reference network to the network of the fused runtime: ops in the place of the attention's steps and of
convolutions with what follows them, all maps in channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agln_fast.forking import use_threads
from agln_fast.kernels.separable_conv import separable_conv
from agln_fast.kernels.upsample_taps import upsample_taps
from agln_fast.models.config import ModelConfig
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.models.resnet import BasicBlock, Bottleneck, ResNet
from agln_fast.plan.convolution import FusedConv2d
from agln_fast.plan.mix_before_upsample import MixedConvolution
from agln_fast.plan.network import Concatenation, InferenceNetwork, convolution_from
from agln_fast.plan.plan import FUSED, NOT_MIXED, Plan
from agln_fast.plan.rewrites import rewrite

__all__ = ["fuse", "fused_plan", "kernels"]

_FEWEST_CHANNELS = 128  # of a group of conv5: with fewer the taps cost what the products save


def fuse(model: SegmentationNetwork) -> InferenceNetwork:
    """Make the network for inference that computes the same function, with its attention steps as fused ops.

    It is rewritten as `fused_plan` says. The function never changes: in float64 both networks agree to rounding.

    Args:
        model: a reference network, best in float32: weights are composed before `.half()` or `.to(torch.bfloat16)`
            rounds the result. It is not changed, and shares no memory with the result.

    Returns:
        A network in eval mode, of the model's dtype and device, for inference only: its weights take no gradients.

    Raises:
        ConfigError: not a `SegmentationNetwork`, or an α, β or γ of NaN or Inf.
    """
    use_threads()
    return rewrite(model, fused_plan(model.config) if isinstance(model, SegmentationNetwork) else FUSED)


def fused_plan(model: ModelConfig) -> Plan:
    """`FUSED`, but that conv5 of narrow maps is not mixed."""
    return replace(FUSED, mix_before_upsample=NOT_MIXED) if model.channels < _FEWEST_CHANNELS else FUSED


@torch.no_grad()
def kernels(network: InferenceNetwork) -> InferenceNetwork:
    """Ops in the place of the attention's steps and resizes, and of convolutions with what follows them.

    The last rewrite: no other one takes what it leaves. Exact because each op computes what it stands for, which its
    tests prove, and because a sum of biases may be taken beforehand, and filters of zeros give nothing.
    """
    network = network.copy()
    network.attend("kernels")
    for _, aggregation in network.aggregations():
        if aggregation.theta is None:  # a mean is attention to all pixels alike
            assert aggregation.projection is not None
            weight = aggregation.projection.weight
            aggregation.theta = convolution_from(weight.new_zeros(1, weight.shape[1], 1, 1), None)
    network.set_submodule("encoder", Encoder(network.encoder))
    network.set_submodule("classifier", Classifier(cast(nn.Conv2d, network.classifier)))
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Sequential) and not name.startswith("encoder"):
            network.set_submodule(name, _fused(*(layer for layer in module if not isinstance(layer, nn.Identity))))
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Conv2d):
            network.set_submodule(name, FusedConv2d(module, relu=False))
    return network.eval()


def _fused(*layers: nn.Module) -> nn.Module:
    """Layers that end in a ReLU, as one."""
    match layers:
        case (nn.Conv2d() as convolution, nn.ReLU()):
            return FusedConv2d(convolution, relu=True)
        case (nn.Conv2d() as depthwise, nn.Conv2d() as pointwise, nn.ReLU()):
            return SeparableConv(depthwise, pointwise)
        case (MixedConvolution() as mixed, nn.ReLU()):
            return UpsampledTaps(mixed)
        case (Concatenation() as concatenation, *rest):
            return nn.Sequential(concatenation, _fused(*rest))
    raise AssertionError(layers)


class Classifier(nn.Module):
    """The 1x1 convolution to the classes, (B, C, h, w) -> (B, K, h, w), a view of a map of more channels.

    Filters of zeros make their number a multiple of 8: rows of half precision then begin at multiples of 16 bytes, as
    the tensor cores' convolutions and `label_upsample` need them.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.classes = convolution.out_channels
        more = -self.classes % 8
        weight = F.pad(convolution.weight.detach(), (0, 0, 0, 0, 0, 0, 0, more))
        bias = None if convolution.bias is None else F.pad(convolution.bias.detach(), (0, more))
        self.convolution = convolution_from(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.convolution(x)
        return y.narrow(1, 0, self.classes)


class SeparableConv(nn.Module):
    """Depthwise 3x3, pointwise 1x1, bias, ReLU, the convolution of AGLN-Lite: (B, C, H, W) -> the same."""

    def __init__(self, depthwise: nn.Conv2d, pointwise: nn.Conv2d) -> None:
        super().__init__()
        # In memory the channels come last, as in the map that it filters.
        weight = depthwise.weight.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
        self.depthwise = nn.Parameter(weight, requires_grad=False)
        self.pointwise = pointwise.weight
        assert pointwise.bias is not None
        self.bias = pointwise.bias

    def forward(self, x: Tensor) -> Tensor:
        return separable_conv(x, self.depthwise, self.pointwise, self.bias)


class UpsampledTaps(nn.Module):
    """conv5 and its ReLU: the taps of coarse features (B, C, h_g, w_g) at their own size, then one op for the rest."""

    def __init__(self, mixed: MixedConvolution) -> None:
        """Of `mixed`, all groups of which are in full."""
        super().__init__()
        assert set(mixed.forms) == {"full"}
        assert mixed.direct.bias is not None
        self.direct = convolution_from(mixed.direct.weight, None, (1, 1))
        self.bias = mixed.direct.bias
        shape = mixed.channels, 9, -1, 1, 1  # out, (dy, dx), C
        weights = [cast(nn.Conv2d, layer).weight.view(shape).transpose(0, 1).flatten(0, 1) for layer in mixed.mixed]
        self.taps = nn.ModuleList(convolution_from(weight, None) for weight in weights)

    def forward(self, features: list[Tensor]) -> Tensor:
        *coarse, finest = features
        taps = [layer(x) for layer, x in zip(self.taps, coarse, strict=True)]
        return upsample_taps(self.direct(finest), taps, self.bias)


class Encoder(nn.Module):
    """Image (B, 3, H, W) -> the four stages c1..c4, in channels_last.

    The first convolution takes the colours more than once, to make rows of eight channels, which those of the tensor
    cores need; its filters for the copies are zero.
    """

    def __init__(self, encoder: ResNet) -> None:
        super().__init__()
        stem = [layer for layer in encoder.conv1.modules() if isinstance(layer, nn.Conv2d)]
        stem[0].weight = nn.Parameter(F.pad(stem[0].weight.detach(), (0, 0, 0, 0, 0, 5)), requires_grad=False)
        self.stem = nn.Sequential(*(FusedConv2d(layer, relu=True) for layer in stem))
        stages = encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4
        self.stages = nn.ModuleList(nn.Sequential(*map(ResidualBlock, stage)) for stage in stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x.to(memory_format=torch.channels_last)
        x = torch.cat([x, x, x.narrow(1, 0, 2)], 1)
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        outputs: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class ResidualBlock(nn.Module):
    """relu(convolutions(x) + shortcut(x)): (B, in, H, W) -> (B, out, H/stride, W/stride)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        assert isinstance(block, BasicBlock | Bottleneck)
        convolutions: Sequence[nn.Conv2d] = block.conv1, block.conv2
        if isinstance(block, Bottleneck):
            convolutions = *convolutions, block.conv3
        *first, self.last = (FusedConv2d(layer, relu=True) for layer in convolutions)
        self.first = nn.Sequential(*first)
        shortcut = cast(nn.Sequential | None, block.downsample)
        self.shortcut: FusedConv2d | None = None
        if shortcut is not None:
            # Its bias is added along with the last convolution's, in a launch that is there anyhow.
            convolution = cast(nn.Conv2d, shortcut[0])
            assert self.last.bias is not None
            assert convolution.bias is not None
            self.last.bias = nn.Parameter(self.last.bias + convolution.bias, requires_grad=False)
            convolution.bias = None
            self.shortcut = FusedConv2d(convolution, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.first(x), x if self.shortcut is None else self.shortcut(x))
        return y
