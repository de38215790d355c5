"""Features are what the equations say, the network stays as it was, and the figure shows them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from agln_fast.contract import IMAGENET_MEAN, IMAGENET_STD
from agln_fast.data.classes import default_class_set
from agln_fast.errors import ConfigError, MissingPackageError
from agln_fast.figures.features import Features, _pca_colours, collect_features, draw_features, peaked, spread

HEIGHT, WIDTH = 64, 96
CLASSES = default_class_set(5)


@pytest.fixture(scope="module")
def image():
    """Smooth colours with some noise: neighbouring pixels resemble each other, and no two are the same."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH] / 20
    waves = np.stack([np.sin(x + y), np.cos(2 * x), np.sin(3 * y)], -1)
    return np.clip(127 + 90 * waves + generator.normal(0, 15, waves.shape), 0, 255).astype(np.uint8)


def logits(network, image):
    x = (torch.from_numpy(image).float() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    with torch.no_grad():
        return network(x.permute(2, 0, 1)[None].to(next(network.parameters()).dtype))[0]


def convolve1(module, x):
    """A 1x1 convolution as a matrix product: (C, h, w) -> (K, h, w)."""
    weight, bias = module.weight.detach().double().numpy()[:, :, 0, 0], module.bias.detach().double().numpy()
    return np.einsum("kc,chw->khw", weight, x) + bias[:, None, None]


def softmax(x, axis):
    x = np.exp(x - x.max(axis, keepdims=True))
    return x / x.sum(axis, keepdims=True)


def flat(x):
    return x.reshape(len(x), -1)


def aggregated(network, level, image):
    """X, the feature before `level`, taken from what its φ reads."""
    seen = []
    handle = network.decoder.sab[level].phi.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    logits(network, image)
    handle.remove()
    return seen[0][0].numpy()


# Level, block, and the number of the SAB whose descriptors that block distributes.
PLACES = {
    "paper, dense, last block": ("agln_resnet18", -1, -1, 2),
    "paper, dense, middle of a chain": ("agln_resnet18", 2, 1, 1),
    "paper, straight": ("agln_straight_resnet18", -1, -1, 0),
    "paper, straight, coarsest level": ("agln_straight_resnet18", 0, 0, 0),
    "paper, alpha fixed": ("agln_straight_alpha1_resnet18", -1, -1, 0),
    "paper, lite": ("agln_lite_resnet18", 1, -1, 1),
    "release": ("agln_release_resnet18", -1, -1, 2),
    "average pooling": ("agln_minus_gap_resnet18", -1, -1, 0),
    "minus": ("agln_minus_resnet18", -1, -1, 0),
    "channel resampling only": ("agln_minus_cr_resnet18", -1, -1, 0),
    "spatial gating only": ("agln_minus_sg_resnet18", -1, -1, 0),
}


@pytest.mark.parametrize(("name", "level", "block", "sab"), PLACES.values(), ids=PLACES.keys())
def test_features_fulfil_the_equations(small_network, image, name, level, block, sab):
    network = small_network(name).double()
    config, released = network.config, network.config.formulation == "release"
    features = collect_features(network, image, level=level, block=block)
    cfb, aggregation = network.decoder.cfb[level][block], network.decoder.sab[sab]
    a, b, m, e = features.decoder, features.encoder, features.descriptor_map, features.enhanced
    level %= 3
    assert a.shape == b.shape == m.shape == e.shape == (16, HEIGHT >> 4 - level, WIDTH >> 4 - level)
    assert a.dtype == np.float64

    def close(found, expected):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)

    # Eq. 1
    x = aggregated(network, sab, image)
    phi = flat(convolve1(aggregation.phi, x))
    if config.pooling == "average":
        assert features.attention is None
        descriptors = phi.mean(1, keepdims=True)
    else:
        expected = softmax(flat(convolve1(aggregation.theta, x)), 1)
        close(flat(features.attention), expected)
        assert features.attention.shape == (config.num_descriptors, *x.shape[1:])
        descriptors = phi @ expected.T
    # Eq. 2
    expected = (descriptors @ softmax(flat(convolve1(cfb.sdm.phi, a)), 0)).reshape(a.shape)
    close(m, convolve1(cfb.sdm.project, expected) if released else expected)
    # Eq. 3
    close(features.alpha, float(torch.as_tensor(cfb.alpha).detach()))
    expected = a + features.alpha * m
    if not released:
        with torch.no_grad():
            expected = cfb.enhance(torch.from_numpy(expected)[None])[0].numpy()
    close(e, expected)
    # Eq. 4 and 5
    if not (config.channel_resampling or config.spatial_gating):
        assert features.refined is None
        return
    g = flat(b)
    if config.channel_resampling:
        energy = flat(a if released else e) @ flat(b).T
        g = softmax(-energy if released else energy, 1) @ g
    if config.spatial_gating:
        g = g / (1 + np.exp(-flat(m)))
    close(flat(features.refined), g)
    assert (features.gamma is None) is not released
    if released:
        close(features.gamma, cfb.gamma.item())


def test_encoder_feature_is_the_lateral_of_the_level(small_network, image):
    network = small_network("agln_resnet18")
    for level in range(3):
        seen = []
        handle = network.decoder.lateral[level].register_forward_hook(lambda *call: seen.append(call[-1]))  # noqa: B023
        logits(network, image)
        handle.remove()
        np.testing.assert_allclose(collect_features(network, image, level=level).encoder, seen[0][0], atol=1e-5)


def test_fpn_has_the_sum_of_decoder_and_encoder(small_network, image):
    network = small_network("fpn_resnet18").double()
    coarse, fine = collect_features(network, image, level=1), collect_features(network, image)
    upsampled = torch.nn.functional.interpolate(
        torch.from_numpy(coarse.decoder)[None], fine.decoder.shape[1:], mode="bilinear", align_corners=True
    )
    np.testing.assert_allclose(fine.decoder, upsampled[0].numpy() + fine.encoder, rtol=1e-9)
    absent = (fine.attention, fine.descriptor_map, fine.enhanced, fine.refined, fine.alpha, fine.gamma)
    assert absent == (None,) * 6
    assert (fine.level, fine.block) == (2, 0)


@pytest.mark.parametrize("name", ["agln_release_resnet18", "fpn_resnet18"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_network_is_left_as_it_was(small_network, image, name, training):
    network = small_network(name).train(training)
    network.encoder.eval()
    modes = [module.training for module in network.modules()]
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    features = collect_features(network, image)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    assert not hooks(network)
    network.eval()
    np.testing.assert_array_equal(features.labels, logits(network, image).argmax(0))
    assert features.labels.dtype == np.uint8
    assert len(np.unique(features.labels)) > 1


def hooks(network):
    return [hook for module in network.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def test_nothing_is_left_behind_when_forward_raises(small_network, image, monkeypatch):
    network = small_network().train()

    def fail(x):
        raise RuntimeError("broken")

    monkeypatch.setattr(network.classifier, "forward", fail)
    with pytest.raises(RuntimeError, match="broken"):
        collect_features(network, image)
    assert not hooks(network)
    assert all(module.training for module in network.modules())


def test_half_precision_is_widened(small_network, image):
    features = collect_features(small_network().bfloat16(), image)
    assert features.decoder.dtype == features.attention.dtype == features.enhanced.dtype == np.float32


def test_many_classes_need_wide_labels(small_network, image):
    assert collect_features(small_network("fpn_resnet18", 300), image).labels.dtype == np.int32


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("fcn8s_resnet18", {}, "fcn8s has no pyramid of features"),
        ("agln_resnet18", {"level": 3}, "level 3: there are 3"),
        ("agln_resnet18", {"level": -4}, "level -4: there are 3"),
        ("agln_resnet18", {"level": 1, "block": 2}, "block 2: there are 2"),
        ("agln_straight_resnet18", {"block": 1}, "block 1: there are 1"),
        ("fpn_resnet18", {"block": 1}, "block 1: there are 1"),
    ],
    ids=["no decoder", "level", "negative level", "block of a dense chain", "block of a straight one", "block of FPN"],
)
def test_refused_places(small_network, image, name, place, message):
    with pytest.raises(ConfigError, match=message):
        collect_features(small_network(name), image, **place)


def test_refused_small_image(small_network, image):
    with pytest.raises(ConfigError, match="31x96"):
        collect_features(small_network(), image[:31])


def test_spread_counts_the_pixels_that_are_drawn_on():
    attention = np.zeros((3, 4, 5), np.float32)
    attention[0] = 1 / 20
    attention[1, 2, 3] = 1
    attention[2, 0] = 1 / 5
    np.testing.assert_allclose(spread(attention), [1, 1 / 20, 5 / 20], rtol=1e-6)
    assert peaked(attention, 2) == [1, 2]
    assert peaked(attention[[0, 0, 0]], 2) == [0, 1]


def test_pca_colours_are_comparable_and_deterministic():
    generator = np.random.default_rng(1)
    feature = generator.normal(size=(6, 5, 7))
    (plain, _), (scaled, _), (constant, even) = _pca_colours([feature, 10 * feature + 3, np.ones((6, 5, 7)) / 3])
    assert plain.shape == (5, 7, 3)
    assert plain.min() == 0
    assert plain.max() == 1
    np.testing.assert_allclose(plain, scaled, atol=1e-9)
    assert even
    assert (constant == 0.5).all()
    # Red follows the strongest direction, whatever the sign that the decomposition happened to give it.
    feature[2] *= 9
    colours = _pca_colours([feature])[0][0]
    assert np.corrcoef(colours[..., 0].ravel(), feature[2].ravel())[0, 1] > 0.95


def test_pca_colours_of_fewer_channels_than_colours():
    colours, _ = _pca_colours([np.random.default_rng(2).normal(size=(1, 4, 4))])[0]
    assert (colours[..., 1:] == 0.5).all()
    assert np.ptp(colours[..., 0]) == 1


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba()).copy()


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def pictures(figure):
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


def draw(network, image, **options) -> tuple[Features, Figure]:
    features = collect_features(network, image)
    return features, draw_features(features, CLASSES, **options)


def test_figure_shows_everything_once(small_network, image):
    truth = np.full((HEIGHT, WIDTH), 3, np.uint8)
    features, figure = draw(small_network(), image, truth=truth, descriptors=3, channels=2, title="a $5 title")
    shown = pictures(figure)
    assert len(shown) == 6 + 3 + 3 + 2 * 2
    np.testing.assert_array_equal(shown[0], image)
    attention = [features.attention[n] for n in peaked(features.attention, 3)]
    np.testing.assert_array_equal(shown[9:12], attention)
    largest = np.argsort(-features.encoder.var((1, 2)))[:2]
    np.testing.assert_array_equal(shown[12:14], features.encoder[largest])
    np.testing.assert_array_equal(shown[14:], features.refined[largest])
    words = texts(figure)
    assert "a $5 title" in words
    accuracy = (features.labels == 3).mean()
    assert any(text.endswith(f"pixels {accuracy:.1%}") for text in words)
    assert f"A + αM, α = {features.alpha:.3g}, Eq. 3" in words
    assert any(f"γ = {features.gamma:.3g}." in text for text in words)


def test_figure_is_deterministic_and_not_blank(small_network, image):
    title = r"$\no formula$"
    once, again = (pixels(draw(small_network(), image, title=title)[1]) for _ in range(2))
    assert once.std() > 20
    np.testing.assert_array_equal(once, again)


def test_panels_are_equal_and_apart(small_network, image):
    figure = draw(small_network(), image)[1]
    figure.canvas.draw()
    boxes = [axes.get_window_extent() for axes in figure.axes if axes.images]
    assert {(round(box.width, 3), round(box.height, 3)) for box in boxes} == {(190.0, 126.667)}
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])
    captions = [text.get_window_extent() for axes in figure.axes for text in axes.texts if text.get_text()]
    assert not any(one.overlaps(other) for i, one in enumerate(captions) for other in captions[:i])
    assert not any(caption.overlaps(box) for caption in captions for box in boxes)
    assert all(text.x0 >= 0 and text.x1 <= figure.bbox.width for text in captions)


@pytest.mark.parametrize(
    ("name", "count", "words"),
    [
        ("fpn_resnet18", 4 + 6, ["FPN adds without enhancement", "FPN has no descriptors.", "FPN has no Local Ref"]),
        ("agln_minus_resnet18", 8 + 6 + 6, ["AGLN− has no Local Refinement Module", "Ψ(A + αM)"]),
        ("agln_minus_gap_resnet18", 8 + 6, ["Average pooling: one descriptor", "constant over the image"]),
    ],
    ids=["fpn", "minus", "average pooling"],
)
def test_what_a_network_lacks_is_said(small_network, image, name, count, words):
    _, figure = draw(small_network(name), image)
    # Without ground truth there are 5 pictures in the first row, and 3 below; FPN has 3 and 1.
    assert len(pictures(figure)) == count
    text = "\n".join(texts(figure))
    assert "no ground truth" in text
    for word in words:
        assert word in text


def test_alpha_zero_is_said(small_network, image):
    network = small_network()
    with torch.no_grad():
        network.decoder.cfb[2][2].alpha.zero_()
    assert "α = 0: M has no influence" in texts(draw(network, image)[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"descriptors": 0}, "descriptors 0"),
        ({"channels": 13}, "channels 13"),
        ({"truth": np.zeros((3, 3), np.uint8)}, "sizes must be equal"),
        ({"truth": np.full((HEIGHT, WIDTH), 5, np.uint8)}, "class id 5"),
    ],
    ids=["no descriptors", "too many channels", "truth of another size", "truth of other classes"],
)
def test_refused_drawings(small_network, image, options, message):
    with pytest.raises(ConfigError, match=message):
        draw(small_network(), image, **options)


def test_refused_class_set(small_network, image):
    features = collect_features(small_network(), image)
    with pytest.raises(ConfigError, match="has 21 classes, the network 5"):
        draw_features(features, default_class_set(21))


def test_matplotlib_is_optional(small_network, image, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="matplotlib"):
        draw(small_network(), image)
