"""What a network is: `ModelConfig`, and the presets that have a name."""

from __future__ import annotations

import fnmatch
import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from agln_fast.errors import ConfigError, choose

__all__ = ["Architecture", "Encoder", "Formulation", "ModelConfig", "list_models", "preset"]

Architecture = Literal["fcn8s", "fcn", "fpn", "agln"]
Formulation = Literal["paper", "release"]
Encoder = Literal[
    "resnet18", "resnet34", "resnet50", "resnet101",
    "resnet18s", "resnet34s", "resnet50s", "resnet101s",
    "resnet18c", "resnet34c", "resnet50c", "resnet101c",
]  # fmt: skip

_DESCRIPTORS = {"paper": 128, "release": 64}
_LIMITS = {"num_classes": 32767, "channels": 4096, "num_descriptors": 4096}


@dataclass(frozen=True)
class ModelConfig:
    """A member of the AGLN family. Equal configs build equal networks.

    architecture: "fcn8s" (dilated encoder, no decoder), "fcn" (the same of torchvision and MMSegmentation), "fpn" (the
        baseline) or "agln".
    encoder: ResNet depth; a trailing "s" or "c" is a deep stem of three 3x3 convolutions, to 64, 64 and 128 channels
        with "s", to 32, 32 and 64 with "c", as in MMSegmentation's ResNetV1c.
    num_classes: K.
    width: factor on all encoder channels, for small models.
    channels: C, the channels of the decoder (the classifier's hidden layer has 2C).
    align_corners: of every resize; None for no with "fcn", which alone has the choice, and yes with all others.
    concat_input: "fcn" only: MMSegmentation's head, whose last 3x3 convolution reads the last stage beside what two
        others made of it; otherwise torchvision's, a single one.
    The rest concerns "agln" only:
    formulation: the paper's equations, or the network its authors released (docs/models.md).
    decoder: Fig. 4: "straight", one CFB per level, or "dense", chains of one, two and three.
    pooling: SAB by attention (Eq. 1) or by global average (GAP, one descriptor).
    num_descriptors: N; None for 128 (paper), 64 (release) or 1 (GAP).
    channel_resampling, spatial_gating: Eq. 4 and Eq. 5; with neither it is AGLN−, global enhancement only.
    learnable_alpha, learnable_beta: α of Eq. 3 and β of Eq. 6; fixed to 1 if not learnable.
    lite: the 3x3 convolutions of the CFBs are depthwise separable.
    """

    architecture: Architecture
    encoder: Encoder
    num_classes: int
    width: float = 1.0
    channels: int = 256
    align_corners: bool | None = None
    concat_input: bool = False
    formulation: Formulation = "paper"
    decoder: Literal["straight", "dense"] = "dense"
    pooling: Literal["attention", "average"] = "attention"
    num_descriptors: int | None = None
    channel_resampling: bool = True
    spatial_gating: bool = True
    learnable_alpha: bool = True
    learnable_beta: bool = True
    lite: bool = False

    def __post_init__(self) -> None:
        choices = {
            "architecture": get_args(Architecture),
            "encoder": get_args(Encoder),
            "formulation": get_args(Formulation),
            "decoder": ("straight", "dense"),
            "pooling": ("attention", "average"),
        }
        for name, allowed in choices.items():
            choose(name, getattr(self, name), allowed)
        if self.num_descriptors is None:
            default = 1 if self.pooling == "average" else _DESCRIPTORS[self.formulation]
            object.__setattr__(self, "num_descriptors", default)
        if self.align_corners is None:
            object.__setattr__(self, "align_corners", self.architecture != "fcn")
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise ConfigError(f"{name} {value!r}: must be a whole number from 1 to {limit}")
        for field in fields(self):
            if field.type in ("bool", "bool | None") and not isinstance(getattr(self, field.name), bool):
                raise ConfigError(f"{field.name} {getattr(self, field.name)!r}: must be true or false")
        if not isinstance(self.width, int | float) or isinstance(self.width, bool) or not 1 / 64 <= self.width <= 8:
            raise ConfigError(f"width {self.width!r}: must be a number from 1/64 to 8")
        if self.architecture != "fcn" and (self.concat_input or not self.align_corners):
            name = "concat_input" if self.concat_input else "align_corners"
            raise ConfigError(
                f"{name} {getattr(self, name)}: only architecture 'fcn' has it, not {self.architecture!r}"
            )
        if self.pooling == "average" and self.num_descriptors != 1:
            raise ConfigError(f"num_descriptors {self.num_descriptors}: average pooling gives exactly 1")

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Build from plain types.

        Raises:
            ConfigError: an unknown, missing or impossible field.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            choose("field", name, known, where="model config")
        missing = [name for name in ("architecture", "encoder", "num_classes") if name not in values]
        if missing:
            raise ConfigError(f"model config: missing field {missing[0]!r}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """The inverse of `to_json`.

        Raises:
            ConfigError: not JSON, or not a config.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"model config: not JSON ({error})") from None
        if not isinstance(values, dict):
            raise ConfigError(f"model config: needs a JSON object, got {type(values).__name__}")
        return cls.from_dict(values)


_GEM: dict[str, Any] = {"decoder": "straight", "channel_resampling": False, "spatial_gating": False}
_VARIANTS: dict[str, dict[str, Any]] = {
    "fcn8s": {"architecture": "fcn8s"},
    "fcn": {"architecture": "fcn"},
    "fcn_concat": {"architecture": "fcn", "concat_input": True},
    "fpn": {"architecture": "fpn"},
    "agln": {},
    "agln_lite": {"lite": True},
    "agln_release": {"formulation": "release"},
    "agln_straight": {"decoder": "straight"},
    "agln_straight_alpha1": {"decoder": "straight", "learnable_alpha": False},
    "agln_straight_beta1": {"decoder": "straight", "learnable_beta": False},
    "agln_straight_alpha1_beta1": {"decoder": "straight", "learnable_alpha": False, "learnable_beta": False},
    "agln_straight_lite": {"decoder": "straight", "lite": True},
    "agln_minus": _GEM,
    "agln_minus_gap": {**_GEM, "pooling": "average"},
    "agln_minus_n1": {**_GEM, "num_descriptors": 1},
    "agln_minus_n64": {**_GEM, "num_descriptors": 64},
    "agln_minus_n256": {**_GEM, "num_descriptors": 256},
    "agln_minus_cr": {**_GEM, "channel_resampling": True},
    "agln_minus_sg": {**_GEM, "spatial_gating": True},
}
_PRESETS = {
    f"{variant}_{encoder}": {"architecture": "agln", "encoder": encoder, **settings}
    for variant, settings in _VARIANTS.items()
    for encoder in get_args(Encoder)
}
# Small enough to train on two CPU cores, and to ship. The formulation is that of the release, which learns from random
# weights several times faster than the paper's (docs/training.md); N = 32 unless the variant says otherwise.
_NANO: dict[str, Any] = {"encoder": "resnet18", "width": 0.25, "channels": 32}
for _variant, _settings in (_VARIANTS | {"agln_paper": {"formulation": "paper"}}).items():
    _nano = {"architecture": "agln", **_NANO, "formulation": "release", "num_descriptors": 32, **_settings}
    if _nano["architecture"] != "agln":
        del _nano["formulation"], _nano["num_descriptors"]
    elif _nano.get("pooling") == "average":
        del _nano["num_descriptors"]
    if _variant != "agln_release":
        _PRESETS[f"{_variant}_nano"] = _nano


def list_models(pattern: str = "*") -> list[str]:
    """Names of the presets that match the shell-style `pattern`, such as `"agln*"`."""
    return fnmatch.filter(_PRESETS, pattern.lower())


def preset(name: str, num_classes: int, **overrides: Any) -> ModelConfig:
    """The config of the preset `name` with `num_classes` classes; `overrides` are fields of `ModelConfig`.

    Raises:
        ConfigError: an unknown name or field (with the closest known ones), or an impossible value.
    """
    settings = _PRESETS[choose("model", name, _PRESETS, listed="agln_fast.list_models()")]
    return ModelConfig.from_dict({**settings, "num_classes": num_classes, **overrides})
