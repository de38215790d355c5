"""The options of a build, checked before anything is loaded: no module here needs PyTorch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from agln_fast import environment
from agln_fast.bundle import is_bundle
from agln_fast.contract import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    IOContract,
    Layout,
    Output,
    Resize,
    check_precision,
    parse_batch,
    parse_size,
)
from agln_fast.data.classes import ClassSet, class_set
from agln_fast.engines import check_threads
from agln_fast.engines.tensorrt_library import check_rtx_capabilities
from agln_fast.errors import ConfigError, MissingPackageError, choose, printable
from agln_fast.plan.plan import Plan, PlanChoice
from agln_fast.runtime.agreement import check_minimum
from agln_fast.runtime.images import list_images

__all__ = ["TARGETS", "BuildOptions", "check_options"]

TARGETS = ("cpu", "cuda", "tensorrt", "tensorrt-rtx")


@dataclass(frozen=True)
class BuildOptions:
    """What was asked of a build, in one form.

    precisions: of each target, each one of `Precision`, or "auto".
    tune_s: as in `build`, the environment considered.
    """

    contract: IOContract
    precisions: dict[str, tuple[str, ...]]
    tune_s: float | None
    destination: Path


def check_options(
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int] | str = (512, 512),
    precision: str | Sequence[str] | Mapping[str, Sequence[str]] = "auto",
    targets: str | Sequence[str] = ("cpu",),
    plan: PlanChoice = "auto",
    batch: int | tuple[int, int] | str = 1,
    layout: Layout = "uint8_nhwc",
    output: Output = "labels",
    resize: Resize = "stretch",
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    classes: str | Sequence[str] | ClassSet | None = None,
    compute_capabilities: Sequence[str] = (),
    workspace_bytes: int | None = None,
    timing_cache: Path | None = None,
    samples: str | os.PathLike[str] | None = None,
    min_agreement: float | None = None,
    tune_s: float | None = None,
    threads: int | None = None,
    overwrite: bool = False,
) -> BuildOptions:
    """Check every option of `agln_fast.build` (where they are explained) that can be judged without the network.

    Raises:
        ConfigError: a name or a value that makes no sense, or a destination that cannot be written.
        MissingPackageError: int8 without NNCF or OpenVINO.
        ImageError: no image at `samples`.
    """
    contract = IOContract(
        *parse_size(size), *parse_batch(batch), layout=layout, output=output, resize=resize, mean=mean, std=std
    )
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    if isinstance(precision, Mapping):
        if set(precision) != set(targets):
            raise ConfigError(f"precision names the targets {', '.join(precision)}, targets {', '.join(targets)}")
        precisions = {target: tuple(precision[target]) for target in targets}
    else:
        precisions = dict.fromkeys(targets, (precision,) if isinstance(precision, str) else tuple(precision))
    for kind in chain(*precisions.values()):
        check_precision(kind, "auto")
    if not precisions or not all(precisions.values()):
        raise ConfigError(f"give at least one precision, and one target of {', '.join(TARGETS)}")
    for target in targets:
        choose("target", target, TARGETS)
    for target, kinds in precisions.items():
        if "int8" in kinds and target != "cpu":
            raise ConfigError(f"precision 'int8' is for target cpu, not for {target}: build them as two bundles")
    if "int8" in precisions.get("cpu", ()):
        for package in ("nncf", "openvino"):
            if find_spec(package) is None:
                raise MissingPackageError(package, "int8")
    if compute_capabilities and "tensorrt-rtx" not in targets:
        raise ConfigError(
            "compute capabilities are for target tensorrt-rtx; the others build for the GPU that is there"
        )
    check_rtx_capabilities(compute_capabilities)
    if timing_cache is not None and "tensorrt" not in targets:
        raise ConfigError("timing cache: only target tensorrt has one")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ConfigError(f"workspace of {workspace_bytes} bytes: must be at least 1")
    check_minimum(min_agreement)
    tune_s = environment.tuning_seconds() if tune_s is None else tune_s
    if tune_s is not None and not 0 <= tune_s < math.inf:
        raise ConfigError(f"{tune_s} seconds to choose plans in: must be 0 or more, and end")
    check_threads(threads)
    if not isinstance(plan, Plan) and plan not in ("auto", "none"):
        raise ConfigError(f"plan {plan!r}: give 'auto', 'none', or an agln_fast.Plan")
    if isinstance(classes, str):
        class_set(classes)
    if samples is not None:
        list_images(os.fspath(samples))
    return BuildOptions(contract, precisions, tune_s, _destination(Path(path), overwrite))


def _destination(path: Path, overwrite: bool) -> Path:
    if not path.name:
        raise ConfigError(f"{path}: is no name for a bundle; give one such as {path / 'street.agln'}")
    path = path if path.suffix == ".agln" else path.with_name(path.name + ".agln")
    try:
        exists = path.exists()
    except OSError as error:
        raise ConfigError(f"{printable(path)}: cannot be written ({error.strerror}); choose another name") from None
    if exists:
        if not overwrite:
            raise ConfigError(
                f"{path}: exists already; choose another name, or replace it with --force (overwrite=True)"
            )
        if not is_bundle(path):
            raise ConfigError(f"{path}: exists and is no bundle, so it is not replaced; choose another name")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{path}: there is no folder {folder}; create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{path}: the folder {folder} cannot be written; check its permissions, or choose another")
    return path
