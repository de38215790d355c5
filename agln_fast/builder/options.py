"""What is asked of a build, checked before anything is loaded: no module here needs PyTorch."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from agln_fast import environment
from agln_fast.builder.pictures import Pictures, Unlabelled
from agln_fast.bundle import is_bundle
from agln_fast.contract import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    IOContract,
    Layout,
    Output,
    Resize,
    parse_batch,
    parse_size,
)
from agln_fast.data.classes import ClassSet, class_set
from agln_fast.data.dataset import SegmentationDataset
from agln_fast.data.layout import is_described
from agln_fast.data.registry import is_path, open_dataset
from agln_fast.engines import KINDS, EngineKind, check_threads, targets
from agln_fast.errors import ConfigError, MissingPackageError, choose, printable
from agln_fast.models.config import ModelConfig
from agln_fast.plan.plan import FUSED, NO_PLAN, Plan, PlanChoice
from agln_fast.precision import Precision, check_minimum, check_precision
from agln_fast.runtime.images import list_images

if TYPE_CHECKING:
    from rich.progress import Progress

    from agln_fast.models.networks import SegmentationNetwork

__all__ = ["BuildOptions", "Wanted"]


Kernels = Literal["auto", "none", "only", "both"]
_log = logging.getLogger("agln_fast.build")


@dataclass(frozen=True)
class Wanted:
    """An engine to build."""

    kind: EngineKind
    precision: Precision
    target: str
    kernels: bool = False

    @property
    def name(self) -> str:
        return self.kind.engine_name(self.precision, FUSED if self.kernels else NO_PLAN)

    @property
    def of_weights(self) -> bool:
        """It has no file of its own."""
        return self.kind.graph_type(self.precision) is None


@dataclass(frozen=True)
class BuildOptions:
    """The parameters of `agln_fast.build`; made only of what makes sense.

    checkpoint: a file that `load_checkpoint` reads, or a network.
    path: the folder to write; ".agln" is appended unless it is there.
    size: (height, width) of the engine's input in pixels, or "HxW".
    precision: "fp32", "fp16", "bf16", "int8", "auto", or several, or a mapping from each target to these. "auto" is
        fp16 on GPUs; on the CPU it is fp32, and bf16 where the CPU has it. int8 needs NNCF, and is kept if it loses at
        most `max_miou_loss` on Scenes, where the network has Scenes' classes. `load` takes the fastest.
    targets: of `agln_fast.engines.targets`; "cuda" is the fused runtime on any CUDA device.
    plan: the rewrites before an engine is compiled: "auto" for the fastest ones for each engine (see `tune`), "none",
        or a `Plan` for all. Target "cuda" and the reference have rewrites of their own, and none.
    kernels: for TensorRT and TensorRT-RTX: engines of their own operations ("none"), with the attention, resizes and
        labels as kernels of ours ("only"), or both of them ("both"); "auto" for both where our layers can be compiled.
    batch: images a run, or (smallest, largest), or "SMALLEST..LARGEST".
    layout, output, resize, mean, std: see `IOContract`.
    classes: a class set, its name (`agln_fast.data.list_class_sets`), or the K names; None for those of the
        checkpoint, of `data`, or else by K.
    config: what the network is, where the checkpoint cannot tell.
    weights: which of several weights of the checkpoint are taken, see `load_checkpoint`.
    compute_capabilities: for tensorrt-rtx, e.g. ("sm86",); none for all that it supports.
    workspace_bytes: limit of TensorRT's scratch memory; None for the library's own.
    timing_cache: file that tensorrt reads and updates; tensorrt-rtx has none.
    data: what to calibrate and to judge engines by instead of Scenes: a dataset as `open_dataset` takes it, or opened;
        or an image, folder or pattern without masks. What is less precise than fp32 is then kept by what it loses on
        it. Names and colours of the classes are its own where neither `classes` nor the checkpoint gives them.
        data_root, split, skip_bad: as there.
    calibration: images that int8 is calibrated on; None for 128, or half of `data` where it has fewer than 256. Engines
        are judged by the others.
    max_miou_loss: points of mIoU that an engine may lose against the fp32 reference; without masks points of the
        agreement with it, see `agln_fast.evaluation.loss`.
    samples: image, folder or pattern to verify with; None for some of `data`, or Scenes.
    min_agreement: smallest share of equal labels, 0..1; None for 0.999 in fp32, 0.99 (weighted) in half, 0.97 in int8,
        and with `data` none below fp32.
    tune_s: seconds for each engine to choose its plan in, see `tune`; None for a short race.
    threads: CPU threads for races and the verification.
    strict: deliver nothing if one engine disagrees.
    overwrite: replace an existing bundle.
    progress: a rich progress display that the caller has started. It shows each step with its number and its time; one
        that is disabled prints a line for each. Without it they go to the logger "agln_fast.build".

    Raises:
        ConfigError: a name or a value that makes no sense, or a destination that cannot be written.
        MissingPackageError: without a package that an engine is made by.
        BuildError: an engine that can only be made where it runs, on another machine.
        ImageError: no image at `samples` or `data`.
        DatasetError: `data` is missing, incomplete or damaged.
    """

    checkpoint: str | os.PathLike[str] | SegmentationNetwork
    path: str | os.PathLike[str]
    _: KW_ONLY
    size: tuple[int, int] | str = (512, 512)
    precision: str | Sequence[str] | Mapping[str, Sequence[str]] = "auto"
    targets: str | Sequence[str] = ("cpu",)
    plan: PlanChoice = "auto"
    kernels: Kernels = "auto"
    batch: int | tuple[int, int] | str = 1
    layout: Layout = "uint8_nhwc"
    output: Output = "labels"
    resize: Resize = "stretch"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    classes: str | Sequence[str] | ClassSet | None = None
    config: ModelConfig | None = None
    weights: str | None = None
    compute_capabilities: Sequence[str] = ()
    workspace_bytes: int | None = None
    timing_cache: Path | None = None
    data: str | os.PathLike[str] | SegmentationDataset | None = None
    data_root: str | os.PathLike[str] | None = None
    split: str | None = None
    skip_bad: bool = False
    calibration: int | None = None
    max_miou_loss: float = 0.5
    samples: str | os.PathLike[str] | None = None
    min_agreement: float | None = None
    tune_s: float | None = None
    threads: int | None = None
    strict: bool = False
    overwrite: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.contract  # noqa: B018  # which refuses what it cannot be
        self._check_engines()
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise ConfigError(f"workspace of {self.workspace_bytes} bytes: must be at least 1")
        check_minimum(self.min_agreement)
        if self.budget_s is not None and not 0 <= self.budget_s < math.inf:
            raise ConfigError(f"{self.budget_s} seconds to choose plans in: must be 0 or more, and end")
        check_threads(self.threads)
        if not isinstance(self.plan, Plan) and self.plan not in ("auto", "none"):
            raise ConfigError(f"plan {self.plan!r}: give 'auto', 'none', or an agln_fast.Plan")
        if self.weights is not None and not isinstance(self.checkpoint, str | os.PathLike):
            raise ConfigError(f"weights {self.weights!r}: only a file holds several, and this is a network in memory")
        if isinstance(self.classes, str):
            class_set(self.classes)
        if self.samples is not None:
            list_images(os.fspath(self.samples))
        if not 0 <= self.max_miou_loss < math.inf:
            raise ConfigError(f"max_miou_loss {self.max_miou_loss}: must be 0 or more percentage points, and end")
        self.pictures  # noqa: B018
        self.destination  # noqa: B018

    @cached_property
    def contract(self) -> IOContract:
        """Of all engines."""
        return IOContract(
            *parse_size(self.size),
            *parse_batch(self.batch),
            layout=self.layout,
            output=self.output,
            resize=self.resize,
            mean=self.mean,
            std=self.std,
        )

    @property
    def budget_s(self) -> float | None:
        """`tune_s`, the environment considered."""
        return environment.tuning_seconds() if self.tune_s is None else self.tune_s

    @cached_property
    def precisions(self) -> dict[str, tuple[str, ...]]:
        """Of each target, each one of `Precision`, or "auto"."""
        asked = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        if not isinstance(self.precision, Mapping):
            return dict.fromkeys(asked, (self.precision,) if isinstance(self.precision, str) else tuple(self.precision))
        if set(self.precision) != set(asked):
            raise ConfigError(f"precision names the targets {', '.join(self.precision)}, targets {', '.join(asked)}")
        return {target: tuple(self.precision[target]) for target in asked}

    @cached_property
    def wanted(self) -> list[Wanted]:
        """Every engine that the precisions of each target ask for, then those that come with every bundle."""
        engines = []
        for target, precisions in self.precisions.items():
            kinds = [kind for kind in KINDS.values() if kind.target == target]
            automatic = [precision for kind in kinds for precision in kind.automatic()]
            resolved = [each for asked in precisions for each in (automatic if asked == "auto" else [asked])]
            for precision in map(check_precision, dict.fromkeys(resolved)):
                for kind in [kind for kind in kinds if precision in kind.precisions]:
                    variants = self._variants if kind.takes_kernels and precision != "int8" else (False,)
                    engines += [Wanted(kind, precision, target, kernels) for kernels in variants]
        engines += [Wanted(kind, "fp32", "cpu") for kind in KINDS.values() if kind.graph_type("fp32") is None]
        return list({engine.name: engine for engine in engines}.values())

    @cached_property
    def _variants(self) -> tuple[bool, ...]:
        """Without and with kernels of ours, of what may have them."""
        if self.kernels != "auto":
            return {"none": (False,), "only": (True,), "both": (False, True)}[self.kernels]
        from agln_fast.export.plugins import obstacle

        if reason := obstacle():
            _log.warning("engines without kernels of ours: %s", reason)
            return (False,)
        return False, True

    @cached_property
    def pictures(self) -> Pictures:
        """What is calibrated on, and judged by."""
        calibrates = any(engine.precision == "int8" for engine in self.wanted)
        if self.calibration is not None and not calibrates:
            raise ConfigError("calibration: only int8 engines are calibrated; add precision int8, or leave it away")
        data = self._data()
        if data is not None and not isinstance(data, Unlabelled) and find_spec("torchmetrics") is None:
            raise MissingPackageError("torchmetrics", "eval")
        return Pictures(data, self.calibration, calibrates)

    def _data(self) -> SegmentationDataset | None:
        data, root = self.data, self.data_root
        if data is None or isinstance(data, SegmentationDataset):
            if root is not None:
                raise ConfigError("data_root is the folder of a dataset: name that with data, too")
            return data
        if root is None and not is_described(data) and (is_path(data) or set("*?[") & set(os.fspath(data))):
            if self.split is not None:
                raise ConfigError(f"split {self.split!r}: {data} holds images without masks, and no splits")
            return Unlabelled(data)
        return open_dataset(data, self.split, root, skip_bad=self.skip_bad)

    @cached_property
    def destination(self) -> Path:
        """Where the bundle will be."""
        return _destination(Path(self.path), self.overwrite)

    def _check_engines(self) -> None:
        known = targets()
        asked = self.precisions
        for precision in chain(*asked.values()):
            check_precision(precision, "auto")
        if not asked or not all(asked.values()):
            raise ConfigError(f"give at least one precision, and one target of {', '.join(known)}")
        for target, precisions in asked.items():
            choose("target", target, known)
            for precision in precisions:
                able = sorted({k.target for k in KINDS.values() if k.target is not None and precision in k.precisions})
                if precision != "auto" and target not in able:
                    raise ConfigError(
                        f"precision {precision!r} is for target {', '.join(able)}, not for {target}: "
                        "build them as two bundles"
                    )
        choosing = [kind.target for kind in KINDS.values() if kind.chooses_capabilities]
        if self.compute_capabilities and not set(choosing) & set(asked):
            raise ConfigError(
                f"compute capabilities are for target {', '.join(map(str, choosing))}; "
                "the others build for the GPU that is there"
            )
        caching = [kind.target for kind in KINDS.values() if kind.has_timing_cache]
        if self.timing_cache is not None and not set(caching) & set(asked):
            raise ConfigError(f"timing cache: only target {', '.join(map(str, caching))} has one")
        choose("kernels", self.kernels, get_args(Kernels))
        if self.kernels == "only" and any(
            engine.precision == "int8" and engine.kind.takes_kernels for engine in self.wanted
        ):
            raise ConfigError("kernels 'only': int8 engines have none of ours; give them up, or build int8 by itself")
        if self.kernels in ("both", "only") and not any(engine.kernels for engine in self.wanted):
            raise ConfigError(f"kernels {self.kernels!r}: only target tensorrt and tensorrt-rtx take kernels of ours")
        for engine in self.wanted:
            engine.kind.check_make(engine.precision, self.compute_capabilities)


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
