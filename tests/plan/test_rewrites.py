"""Every rewrite equals the reference in float64, alone and with all others, for every variant of the network."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from variants import EVERYTHING, SWITCHES, VARIANTS, network

from agln_fast.errors import ConfigError
from agln_fast.kernels.matrices import upsample_matrix
from agln_fast.models.blocks import resize
from agln_fast.models.networks import SegmentationNetwork, create_model
from agln_fast.plan import rewrites
from agln_fast.plan.mix_before_upsample import MixedConvolution, mix_before_upsample
from agln_fast.plan.network import InferenceNetwork
from agln_fast.plan.plan import ALGEBRA, NO_PLAN, MixForm, Plan
from agln_fast.plan.rewrites import fold_batchnorm, pool_before_projection, rewrite
from agln_fast.plan.winograd import WinogradConv2d, winograd


def assert_same(model: SegmentationNetwork, planned: InferenceNetwork, image: Tensor) -> None:
    """To 1e-10 of how the logits vary over the image, which a large bias could hide."""
    with torch.no_grad():
        expected, actual = model(image), planned(image)
    spread = expected.std((2, 3)).mean()
    assert spread > 1e-3
    assert (actual - expected).abs().max() < 1e-10 * spread


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 77, 101, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("plan", [NO_PLAN, ALGEBRA, EVERYTHING], ids=["none", "algebra", "everything"])
def test_a_plan_changes_no_logits(variant: str, plan: Plan, image: Tensor) -> None:
    model = network(variant)
    assert_same(model, rewrite(model, plan), image)


@pytest.mark.parametrize("variant", ["fcn of mmseg", "paper", "release", "average pooling"])
@pytest.mark.parametrize("name", SWITCHES)
def test_each_rewrite_alone(variant: str, name: str, image: Tensor) -> None:
    model = network(variant)
    assert_same(model, rewrite(model, replace(NO_PLAN, **{name: True})), image)


@pytest.mark.parametrize("left_out", SWITCHES)
def test_each_rewrite_can_be_left_out(left_out: str, image: Tensor) -> None:
    forms = ("none", "none", "none") if left_out == "fold_batchnorm" else EVERYTHING.mix_before_upsample
    model = network("release")
    plan = replace(EVERYTHING, mix_before_upsample=forms, **{left_out: False})
    assert_same(model, rewrite(model, plan), image)


@pytest.mark.parametrize("zeros", [("alpha",), ("gamma",), ("beta",), ("alpha", "gamma"), ("alpha", "beta", "gamma")])
@pytest.mark.parametrize("variant", ["paper", "release"])
def test_branches_of_zero_are_dropped(variant: str, zeros: tuple[str, ...], image: Tensor) -> None:
    model = network(variant, zeros)
    assert_same(model, rewrite(model, EVERYTHING), image)


@pytest.mark.parametrize(
    ("zeros", "gone"),
    [(("gamma",), ["resampled"]), (("beta",), ["resampled"]), (("alpha", "gamma"), ["resampled", "distribution"])],
    ids=lambda value: " ".join(value),
)
def test_dropped_branches_are_not_computed(zeros: tuple[str, ...], gone: list[str], image: Tensor) -> None:
    plain, planned = (rewrite(network("release", zeros), Plan(drop_dead_branches=drop)) for drop in (False, True))
    assert _called(plain, image) >= set(gone)
    assert not _called(planned, image) & set(gone)


def _called(planned: InferenceNetwork, image: Tensor) -> set[str]:
    calls: set[str] = set()
    for fusion in planned.fusions():
        fusion.distribution.register_forward_hook(lambda *_: calls.add("distribution"))
        resampled = fusion.resampled

        def note(*arguments: Tensor | None, resampled: Callable[..., Tensor] = resampled) -> Tensor:
            calls.add("resampled")
            return resampled(*arguments)

        fusion.resampled = note  # type: ignore[method-assign, assignment]
    planned(image)
    return calls


def test_rewrites_commute() -> None:
    """Each in first place, then the others; mixing comes last, because it splits the folded convolution."""
    model, x = network("release"), torch.randn(1, 3, 65, 39, dtype=torch.float64)
    steps = [getattr(rewrites, name) for name in SWITCHES]
    for first in range(len(steps)):
        planned = InferenceNetwork(model)
        for step in (*steps[first:], *steps[:first]):
            planned = step(planned)
        assert_same(model, mix_before_upsample(planned, ("rows", "full", "rows")), x)


def test_rewrites_leave_their_argument_alone(image: Tensor) -> None:
    model = network("release")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    planned = InferenceNetwork(model)
    expected = planned(image)
    pool_before_projection(planned)
    rewrite(model, EVERYTHING)
    assert torch.equal(planned(image), expected)
    assert all(aggregation.phi is not None for _, aggregation in planned.aggregations())
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_less_is_computed() -> None:
    """Multiply-adds of what a rewrite is there for, at the size where they can be counted by hand."""
    model, x = network("release"), torch.randn(1, 3, 128, 128, dtype=torch.float64)

    def flops(plan: Plan) -> int:
        with FlopCounterMode(display=False) as counter:
            rewrite(model, plan)(x)
        return counter.get_total_flops()

    channels, descriptors = 16, model.config.num_descriptors
    assert descriptors is not None
    base = flops(Plan(fold_batchnorm=True))
    sab = {4: 1, 8: 1, 16: 1}  # side of the map that each SAB reads -> 1
    pooled = 2 * channels**2 * sum(side**2 - descriptors for side in sab)
    assert base - flops(Plan(fold_batchnorm=True, pool_before_projection=True)) == pooled
    cfb = {8: 1, 16: 2, 32: 3}  # side of the level -> CFBs
    projected = 2 * channels**2 * sum(count * (side**2 - descriptors) for side, count in cfb.items())
    assert base - flops(Plan(fold_batchnorm=True, project_descriptors=True)) == projected
    resized = 2 * channels * descriptors * sum(side**2 - (side // 2) ** 2 for side in cfb)
    assert base - flops(Plan(fold_batchnorm=True, distribute_before_upsample=True)) == resized
    hidden = 2 * channels
    direct = 2 * 9 * hidden * channels * 32**2
    full = 2 * (9 * hidden * channels * 4**2 + hidden * (3 * 4) ** 2 * 32 + hidden * 3 * 4 * 32**2)
    assert base - flops(Plan(fold_batchnorm=True, mix_before_upsample=("full", "none", "none"))) == direct - full
    rows = 2 * (9 * hidden * channels * 4 * 32 + hidden * 3 * 4 * 32**2)
    assert base - flops(Plan(fold_batchnorm=True, mix_before_upsample=("rows", "none", "none"))) == direct - rows


@pytest.mark.parametrize("forms", list(itertools.product(("none", "rows", "full"), repeat=2)), ids="-".join)
@pytest.mark.parametrize(
    "sizes", [((3, 2), (5, 4), (9, 7)), ((1, 1), (1, 3), (4, 5)), ((2, 6), (2, 1), (1, 1))], ids=str
)
def test_a_mixed_convolution(forms: tuple[MixForm, ...], sizes: tuple[tuple[int, int], ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    convolution = nn.Conv2d(9, 4, 3, padding=1).double()
    features = [torch.randn(2, 3, *size, dtype=torch.float64, generator=generator) for size in sizes]
    expected = convolution(torch.cat([resize(feature, sizes[-1]) for feature in features], 1))
    actual = MixedConvolution(convolution, forms)(features)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_winograd_of_every_convolution(variant: str, image: Tensor) -> None:
    """Of those with few channels, too, which the plan leaves alone."""
    model = network(variant)
    planned = winograd(rewrite(model, ALGEBRA), 4, fewest_channels=1)
    assert any(isinstance(module, WinogradConv2d) for module in planned.modules())
    assert_same(model, planned, image)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 3), (16, 9), (41, 70)], ids=str)
def test_a_convolution_by_winograd(size: tuple[int, int], bias: bool) -> None:
    """Sizes of one tile, of parts of tiles, and of several strips."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(7, 5, 3, padding=1, bias=bias).double()
    x = torch.randn(2, 7, *size, dtype=torch.float64)
    torch.testing.assert_close(WinogradConv2d(convolution)(x), convolution(x), rtol=0, atol=1e-12)


def test_winograd_in_single_precision() -> None:
    """Its error is that of sums of about the same length, times what the transforms add: ten at the most."""
    torch.manual_seed(0)
    convolution, x = nn.Conv2d(256, 64, 3, padding=1), torch.randn(1, 256, 24, 24).relu()
    expected = copy.deepcopy(convolution).double()(x.double())
    plain, ours = ((layer(x) - expected).square().mean().sqrt() for layer in (convolution, WinogradConv2d(convolution)))
    assert ours < 10 * plain
    assert ours < 1e-5 * expected.std()


def test_winograd_multiplies_a_quarter() -> None:
    """36 products for 16 outputs of 9 taps; the rest are the transforms, whose matrices are 6x6 and 4x6."""
    convolution = WinogradConv2d(nn.Conv2d(32, 48, 3, padding=1))
    with FlopCounterMode(display=False) as counter:
        convolution(torch.randn(1, 32, 16, 24))
    tiles = 4 * 6
    before = 2 * 32 * (6 * 6 * 4 * (4 * 7) + tiles * 6 * 6 * 6)  # rows of one more tile, then columns
    after = 2 * 48 * tiles * (4 * 6 * 6 + 4 * 6 * 4)
    assert counter.get_total_flops() == 2 * tiles * 36 * 32 * 48 + before + after


@pytest.mark.parametrize(
    ("stages", "places"),
    [
        (0, {}),
        (1, {"fuse.": 3, "enhance.": 3, "smooth.2.": 1, "mix.": 1}),
        (2, {"fuse.": 5, "enhance.": 5, "smooth.2.": 1, "smooth.1.": 1, "mix.": 1, "layer2.": 3}),
        (4, {"fuse.": 6, "enhance.": 6, "smooth.2.": 1, "layer2.": 3, "layer3.": 5, "layer4.": 2, "reduce.": 1}),
    ],
)
def test_stages_of_winograd(stages: int, places: dict[str, int]) -> None:
    """AGLN-ResNet-50 has 3, 2 and 1 CFBs at 1/4, 1/8 and 1/16; the first blocks of layers 2 to 4 have a stride."""
    planned = rewrite(create_model("agln_resnet50", 5), Plan(fold_batchnorm=True, winograd=stages))
    names = [name for name, module in planned.named_modules() if isinstance(module, WinogradConv2d)]
    assert {place: sum(place in name for name in names) for place in places} == places
    assert bool(names) == bool(stages)
    assert not any("layer1" in name for name in names), "64 channels are too few"


def test_winograd_serves_what_of_fcn_is_not_dilated() -> None:
    """All of mmseg's head lies at 1/8; of the encoder, what stands before the dilations, which are 1, 2 and 4: blocks 2
    to 4 of layer2, and the first of layer3, which has the dilation of the layer before."""
    planned = rewrite(create_model("fcn_concat_resnet50c", 5), Plan(fold_batchnorm=True, winograd=2))
    names = [name for name, module in planned.named_modules() if isinstance(module, WinogradConv2d)]
    assert names == [
        *(f"encoder.layer2.{block}.conv2" for block in (1, 2, 3)),
        "encoder.layer3.0.conv2",
        "decoder.convs.0.0",
        "decoder.convs.1.0",
        "mix.1",
    ]


def test_no_stage_of_winograd_is_none() -> None:
    """Nor is the stem of `resnet*s`, at 1/2, in any of them."""
    model = create_model("fpn_resnet50s", 5)
    for stages, expected in ((0, False), (4, True)):
        planned = winograd(InferenceNetwork(model), stages, fewest_channels=1)
        names = [name for name, module in planned.named_modules() if isinstance(module, WinogradConv2d)]
        assert bool(names) == expected
        assert not any("encoder.conv1" in name for name in names)


def test_strips_of_winograd_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a dozen nodes of an exported graph; a map of 512x512, of an image of 2048x2048, has 128 rows of tiles."""
    rows: list[int] = []
    layer = WinogradConv2d(nn.Conv2d(1, 1, 3, padding=1).to("meta"))
    strip = layer._strip
    monkeypatch.setattr(layer, "_strip", lambda x, columns: rows.append(x.shape[1] - 1) or strip(x, columns))
    for side, expected in ((64, [8, 8]), (128, [4] * 8), (512, [8] * 16)):
        rows.clear()
        assert layer(torch.empty(1, 1, side, side, device="meta")).shape == (1, 1, side, side)
        assert rows == expected


@pytest.mark.parametrize("stages", [-1, 5, True, 1.0])
def test_winograd_has_so_many_stages(stages: int) -> None:
    with pytest.raises(ConfigError, match="0 to 4"):
        winograd(InferenceNetwork(network("fpn")), stages)


@pytest.mark.parametrize(("source", "target"), [(1, 1), (1, 4), (5, 1), (7, 13), (16, 32), (9, 4)])
def test_the_matrix_of_a_resize(source: int, target: int) -> None:
    x = torch.randn(1, 1, source, 3, dtype=torch.float64)
    expected = F.interpolate(x, (target, 3), mode="bilinear", align_corners=True)[0, 0]
    torch.testing.assert_close(upsample_matrix(source, target, x) @ x[0, 0], expected, rtol=0, atol=1e-14)


def test_mixing_needs_a_folded_convolution_once() -> None:
    planned = InferenceNetwork(network("fpn"))
    with pytest.raises(ConfigError, match="BN has been folded"):
        mix_before_upsample(planned, ("full", "full", "full"))
    mixed = mix_before_upsample(fold_batchnorm(planned), ("full", "full", "full"))
    with pytest.raises(ConfigError, match="once"):
        mix_before_upsample(mixed, ("full", "full", "full"))
    with pytest.raises(ConfigError, match="needs 3 of none, rows, full"):
        mix_before_upsample(fold_batchnorm(planned), ("full",))


def test_only_segmentation_networks_are_planned() -> None:
    with pytest.raises(ConfigError, match="SegmentationNetwork"):
        rewrite(nn.Conv2d(3, 3, 1), NO_PLAN)  # type: ignore[arg-type]
    model = network("release")
    with torch.no_grad():
        model.decoder.cfb[1][0].gamma.fill_(float("nan"))  # type: ignore[union-attr, index]
    with pytest.raises(ConfigError, match=r"decoder\.cfb\.1\.0\.gamma is nan"):
        rewrite(model, NO_PLAN)
