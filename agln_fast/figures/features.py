"""What happens inside a network, as in Fig. 3 and Fig. 5: its features, recorded in one forward pass, and drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from agln_fast.contract import IOContract
from agln_fast.data.classes import ClassSet
from agln_fast.errors import ConfigError
from agln_fast.figures.comparison import (
    CAPTION,
    Legend,
    Page,
    check_labels,
    class_colours,
    describe_score,
    panel_height,
)
from agln_fast.figures.panels import check_index, check_panels
from agln_fast.models.blocks import ContextFusionBlock
from agln_fast.models.config import ModelConfig
from agln_fast.models.networks import AGLNDecoder, FPNDecoder, SegmentationNetwork
from agln_fast.plan.blocks import SCALES
from agln_fast.runtime.images import ImageArray, pack
from agln_fast.runtime.result import Labels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Features", "collect_features", "draw_features", "peaked", "spread"]

_Map: TypeAlias = npt.NDArray[np.floating[Any]]

_PANEL, _GAP = 1.9, 0.14
_COLUMNS = 6  # input, three features, segmentation, ground truth
_CONSTANT = 1e-6  # smaller deviations, relative to the largest value, are rounding


@dataclass(frozen=True, eq=False)
class Features:
    """The inside of a network at one Context Fusion Block, for one image. Arrays are float32 or wider.

    config: of the network.
    level: of the decoder, 0 (1/16 of the image) to 2 (1/4); block: the place in the level's chain of blocks.
    image: (H, W, 3) uint8 RGB; labels: (H, W) class ids, what the network says.
    decoder: (C, h, w), A of Eq. 3; for FPN, which has no block, the level's sum of decoder and encoder.
    encoder: (C, h, w), the lateral feature B.
    attention: (N, h', w'), softmax over pixels of θ(X), Eq. 1, which made the descriptors of this block; X is coarser
        than A by one level or more. None for FPN and with average pooling.
    descriptor_map: (C, h, w), M of Eq. 2; None for FPN.
    enhanced: (C, h, w), E of Eq. 3: Ψ(A + αM), or A + αM in the release; None for FPN.
    refined: (C, h, w), G of Eq. 5; None for FPN and AGLN−.
    alpha, gamma: the weight of M; the release's weight of G, None elsewhere.
    """

    config: ModelConfig
    level: int
    block: int
    image: ImageArray
    labels: Labels
    decoder: _Map
    encoder: _Map
    attention: _Map | None = None
    descriptor_map: _Map | None = None
    enhanced: _Map | None = None
    refined: _Map | None = None
    alpha: float | None = None
    gamma: float | None = None


def collect_features(network: SegmentationNetwork, image: ImageArray, *, level: int = -1, block: int = -1) -> Features:
    """Run `network` once on `image`, in eval mode, and record what flows through one Context Fusion Block.

    The network is left as it was; nothing of it is computed a second time, but the softmax of Eq. 1 and, in the
    release, A + αM, which no module gives out.

    Args:
        network: on any device, in any floating-point type.
        image: (H, W, 3) uint8 RGB, at the size that the network is to see; ImageNet's mean and deviation are applied.
        level: of the decoder, coarse to fine; the last one by default, as in Fig. 3.
        block: in the chain of that level; the last one by default. Both count from the end if negative.

    Raises:
        ConfigError: the network has no pyramid of features (FCN), there is no such level or block, or the image is
            smaller than 32 pixels.
    """
    decoder = network.decoder
    if not isinstance(decoder, FPNDecoder):
        raise ConfigError(
            f"{network.config.architecture} has no pyramid of features: its features cannot be shown; take fpn or agln"
        )
    level = check_index("level", level, len(decoder.lateral))
    chain = cast(nn.ModuleList, decoder.cfb[level]) if isinstance(decoder, AGLNDecoder) else None
    block = check_index("block", block, 1 if chain is None else len(chain))
    cfb = None if chain is None else cast(ContextFusionBlock, chain[block])

    contract = IOContract(image.shape[0], image.shape[1], layout="float_nchw", output="logits")
    parameter = next(network.parameters())
    batch = torch.from_numpy(pack([image], contract)).to(parameter.device, parameter.dtype)
    with torch.inference_mode(), _evaluating(network), _recording(_modules(decoder, level, block)) as calls:
        labels = network(batch)[0].argmax(0).cpu().numpy()
    num_classes = network.config.num_classes
    shared = {
        "config": network.config,
        "level": level,
        "block": block,
        "image": image,
        "labels": labels.astype(np.uint8 if num_classes <= 256 else np.int32),
    }
    if cfb is None:
        return Features(**shared, decoder=_array(calls["smooth"].inputs[0]), encoder=_array(calls["lateral"].output))
    a, b = map(_array, calls["cfb"].inputs[:2])
    m, alpha = _array(calls["sdm"].output), _number(cfb.alpha)
    attention = None
    if "theta" in calls:
        theta = _array(calls["theta"].output)
        attention = torch.from_numpy(theta).flatten(1).softmax(-1).view(theta.shape).numpy()
    return Features(
        **shared,
        decoder=a,
        encoder=b,
        attention=attention,
        descriptor_map=m,
        enhanced=_array(calls["enhance"].output) if "enhance" in calls else a + a.dtype.type(alpha) * m,
        refined=_array(calls["lrm"].output) if "lrm" in calls else None,
        alpha=alpha,
        gamma=None if cfb.gamma is None else _number(cfb.gamma),
    )


def _modules(decoder: FPNDecoder, level: int, block: int) -> dict[str, nn.Module]:
    """The modules whose inputs and outputs are the features."""
    if not isinstance(decoder, AGLNDecoder):
        return {"lateral": decoder.lateral[level], "smooth": decoder.smooth[level]}
    cfb = cast(nn.ModuleList, decoder.cfb[level])[block]
    modules = {
        "cfb": cfb,
        "sdm": cfb.sdm,
        "enhance": cfb.enhance,
        "lrm": cfb.lrm,
        "theta": getattr(decoder.sab[block], "theta", None),
    }
    return {name: module for name, module in modules.items() if isinstance(module, nn.Module)}


class _Call(NamedTuple):
    inputs: tuple[Tensor, ...]
    output: Tensor


@contextmanager
def _recording(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, _Call]]:
    """Inputs and output of each module's last forward, under its name; the hooks are gone at the end, come what may."""
    calls: dict[str, _Call] = {}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] = _Call(inputs, output)

        return record

    handles = [module.register_forward_hook(recorder(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode, and at the end each module back in its own."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _array(x: Tensor) -> _Map:
    """(1, C, h, w) -> (C, h, w), at least float32: NumPy has no bfloat16."""
    array: _Map = x[0].to(torch.promote_types(x.dtype, torch.float32)).cpu().numpy()
    return array


def _number(weight: Tensor | float) -> float:
    return weight.item() if isinstance(weight, Tensor) else weight


def spread(attention: _Map) -> npt.NDArray[np.float64]:
    """(N, h, w) attention, each map summing to 1 -> (N,) in 0..1: the share of the pixels that a descriptor draws on.

    It is exp(entropy) / (h·w): 1 for an even mean over all pixels, 1/(h·w) for a single one.
    """
    p = attention.reshape(len(attention), -1).astype(np.float64)
    entropy = -(p * np.log(np.maximum(p, np.finfo(np.float64).tiny))).sum(1)
    shares: npt.NDArray[np.float64] = np.exp(entropy) / p.shape[1]
    return shares


def peaked(attention: _Map, count: int) -> list[int]:
    """The `count` descriptors of (N, h, w) with the most peaked attention: the lowest entropy, lowest first."""
    return [int(n) for n in np.argsort(spread(attention), kind="stable")[:count]]


def draw_features(
    features: Features,
    class_set: ClassSet,
    *,
    truth: Labels | None = None,
    descriptors: int = 6,
    channels: int = 6,
    title: str = "Features",
) -> Figure:
    """One figure: the enhancement (Fig. 3), the attention of the descriptors, and the refinement (Fig. 5).

    docs/visualize.md tells what each panel shows. Rows that the network has nothing for say why.

    Args:
        features: of `collect_features`.
        class_set: names and colours of the network's classes.
        truth: (H, W) class ids or IGNORE_INDEX.
        descriptors: how many attention maps to show, the most peaked ones (`peaked`).
        channels: how many channels of the encoder feature, those with the largest variance over the pixels before
            refinement.
        title: stands on top.

    Raises:
        ConfigError: a class set of another size, `truth` that does not fit the image, or more than 12 panels, or none.
        MissingPackageError: matplotlib is not installed.
    """
    num_classes = features.config.num_classes
    if len(class_set.classes) != num_classes:
        raise ConfigError(
            f"class set {class_set.name!r} has {len(class_set.classes)} classes, the network {num_classes}"
        )
    check_panels(descriptors, channels)
    if truth is not None:
        check_labels(truth, features.image, class_set)
    sheet = _Sheet(features.image)
    _draw_enhancement(sheet, features, class_set, truth, title)
    _draw_attention(sheet, features, descriptors)
    _draw_refinement(sheet, features, channels)
    return sheet.page.figure()


class _Sheet:
    """A page with panels of one size, all of which show the image's frame, row by row from the top."""

    def __init__(self, image: ImageArray) -> None:
        self.page = Page()
        self.height = panel_height(image, _PANEL)
        self.top = 0.0
        self._extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)

    @staticmethod
    def left(column: int) -> float:
        return column * (_PANEL + _GAP)

    def heading(self, title: str, remark: str) -> None:
        self.page.text(0, self.top, title, bold=True)
        self.page.text(0, self.top + 0.19, remark, faint=True)
        self.top += 0.36

    def picture(self, column: int, pixels: npt.NDArray[Any], caption: str, remark: str = "", **options: Any) -> None:
        options = {"extent": self._extent, **options}
        place = self.left(column), self.top + CAPTION, _PANEL, self.height
        self.page.picture(*place, pixels, caption, remark, **options)

    def note(self, column: int, text: str) -> None:
        self.page.note(self.left(column), self.top + CAPTION, _PANEL, self.height, text)

    def next_row(self) -> None:
        self.top += CAPTION + self.height + 0.06

    def end_section(self) -> None:
        self.top += 0.2


def _draw_enhancement(sheet: _Sheet, features: Features, class_set: ClassSet, truth: Labels | None, title: str) -> None:
    sheet.heading(title, _describe(features))
    sheet.end_section()
    sheet.heading(
        "Global enhancement (Fig. 3)",
        "Above: first three principal components as red, green, blue, on the same axes for all features; each feature "
        "is centred and scaled to unit variance. Below: mean of |x| over the channels.",
    )
    size = f"{features.image.shape[1]}×{features.image.shape[0]}"
    sheet.picture(0, features.image, "input", size)
    found = [
        ("decoder feature A" if features.alpha is not None else "decoder feature", "", features.decoder),
        ("semantic descriptor map M", "Eq. 2", features.descriptor_map),
        ("enhanced decoder feature E", _describe_alpha(features), features.enhanced),
    ]
    present = [feature for _, _, feature in found if feature is not None]
    pictures = iter(_pca_colours(present))
    for column, (caption, remark, feature) in enumerate(found, 1):
        if feature is None:
            sheet.note(column, "FPN adds without enhancement")
            continue
        picture, constant = next(pictures)
        channels, height, width = feature.shape
        remark = remark or f"{channels} channels, {width}×{height}"
        sheet.picture(column, picture, caption, f"{remark}: constant over the image" if constant else remark)
    colours = class_colours(features.labels, class_set)
    remark = f"{len(np.unique(features.labels))} of {len(class_set.classes)} classes"
    if truth is not None:
        remark = describe_score(truth, features.labels, len(class_set.classes))
    sheet.picture(4, colours, "segmentation", remark, interpolation="nearest")
    if truth is None:
        sheet.note(5, "no ground truth")
    else:
        sheet.picture(5, class_colours(truth, class_set), "ground truth", interpolation="nearest")
    sheet.next_row()
    for column, (caption, _, feature) in enumerate(found, 1):
        if feature is not None:
            strength = np.abs(feature).mean(0)
            low, high = float(strength.min()), float(strength.max())
            limits = {"vmin": low, "vmax": high + _CONSTANT * high}
            remark = f"from {low:.3g} to {high:.3g}"
            symbol = caption.rsplit(" ", 1)[-1] if features.alpha is not None else "x"
            sheet.picture(column, strength, f"mean |{symbol}|", remark, cmap="viridis", **limits)
    maps = [features.labels] if truth is None else [features.labels, truth]
    legend = Legend(class_set, maps, 2 * _PANEL, rows=max(2, int(sheet.height / 0.2)))
    legend.draw(sheet.page, sheet.left(4), sheet.top + CAPTION)
    sheet.next_row()
    sheet.end_section()


def _describe(features: Features) -> str:
    config = features.config
    parts = [f"{config.architecture.upper()} with {config.encoder}, {config.channels} channels"]
    if config.architecture == "agln":
        parts[0] = f"{config.decoder} AGLN ({config.formulation}) with {config.encoder}, {config.channels} channels"
        parts.append(f"N = {config.num_descriptors}")
    parts.append(f"level {features.level} of the decoder ({SCALES[features.level]} of the image)")
    if features.alpha is not None:
        parts += [f"block {features.block}", f"α = {features.alpha:.3g}"]
    if features.gamma is not None:
        parts.append(f"γ = {features.gamma:.3g}")
    return ", ".join(parts)


def _describe_alpha(features: Features) -> str:
    if not features.alpha:
        return "α = 0: M has no influence"
    formula = "A + αM" if features.config.formulation == "release" else "Ψ(A + αM)"
    return f"{formula}, α = {features.alpha:.3g}, Eq. 3"


def _pca_colours(features: list[_Map]) -> list[tuple[npt.NDArray[np.float64], bool]]:
    """(C, h, w) each -> (h, w, 3) RGB in 0..1 each, and whether the feature is constant over the pixels (grey then).

    The axes are those of the pooled covariance of all features, each centred and divided by its overall deviation: Ψ
    changes mean and scale, which would drown the structure. Signs are fixed so that the largest weight is positive,
    and each colour runs from the 1st to the 99th percentile of all features together.
    """
    scaled, constant = [], []
    for feature in features:
        x = feature.reshape(len(feature), -1).astype(np.float64)
        centred = x - x.mean(1, keepdims=True)
        deviation = centred.std()
        constant.append(bool(deviation <= _CONSTANT * np.abs(x).max()))
        scaled.append(np.zeros_like(x) if constant[-1] else centred / deviation)
    covariance = sum((x @ x.T / x.shape[1] for x in scaled), np.zeros((len(scaled[0]),) * 2))
    axes = np.linalg.eigh(covariance)[1][:, :-4:-1]  # [C, 3], or [C, C] for C < 3
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])])
    projected = [axes.T @ x for x in scaled]
    low, high = np.percentile(np.concatenate(projected, 1), (1, 99), axis=1, keepdims=True)
    pictures = []
    for feature, x, even in zip(features, projected, constant, strict=True):
        colours = np.full((3, x.shape[1]), 0.5)
        if not even:
            colours[: len(x)] = np.clip((x - low) / np.maximum(high - low, np.finfo(np.float64).tiny), 0, 1)
        pictures.append((colours.T.reshape(*feature.shape[1:], 3), even))
    return pictures


def _draw_attention(sheet: _Sheet, features: Features, count: int) -> None:
    heading = "Attention of the semantic descriptors (Eq. 1)"
    if features.attention is None:
        why = "FPN has no descriptors." if features.alpha is None else "Average pooling: one descriptor, no attention."
        sheet.heading(heading, why)
        sheet.end_section()
        return
    total, height, width = features.attention.shape
    sheet.heading(
        heading,
        f"The most peaked of {total} maps ({width}×{height}), by entropy. Spread is exp(entropy) as a share of all "
        "pixels. Each from 0 to its 99.5th percentile.",
    )
    shares = spread(features.attention)
    for column, n in enumerate(peaked(features.attention, count)):
        attention = features.attention[n]
        limits = {"vmin": 0, "vmax": float(np.percentile(attention, 99.5))}
        sheet.picture(column, attention, f"descriptor {n}", f"spread {shares[n]:.1%}", cmap="magma", **limits)
    sheet.next_row()
    sheet.end_section()


def _draw_refinement(sheet: _Sheet, features: Features, count: int) -> None:
    rows = [("B", features.encoder)]
    remark = "Channels with the largest variance, each from its 1st to its 99th percentile"
    if features.refined is None:
        name = "FPN" if features.alpha is None else "AGLN−"
        remark += f". {name} has no Local Refinement Module."
    else:
        rows.append(("G", features.refined))
        remark += ". Above: B, before refinement; below: G, after it (Eq. 4, 5)"
        remark += f"; γG + B goes on, γ = {features.gamma:.3g}." if features.gamma is not None else "."
    sheet.heading("Encoder features and local refinement (Fig. 5)", remark)
    variance = features.encoder.reshape(len(features.encoder), -1).astype(np.float64).var(1)
    chosen = [int(c) for c in np.argsort(-variance, kind="stable")[:count]]
    for symbol, feature in rows:
        for column, c in enumerate(chosen):
            low, high = np.percentile(feature[c], (1, 99))
            remark = f"deviation {feature[c].std():.3g}"
            limits = {"vmin": float(low), "vmax": float(max(high, low + 1e-12))}
            sheet.picture(column, feature[c], f"{symbol}, channel {c}", remark, cmap="viridis", **limits)
        sheet.next_row()
