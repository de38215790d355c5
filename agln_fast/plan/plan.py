"""A plan: which rewrites are applied before a network is compiled. It is data, and loads without PyTorch.

The fields of `Plan` are the table of rewrites, in the order in which they are applied. Each stands for the function of
its name, which says why it is exact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, get_args

from agln_fast.errors import ConfigError, choose

__all__ = ["ALGEBRA", "FUSED", "NOT_MIXED", "NO_PLAN", "STAGES", "MixForm", "Plan", "PlanChoice", "Rewrite"]

MixForm = Literal["none", "rows", "full"]
STAGES = 4
"""How many stages of a network Winograd's convolutions may serve."""

NOT_MIXED: tuple[MixForm, ...] = ("none", "none", "none")


@dataclass(frozen=True)
class Rewrite:
    """A row of the table: what a plan may say of a rewrite, which is on or off.

    turns: when `tune` decides on it, those with the largest effect first; as often as its value has parts. Empty where
        there is nothing to decide.
    needs: another rewrite, which must be on with it. excludes: one that must be off.
    on_host: it moves work to the host, which a cost model of the network does not see; for engines that give labels.
    guessed: what a cost model knows least about; the lowest number first.
    everywhere: it only leaves work out, on any machine.
    module: where its function stands.
    """

    turns: tuple[float, ...] = ()
    needs: str = ""
    excludes: str = ""
    on_host: bool = False
    guessed: int | None = None
    everywhere: bool = False
    module: str = "agln_fast.plan.rewrites"

    off: ClassVar[Any] = False

    def field(self) -> Any:
        """Of a class of plans."""
        return field(default=self.off, metadata={"rewrite": self})

    def checked(self, name: str, value: Any) -> Any:
        """
        Raises:
            ConfigError: `value` is none of the rewrite's, whose name is `name`.
        """
        if not isinstance(value, bool):
            raise ConfigError(f"{name} {value!r}: must be true or false")
        return value

    def others(self, value: Any, part: int) -> list[Any]:
        """What may be tried in the place of `value`, whose part number `part` is to be decided on."""
        return [not value]

    def parts(self, value: Any) -> list[bool]:
        """Which parts of the network `value` changes."""
        return [value != self.off]

    def words(self, name: str, value: Any) -> str:
        """The rewrite and all that `value` says about it."""
        return name


class _Forms(Rewrite):
    off: ClassVar[Any] = NOT_MIXED

    def checked(self, name: str, value: Any) -> Any:
        known = get_args(MixForm)
        if (
            not isinstance(value, list | tuple)
            or len(value) != len(NOT_MIXED)
            or not all(isinstance(form, str) and form in known for form in value)
        ):
            raise ConfigError(f"{name} {value!r}: give a list of {len(NOT_MIXED)} of {', '.join(known)}")
        return tuple(value)

    def others(self, value: Any, part: int) -> list[Any]:
        forms = [form for form in get_args(MixForm) if form != value[part]]
        return [(*value[:part], form, *value[part + 1 :]) for form in forms]

    def parts(self, value: Any) -> list[bool]:
        return [form != "none" for form in value]

    def words(self, name: str, value: Any) -> str:
        return f"{name}({', '.join(value)})"


class _Stages(Rewrite):
    off: ClassVar[Any] = 0

    def checked(self, name: str, value: Any) -> Any:
        if type(value) is not int or not 0 <= value <= STAGES:
            raise ConfigError(f"{name} {value!r}: give a number of stages, 0 to {STAGES}")
        return value

    def others(self, value: Any, part: int) -> list[Any]:
        return [count for count in range(STAGES) if count != value]  # the coarsest, 1/32, has too few tiles for it

    def words(self, name: str, value: Any) -> str:
        return f"{name}({value})"


@dataclass(frozen=True)
class Plan:
    """Exact rewrites, each on or off; docs/plans.md explains them all.

    mix_before_upsample: a form for each coarse group of conv5, 1/32, 1/16, 1/8: "none", "rows" or "full"; needs
        fold_batchnorm.
    winograd: how many stages, from 1/4 of the image to coarser ones, have their 3x3 convolutions done so.
    low_resolution_labels: the engine returns logits before their last resize, the host makes labels of them; without
        effect where logits are asked for.
    kernels: the attention, resizes and labels are ops of `agln_fast.kernels`; for what can run them.
    """

    fold_batchnorm: bool = Rewrite(everywhere=True).field()
    drop_attention_bias: bool = Rewrite(everywhere=True).field()
    drop_dead_branches: bool = Rewrite(everywhere=True).field()
    pool_before_projection: bool = Rewrite(everywhere=True).field()
    project_descriptors: bool = Rewrite(everywhere=True).field()
    negate_energy: bool = Rewrite(everywhere=True).field()
    distribute_before_upsample: bool = Rewrite(turns=(6,)).field()
    energy_before_upsample: bool = Rewrite(turns=(7,)).field()
    pixel_major_attention: bool = Rewrite(turns=(5,)).field()
    # Whether the finest group pays hangs on how fast the convolution is that it makes smaller: after `winograd`.
    mix_before_upsample: tuple[MixForm, ...] = _Forms(
        turns=(0, 1, 3), needs="fold_batchnorm", guessed=1, module="agln_fast.plan.mix_before_upsample"
    ).field()
    winograd: int = _Stages(turns=(2,), guessed=0, module="agln_fast.plan.winograd").field()
    low_resolution_labels: bool = Rewrite(turns=(4,), on_host=True).field()
    kernels: bool = Rewrite(needs="fold_batchnorm", excludes="winograd", module="agln_fast.plan.fuse").field()

    def __post_init__(self) -> None:
        for name, rewrite in self.table().items():
            object.__setattr__(self, name, rewrite.checked(name, getattr(self, name)))
        for name, rewrite, _ in self.steps():
            if rewrite.needs and not getattr(self, rewrite.needs):
                raise ConfigError(f"{name} needs {rewrite.needs}")
            if rewrite.excludes and getattr(self, rewrite.excludes) != self.table()[rewrite.excludes].off:
                raise ConfigError(f"{name} and {rewrite.excludes} exclude each other")

    def __str__(self) -> str:
        return ", ".join(rewrite.words(name, value) for name, rewrite, value in self.steps()) or "none"

    @classmethod
    def table(cls) -> dict[str, Rewrite]:
        """All rewrites, in the order in which they are applied."""
        return {row.name: row.metadata["rewrite"] for row in fields(cls)}

    def parts(self, name: str) -> list[bool]:
        """Which parts of the network the rewrite `name` changes."""
        return self.table()[name].parts(getattr(self, name))

    def steps(self) -> Iterator[tuple[str, Rewrite, Any]]:
        """Those that are on, in this order, with their values."""
        for name, rewrite in self.table().items():
            if (value := getattr(self, name)) != rewrite.off:
                yield name, rewrite, value

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}

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
        known = list(cls.table())
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
ALGEBRA = Plan.from_dict({name: True for name, rewrite in Plan.table().items() if rewrite.everywhere})
"""What only leaves work out, on any machine; the rest trades one kind of work for another: `tune` decides."""
FUSED = replace(ALGEBRA, mix_before_upsample=("full", "full", "full"), kernels=True)
"""The fused network's; see `agln_fast.plan.fuse.fused_plan`."""

PlanChoice = Literal["auto", "none"] | Plan
"""What a user may ask for: the fastest plan for each engine, no rewrites, or one plan for all engines."""
