"""A plan: which rewrites are applied before a network is compiled. It is data, and loads without PyTorch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from agln_fast.errors import ConfigError, choose

__all__ = ["ALGEBRA", "NOT_MIXED", "NO_PLAN", "STAGES", "MixForm", "Plan", "PlanChoice"]

MixForm = Literal["none", "rows", "full"]
STAGES = 4
"""How many stages of a network Winograd's convolutions may serve."""

NOT_MIXED: tuple[MixForm, ...] = ("none", "none", "none")


@dataclass(frozen=True)
class Plan:
    """Exact rewrites, each on or off; docs/plans.md explains them all.

    mix_before_upsample: a form for each coarse group of conv5, 1/32, 1/16, 1/8: "none", "rows" or "full"; needs
        fold_batchnorm.
    winograd: how many stages, from 1/4 of the image to coarser ones, have their 3x3 convolutions done so.
    low_resolution_labels: the engine returns logits at a quarter of the size, the host makes labels of them; without
        effect where logits are asked for.
    """

    fold_batchnorm: bool = False
    pool_before_projection: bool = False
    drop_attention_bias: bool = False
    project_descriptors: bool = False
    negate_energy: bool = False
    drop_dead_branches: bool = False
    distribute_before_upsample: bool = False
    energy_before_upsample: bool = False
    pixel_major_attention: bool = False
    mix_before_upsample: tuple[MixForm, ...] = NOT_MIXED
    winograd: int = 0
    low_resolution_labels: bool = False

    def __post_init__(self) -> None:
        known, forms = get_args(MixForm), self.mix_before_upsample
        if (
            not isinstance(forms, list | tuple)
            or len(forms) != len(NOT_MIXED)
            or not all(isinstance(form, str) and form in known for form in forms)
        ):
            raise ConfigError(f"mix_before_upsample {forms!r}: give a list of {len(NOT_MIXED)} of {', '.join(known)}")
        forms = tuple(forms)
        object.__setattr__(self, "mix_before_upsample", forms)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise ConfigError(f"{field.name} {value!r}: must be true or false")
        if type(self.winograd) is not int or not 0 <= self.winograd <= STAGES:
            raise ConfigError(f"winograd {self.winograd!r}: give a number of stages, 0 to {STAGES}")
        if forms != NOT_MIXED and not self.fold_batchnorm:
            raise ConfigError("mix_before_upsample needs fold_batchnorm: it splits the folded convolution")

    def __str__(self) -> str:
        names = [field.name for field in fields(self) if getattr(self, field.name) is True]
        if self.mix_before_upsample != NOT_MIXED:
            names.append(f"mix_before_upsample({', '.join(self.mix_before_upsample)})")
        if self.winograd:
            names.append(f"winograd({self.winograd})")
        return ", ".join(names) or "none"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "mix_before_upsample": list(self.mix_before_upsample)}

    def to_json(self) -> str:
        """As a file for `--plan`."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_dict(cls, values: Any) -> Plan:
        """The inverse of `to_dict`; what is left out is off.

        Raises:
            ConfigError: not a mapping, an unknown name, or a value that no rewrite has.
        """
        if not isinstance(values, dict):
            raise ConfigError("a plan is a JSON object of rewrites; `agln-fast inspect BUNDLE --json` shows some")
        known = [field.name for field in fields(cls)]
        for name in values:
            choose("rewrite", name, known)
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`.

        Raises:
            ConfigError: not JSON, or not a plan.
        """
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"not a plan: {error}") from None
        return cls.from_dict(values)


NO_PLAN = Plan()
# What only leaves work out, on any machine; the rest trades one kind of work for another: `tune` decides.
ALGEBRA = Plan(
    fold_batchnorm=True,
    pool_before_projection=True,
    drop_attention_bias=True,
    project_descriptors=True,
    negate_energy=True,
    drop_dead_branches=True,
)

PlanChoice = Literal["auto", "none"] | Plan
"""What a user may ask for: the fastest plan for each engine, no rewrites, or one plan for all engines."""
