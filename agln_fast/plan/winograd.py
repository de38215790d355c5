"""3x3 convolutions by Winograd's minimal filtering: a quarter of the multiply-adds, in fp32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agln_fast.errors import ConfigError
from agln_fast.plan.network import InferenceNetwork
from agln_fast.plan.plan import STAGES

__all__ = ["WinogradConv2d", "winograd"]

_FINEST = 4  # the finest stage is 1/4 of the image, the next one 1/8, …
_TILE, _TAPS = 4, 3
_MOST_STRIPS = 16  # of a layer: each one is a dozen nodes of the graph
_STRIP = 128  # tiles done together: what lies between the products of 256 channels fits the cache
_POINTS = 0.0, math.sqrt(0.5), -math.sqrt(0.5), math.sqrt(2), -math.sqrt(2)

_Matrix = npt.NDArray[np.float64]


def _toom_cook(points: Sequence[float]) -> tuple[_Matrix, _Matrix, _Matrix]:
    """Aᵀ (4, 6), G (6, 3), Bᵀ (6, 6) of y = Aᵀ (G g ⊙ Bᵀ d), y being four outputs of the taps g on six inputs d.

    Multiplication of polynomials by their values at five points and at infinity (Toom and Cook), transposed.
    """
    values = np.array(points)
    others = [np.delete(values, i) for i in range(len(points))]
    scale = np.array([np.prod(point - rest) for point, rest in zip(values, others, strict=True)])
    a = np.column_stack([np.vander(values, _TILE, increasing=True).T, np.eye(_TILE)[-1]])
    g = np.vstack([np.vander(values, _TAPS, increasing=True) / scale[:, None], np.eye(_TAPS)[-1]])
    b = np.vstack([*(np.append(np.poly(rest)[::-1], 0) for rest in others), np.poly(values)[::-1]])
    return a, g, b


class WinogradConv2d(nn.Module):
    """A 3x3 convolution with stride 1 and padding 1, as F(4x4, 3x3): (B, C, H, W) -> (B, out, H, W).

    Tiles of 6x6 inputs, which overlap by two, become 4x4 outputs by 36 products for each pair of channels, where the
    sum of taps has 144. All products of one place in the tile are one matrix product over the channels. The sums
    before and after are products with small constant matrices, of maps whose channels are adjacent.

    Source: A. Lavin, S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016. Points of evaluation
    are 0, ±√½, ±√2 and infinity, which halve the error of the usual 0, ±1, ±2.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        weight = convolution.weight.detach()
        a, g, b = (torch.from_numpy(matrix) for matrix in _toom_cook(_POINTS))
        out, channels = weight.shape[:2]
        taps = weight.double().permute(2, 3, 1, 0).reshape(_TAPS**2, -1)
        transformed = (torch.kron(g, g).to(weight.device) @ taps).to(weight.dtype).view(-1, channels, out)
        self.weight = nn.Parameter(transformed, requires_grad=False)  # (36, C, out)
        self.bias = convolution.bias
        self.a, self.b = nn.Buffer(a.to(weight)), nn.Buffer(b.to(weight))  # (4, 6), (6, 6)

    def forward(self, x: Tensor) -> Tensor:
        channels, height, width = x.shape[1:]
        rows, columns = -(-height // _TILE), -(-width // _TILE)  # of tiles
        # One more row and column of tiles than needed: a tile ends with the first two pixels of the next.
        right, below = _TILE * (columns + 1) - width - 1, _TILE * (rows + 1) - height - 1
        x = F.pad(x, (1, right, 1, below)).permute(0, 2, 3, 1)
        x = x.reshape(-1, rows + 1, _TILE, (columns + 1) * _TILE * channels)
        strip = max(1, _STRIP // columns, -(-rows // _MOST_STRIPS))
        y = torch.cat([self._strip(x[:, first : first + strip + 1], columns) for first in range(0, rows, strip)], 1)
        y = y[:, :height, :width]
        return (y if self.bias is None else y + self.bias).permute(0, 3, 1, 2)

    def _strip(self, x: Tensor, columns: int) -> Tensor:
        """Rows of tiles and the one below, (B, rows + 1, 4, (columns + 1)·4·C) -> (B, 4·rows, 4·columns, out)."""
        side, channels, out = len(self.b), *self.weight.shape[1:]
        rows = x.shape[1] - 1
        x = self.b @ torch.cat([x[:, :-1], x[:, 1:, :2]], 2)
        x = x.reshape(-1, columns + 1, _TILE, channels)
        x = self.b @ torch.cat([x[:, :-1], x[:, 1:, :2]], 2)
        x = x.reshape(-1, side, columns, side, channels).permute(1, 3, 0, 2, 4)  # [6, 6, B·rows, columns, C]
        y = x.reshape(side**2, -1, channels) @ self.weight
        y = self.a @ y.reshape(side, -1)
        y = self.a @ y.reshape(_TILE, side, -1).transpose(0, 1).reshape(side, -1)
        y = y.reshape(_TILE, _TILE, -1, columns, out).permute(2, 1, 3, 0, 4)  # [B·rows, 4, columns, 4, out]
        return y.reshape(-1, rows * _TILE, columns * _TILE, out)


def winograd(network: InferenceNetwork, stages: int, *, fewest_channels: int = 128) -> InferenceNetwork:
    """Every dense 3x3 convolution of stride 1 in the `stages` finest stages, 1/4, 1/8, …, as `WinogradConv2d`.

    Exact because both compute the same product of polynomials: in rational arithmetic, the identity of Toom and Cook.
    In floating point its sums are about five times as inexact as those of the plain form, which is nothing in fp32, and
    too much in bf16. Coarse stages have few tiles, for which weights of four times the size must be read.

    Args:
        stages: 0 to 4.
        fewest_channels: of the input; with fewer the transforms cost what the products save.

    Raises:
        ConfigError: there is no such number of stages.
    """
    if type(stages) is not int or not 0 <= stages <= STAGES:
        raise ConfigError(f"winograd {stages!r}: give a number of stages, 0 to {STAGES}")
    rewritten = network.copy()
    wanted = [_FINEST * 2**stage for stage in range(stages)]
    changed = False
    for name, reduction in _reductions(network).items():
        layer = rewritten.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        if reduction in wanted and layer.in_channels >= fewest_channels:
            rewritten.set_submodule(name, WinogradConv2d(layer))
            changed = True
    return rewritten if changed else network


def _reductions(network: InferenceNetwork) -> dict[str, int]:
    """Name of each convolution that `WinogradConv2d` can do -> height of the image over that of the map."""
    found: dict[str, int] = {}
    side = 256
    shadow = network.copy().to("meta", torch.float32)
    for name, module in shadow.named_modules():
        if isinstance(module, nn.Conv2d) and _suits(module):

            def note(_: nn.Module, __: object, output: Tensor, name: str = name) -> None:
                found[name] = side // output.shape[2]

            module.register_forward_hook(note)
    with torch.no_grad():
        shadow.logits(torch.empty(1, 3, side, side, device="meta"))
    return found


def _suits(layer: nn.Conv2d) -> bool:
    shape = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    plain = layer.groups == 1 and layer.padding_mode == "zeros"
    return plain and shape == ((_TAPS, _TAPS), (1, 1), (1, 1), (1, 1))
