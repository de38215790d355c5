"""The networks against the authors' release, the paper's equations and its Table VIII."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from released import GOLDEN, normalised_image, released_shapes, weights
from torch import Tensor, nn

import agln_fast
from agln_fast.errors import ConfigError
from agln_fast.models.blocks import (
    AveragePoolingBlock,
    LocalRefinementModule,
    SemanticAggregationBlock,
    SemanticDistributionModule,
    resize,
)
from agln_fast.models.complexity import complexity
from agln_fast.models.config import ModelConfig, preset
from agln_fast.models.networks import AGLNDecoder, SegmentationNetwork

FILES = sorted(path.name for path in GOLDEN.glob("*_golden-*.npz"))
assert len(FILES) == 4, "AGLN, deep-stem AGLN, FPN and FCN-8s"


def _load_golden(file: str, folder) -> tuple[SegmentationNetwork, Tensor, dict[str, Tensor]]:
    network, backbone, classes, shape, salt = file.removesuffix(".npz").split("_")
    checkpoint = folder / "released.pth"
    torch.save(weights(released_shapes(f"{network}_{backbone}", int(classes[:-1])), salt), checkpoint)
    with np.load(GOLDEN / file) as arrays:
        golden = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    dimensions = tuple(int(side) for side in shape.split("x"))
    return agln_fast.load_checkpoint(checkpoint), normalised_image(dimensions, salt), golden


@pytest.mark.parametrize("file", FILES)
@torch.inference_mode()
def test_logits_are_those_of_the_release(file, tmp_path):
    network, image, golden = _load_golden(file, tmp_path)
    logits, expected = network(image), golden["logits"]
    # The channel attention's softmax amplifies rounding: AGLN's golden logits are themselves up to 1e-5 of their
    # largest value away from a float64 evaluation, so for AGLN the tolerance is relative to that largest value.
    scale = expected.abs().max().item() if file.startswith("agln") else 1.0
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * scale)
    if file.startswith("agln"):
        exact = network.double()(image.double()).float()
        assert (exact - expected).abs().max() < 2e-5 * scale


def _assert_stage(actual: Tensor, golden: Tensor) -> None:
    """1e-4 absolute plus 1e-4 relative; one element in 1000 may need 1e-4 of the stage's largest value instead.

    Those are softmaxes whose golden value itself is that far from a float64 evaluation: 0.06 % with PyTorch 2.11.
    """
    error = (actual - golden).abs()
    beyond = (error > 1e-4 + 1e-4 * golden.abs()).double().mean().item()
    assert beyond < 1e-3, f"{beyond:.2%} of the elements differ, by up to {error.max():.1e}"
    assert error.max() < 1e-4 * max(1.0, golden.abs().max().item())


@torch.inference_mode()
def test_every_stage_is_that_of_the_release(tmp_path):
    """Each stage is fed with the release's own values, so that no error is carried over."""
    network, image, golden = _load_golden("agln_resnet50_21c_1x3x64x96_golden-1.npz", tmp_path)
    decoder = network.decoder
    assert isinstance(decoder, AGLNDecoder)
    c1, c2, c3, c4 = network.encoder(image)
    _assert_stage(decoder.reduce(c4), golden["e4conv"])

    d, outputs = golden["e4conv"], [golden["e4conv"]]
    for level, lateral in enumerate((c3, c2, c1)):
        descriptors = golden[("sab_d4", "sab_d3", "sab_d2")[level]]
        _assert_stage(decoder.sab[level](d), descriptors)
        b = decoder.lateral[level](lateral)
        a = resize(d, b.shape)
        for j, block in enumerate(decoder.cfb[level]):
            stage = f"cfb_d{4 - j}.{2 - level}"
            m = block.sdm(a, golden[("sab_d4", "sab_d3", "sab_d2")[j]])
            _assert_stage(m, golden[f"{stage}.sdm"])
            _assert_stage(block.lrm(a, b, golden[f"{stage}.sdm"]), golden[f"{stage}.lrm"])
            a = block(a, b, golden[("sab_d4", "sab_d3", "sab_d2")[j]])
            _assert_stage(a, golden[stage])
            a = golden[stage]
        d = a
        outputs.append(decoder.smooth[level](d))
    head = network.classifier(torch.cat([resize(output, c1.shape) for output in outputs], 1))
    _assert_stage(head, golden["head"])
    _assert_stage(resize(golden["head"], image.shape), golden["logits"])


TABLE_VIII = [  # parameters (1e6), multiply-adds (1e9), allowed relative deviations
    ("fcn8s_resnet101s", 52.09, 196.75, 0.001, 0.005),
    ("fpn_resnet101s", 54.32, 124.59, 0.001, 0.005),
    ("agln_resnet101s", 61.71, 187.16, 0.005, 0.005),
    ("agln_lite_resnet101s", 55.74, 135.56, 0.02, 0.02),
]


@pytest.mark.parametrize(("name", "parameters", "flops", "close", "closer"), TABLE_VIII, ids=[r[0] for r in TABLE_VIII])
def test_cost_is_that_of_table_viii(name, parameters, flops, close, closer):
    *parts, total = complexity(preset(name, 59), 480, 480)
    assert total.parameters / 1e6 == pytest.approx(parameters, rel=close)
    assert total.convolution / 1e9 == pytest.approx(flops, rel=closer)
    for kind in ("parameters", "convolution", "matmul"):
        assert sum(getattr(part, kind) for part in parts) == getattr(total, kind)


def test_multiply_adds_of_one_convolution_by_hand():
    stem = complexity(preset("fpn_resnet18", 2), 64, 64)[0]
    assert stem.part == "encoder.conv1"
    assert stem.convolution == 32 * 32 * 64 * 3 * 7 * 7
    assert stem.parameters == 64 * 3 * 7 * 7


def _double(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return module.double()


def test_equation_1_by_hand():
    """Two pixels, attention by hand: D[:, n] = sum over pixels of softmax(theta)[n, p] * phi[:, p]."""
    block = _double(SemanticAggregationBlock(2, 3))
    x = torch.randn(1, 2, 1, 2, dtype=torch.float64)
    pixels = x[0, :, 0].T  # (P, C)
    block.requires_grad_(False)
    theta = pixels @ block.theta.weight[:, :, 0, 0].T + block.theta.bias
    phi = pixels @ block.phi.weight[:, :, 0, 0].T + block.phi.bias
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for n in range(3):
        share = [math.exp(theta[p, n]) / sum(math.exp(t) for t in theta[:, n]) for p in range(2)]
        expected[:, n] = share[0] * phi[0] + share[1] * phi[1]
    torch.testing.assert_close(block(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_gap_is_attention_with_equal_weights():
    gap, block = _double(AveragePoolingBlock(4)), _double(SemanticAggregationBlock(4, 1))
    block.phi.load_state_dict(gap.phi.state_dict())
    nn.init.zeros_(block.theta.weight)
    x = torch.randn(2, 4, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(gap(x), block(x), rtol=1e-12, atol=1e-12)


def test_equation_2_gives_each_pixel_a_mean_of_the_descriptors():
    """With equal descriptors the softmax weights, which sum to 1, cannot matter."""
    sdm = _double(SemanticDistributionModule(4, 6, "paper"))
    descriptor = torch.randn(1, 4, 1, dtype=torch.float64)
    m = sdm(torch.randn(1, 4, 3, 5, dtype=torch.float64), descriptor.expand(-1, -1, 6))
    torch.testing.assert_close(m, descriptor[..., None].expand_as(m), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("formulation", ["paper", "release"])
def test_equations_4_and_5_by_hand(formulation):
    """F[i] = sum over j of softmax_j(±e_i · b_j) b_j, G = F ⊙ σ(M); the release has the minus."""
    lrm = LocalRefinementModule(formulation, channel_resampling=True, spatial_gating=True)
    e, b, m = torch.randn(3, 1, 3, 2, 2, dtype=torch.float64)
    sign = 1 if formulation == "paper" else -1
    expected = torch.zeros_like(b)
    for i in range(3):
        scores = [math.exp(sign * (e[0, i] * b[0, j]).sum()) for j in range(3)]
        expected[0, i] = sum(score / sum(scores) * b[0, j] for j, score in enumerate(scores))
    torch.testing.assert_close(lrm(e, b, m), expected / (1 + torch.exp(-m)), rtol=1e-12, atol=1e-12)


def test_energy_beyond_float16_stays_finite():
    lrm = LocalRefinementModule("paper", channel_resampling=True, spatial_gating=False)
    e = torch.full((1, 4, 64, 64), 8.0, dtype=torch.float16)  # 64 · 64 · 8 · 8 = 262144, float16 ends at 65504
    r = lrm.affinity(e, e)
    assert r.dtype == torch.float32
    torch.testing.assert_close(r, torch.full((1, 4, 4), 0.25))


def test_energy_stays_in_float32_under_autocast():
    lrm = LocalRefinementModule("paper", channel_resampling=True, spatial_gating=False)
    e, b = torch.randn(2, 1, 4, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        r = lrm.affinity(e, b)
    torch.testing.assert_close(r, lrm.affinity(e, b), rtol=1e-6, atol=1e-7)


VARIANTS = sorted(name.removesuffix("_resnet18") for name in agln_fast.list_models("*_resnet18"))


@pytest.mark.parametrize("formulation", ["paper", "release"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_at_odd_sizes(variant, formulation, small_network):
    """Each parameter gets a gradient, except those that multiply out (a softmax over one descriptor is 1)."""
    network = small_network(f"{variant}_resnet18", formulation=formulation)
    logits = network(torch.randn(2, 3, 33, 47))
    assert logits.shape == (2, 5, 33, 47)
    logits.square().mean().backward()
    idle = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    constant = network.config.num_descriptors == 1
    assert all((constant and ".sdm.phi." in name) or ".theta.bias" in name for name in idle), idle


@pytest.mark.parametrize(
    "encoder", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet18s", "resnet50s", "resnet34c", "resnet101c"]
)
@torch.inference_mode()
def test_encoder_strides(encoder, small_network):
    plain, dilated = small_network(f"fpn_{encoder}").encoder, small_network(f"fcn8s_{encoder}").encoder
    image = torch.randn(1, 3, 64, 96)
    expected = [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert [tuple(stage.shape[2:]) for stage in plain(image)] == expected
    assert [tuple(stage.shape[2:]) for stage in dilated(image)] == [*expected[:2], expected[1], expected[1]]


@torch.inference_mode()
def test_image_size_of_one_side_32_works_and_31_is_refused(small_network):
    network = small_network()
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, 5, 32, 32)
    with pytest.raises(ConfigError, match=r"input of shape \(1, 3, 31, 32\)"):
        network(torch.randn(1, 3, 31, 32))
    with pytest.raises(ConfigError, match="needs"):
        network(torch.randn(1, 4, 32, 32))


@torch.inference_mode()
def test_fixed_scalars_equal_learnable_ones_at_1(small_network):
    learnable = small_network("agln_straight_resnet18")
    fixed = small_network("agln_straight_alpha1_beta1_resnet18")
    state = learnable.state_dict()
    for block in (chain[0] for chain in learnable.decoder.cfb):
        nn.init.ones_(block.alpha)
        nn.init.ones_(block.beta)
    fixed.load_state_dict({k: v for k, v in state.items() if not k.endswith(("alpha", "beta"))})
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(learnable(image), fixed(image), rtol=0, atol=0)


@torch.inference_mode()
def test_dense_decoder_feeds_all_descriptors(small_network):
    """Fig. 4b: one, two and three CFBs; changing SAB_3 changes only the finest level."""
    network = small_network("agln_resnet18").double()
    assert [len(chain) for chain in network.decoder.cfb] == [1, 2, 3]
    assert [len(chain) for chain in small_network("agln_straight_resnet18").decoder.cfb] == [1, 1, 1]
    seen: list[Tensor] = []
    for smooth in network.decoder.smooth:
        smooth.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    network(image)
    nn.init.normal_(network.decoder.sab[2].phi.weight)
    network(image)
    before, after = seen[:3], seen[3:]
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert not torch.allclose(before[2], after[2])


def test_presets_are_found_and_corrected():
    assert "agln_lite_resnet50" in agln_fast.list_models("agln*")
    assert not [name for name in agln_fast.list_models("fpn*") if not name.startswith("fpn")]
    with pytest.raises(ConfigError, match="did you mean 'agln_resnet101s'"):
        agln_fast.create_model("agln_resnet101ss", 2)
    with pytest.raises(ConfigError, match="unknown field 'formulatoin'; did you mean 'formulation'"):
        agln_fast.create_model("agln_resnet50", 2, formulatoin="paper")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_classes", 0, "num_classes 0: must be a whole number from 1"),
        ("num_classes", True, "num_classes True"),
        ("num_classes", 10**9, "from 1 to 32767"),
        ("encoder", "resnet52", "unknown encoder 'resnet52'; did you mean 'resnet"),
        ("formulation", "x", "unknown formulation 'x'; known: paper, release"),
        ("width", 0, "width 0: must be a number"),
        ("width", float("nan"), "width nan"),
        ("lite", "yes", "lite 'yes': must be true or false"),
        ("channels", 1.5, "channels 1.5"),
    ],
)
def test_impossible_configs_are_refused(field, value, message):
    with pytest.raises(ConfigError, match=message):
        preset("agln_resnet50", **{"num_classes": 2, field: value})


def test_only_fcn_chooses_its_corners_and_its_head():
    assert [preset(f"{name}_resnet50", 2).align_corners for name in ("fcn", "fcn8s", "fpn", "agln")] == [
        False,
        True,
        True,
        True,
    ]
    assert preset("fcn_resnet50", 2, align_corners=True).align_corners
    for name, value in (("align_corners", False), ("concat_input", True)):
        with pytest.raises(ConfigError, match=rf"{name} {value}: only architecture 'fcn' has it, not 'fcn8s'"):
            preset("fcn8s_resnet50", 2, **{name: value})
    with pytest.raises(ConfigError, match="align_corners 'no': must be true or false"):
        preset("fcn_resnet50", 2, align_corners="no")


@torch.inference_mode()
def test_fcn_differs_from_fcn8s_in_its_last_resize_alone(small_network):
    fcn = small_network("fcn_resnet18").double()
    aligned, reference = (
        SegmentationNetwork(preset(name, 5, width=0.25, channels=16, align_corners=True)).double().eval()
        for name in ("fcn_resnet18", "fcn8s_resnet18")
    )
    image = torch.randn(1, 3, 45, 70, dtype=torch.float64)
    for network in (aligned, reference):
        network.load_state_dict(fcn.state_dict())
    assert torch.equal(aligned(image), reference(image))
    coarse = fcn.classifier(fcn.encoder(image)[-1])
    exact = nn.functional.interpolate(coarse, (45, 70), mode="bilinear", align_corners=False)
    assert torch.equal(fcn(image), exact)
    assert not torch.allclose(fcn(image), reference(image))


@torch.inference_mode()
def test_the_deep_stem_of_resnet_v1c_is_half_as_wide(small_network):
    """3 -> 32 -> 32 -> 64 at full width, where "s" has 64, 64 and 128."""
    stems = {kind: SegmentationNetwork(preset(f"fcn_resnet18{kind}", 2)).encoder.conv1 for kind in "cs"}
    widths = {
        kind: [layer.out_channels for layer in stem if isinstance(layer, nn.Conv2d)] for kind, stem in stems.items()
    }
    assert widths == {"c": [32, 32, 64], "s": [64, 64, 128]}
    assert small_network("fcn_resnet18c", width=1 / 64).encoder.conv1[0].out_channels == 1


def test_average_pooling_has_one_descriptor():
    assert preset("agln_minus_gap_resnet50", 2).num_descriptors == 1
    with pytest.raises(ConfigError, match="average pooling gives exactly 1"):
        preset("agln_minus_gap_resnet50", 2, num_descriptors=64)


@pytest.mark.parametrize("name", agln_fast.list_models("*_resnet50s"))
def test_config_survives_json(name):
    config = preset(name, 7, width=0.5)
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["{", "[]", '{"architecture": "agln"}', '{"x": 1}'])
def test_foreign_json_is_no_config(text):
    with pytest.raises(ConfigError):
        ModelConfig.from_json(text)
