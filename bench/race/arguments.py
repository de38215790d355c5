"""What a run of the suite is asked for, checked before anything is loaded: no module here needs PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from agln_fast.contract import IOContract
from agln_fast.engines import check_device
from agln_fast.engines import targets as known_targets
from agln_fast.errors import ConfigError, choose
from agln_fast.models.config import preset
from agln_fast.precision import check_precision

__all__ = [
    "BUDGET_S",
    "DEFAULT_NETWORKS",
    "TRAINED_NETWORKS",
    "check_cases",
    "check_counts",
    "check_ladder",
    "check_precisions",
    "choose_device",
]

DEFAULT_NETWORKS = ("fpn_resnet50", "agln_resnet50", "agln_lite_resnet50")
TRAINED_NETWORKS = ("fpn_nano", "agln_nano", "agln_lite_nano")
"""Those that ship, which have an accuracy of their own."""
BUDGET_S = 270.0
"""Wall clock of a run that is not full, which takes five minutes with all that comes before and after."""


def choose_device(targets: Sequence[str], device: str | None = None) -> str:
    """`device` itself; None for where the targets run.

    Raises:
        ConfigError: an unknown target or device, or targets of two devices.
    """
    for target in targets:
        choose("target", target, known_targets())
    kinds = {"cpu" if target == "cpu" else "cuda" for target in targets}
    if device is None and len(kinds) != 1:
        raise ConfigError(f"targets {', '.join(targets)}: measure those of the CPU and of the GPU one after the other")
    check_device(device)
    return device or kinds.pop()


def check_precisions(precision: str | Sequence[str]) -> list[str]:
    """One precision or several, as a list; "auto" stands for all.

    Raises:
        ConfigError: an unknown one.
    """
    return [check_precision(kind, "auto") for kind in ([precision] if isinstance(precision, str) else precision)]


def check_cases(networks: Sequence[str], size: tuple[int, int], batch: int, num_classes: int) -> None:
    """Refuse presets, inputs and numbers of classes that cannot be.

    Raises:
        ConfigError: an unknown preset, or an impossible number.
    """
    IOContract(*size, batch, batch)
    for name in networks:
        preset(name, num_classes)


def check_counts(warmup: int, iters: int) -> None:
    """
    Raises:
        ConfigError: rounds that cannot be.
    """
    if warmup < 0 or iters < 1:
        raise ConfigError(f"warmup {warmup}, iters {iters}: need at least 0 and 1")


def check_ladder(device: str) -> None:
    """
    Raises:
        ConfigError: `device` is not the CPU, where OpenVINO is.
    """
    if device != "cpu":
        raise ConfigError(f"a ladder is of OpenVINO, which runs on the CPU: leave --ladder out on {device}")
