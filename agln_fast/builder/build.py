"""Checkpoint -> bundle: export, engines, verification, manifest; written whole or not at all."""

from __future__ import annotations

import copy
import os
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast, get_args

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from agln_fast.builder.graphs import Graphs
from agln_fast.builder.judge import judge, scenes_to_judge
from agln_fast.builder.options import check_options
from agln_fast.builder.report import write_report
from agln_fast.builder.steps import Steps, about
from agln_fast.builder.tune import SHORT_S, suitable, tune_engine
from agln_fast.bundle import Bundle, is_bundle, open_bundle, seal
from agln_fast.contract import IMAGENET_MEAN, IMAGENET_STD, IOContract, Layout, Output, Precision, Resize
from agln_fast.data.classes import ClassSet, class_set, default_class_set
from agln_fast.engines.openvino import OpenVinoBackend
from agln_fast.engines.tensorrt_library import Flavour
from agln_fast.errors import ConfigError, VerificationError, printable
from agln_fast.export.quantize import quantize_onnx
from agln_fast.export.tensorrt import build_tensorrt_engine, resolve_capabilities
from agln_fast.files import whole_folder
from agln_fast.forking import use_threads
from agln_fast.manifest import EngineRecord, Manifest, PlanChosenBy
from agln_fast.models.checkpoint import load_checkpoint, save_checkpoint
from agln_fast.models.complexity import complexity
from agln_fast.models.config import ModelConfig
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.plan import NO_PLAN, Plan, PlanChoice
from agln_fast.runtime.verify import Reference, make_reference, sample_frames, sample_images

__all__ = ["build"]

_READ, _REFERENCE, _WRITE = "read the checkpoint", "run the fp32 reference", "write the bundle"
_CHOOSE, _MAKE, _COMPARE = "choose the plan of {}", "make {}", "compare {} with the reference"
_WEIGHTS = "weights.safetensors"
_CPU_MACS = 1e11  # multiply-adds a second of two cores, to tell how long the reference takes
_LONGEST_REASON = 1000  # characters
_CALIBRATION = 128  # pictures
_PACKAGES = {"fused": "torch"}


def build(
    checkpoint: str | os.PathLike[str] | SegmentationNetwork,
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
    config: ModelConfig | None = None,
    compute_capabilities: Sequence[str] = (),
    workspace_bytes: int | None = None,
    timing_cache: Path | None = None,
    samples: str | os.PathLike[str] | None = None,
    min_agreement: float | None = None,
    tune_s: float | None = None,
    threads: int | None = None,
    strict: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Build a bundle of verified engines from a checkpoint.

    An engine that disagrees with the reference is left out (`manifest.left_out` says why), and the others are
    delivered.

    Args:
        checkpoint: a file that `load_checkpoint` reads, or a network.
        path: the folder to write; ".agln" is appended unless it is there.
        size: (height, width) of the engine's input in pixels, or "HxW".
        precision: "fp32", "fp16", "bf16", "int8", "auto", or several, or a mapping from each target to these. "auto" is
            fp16 on GPUs; on the CPU it is fp32, and bf16 where the CPU has it. int8 needs NNCF, and agrees if it loses
            at most half a point of mIoU on Scenes, where the network has Scenes' classes. `load` takes the fastest.
        targets: of `agln_fast.builder.options.TARGETS`; "cuda" is the fused runtime on any CUDA device.
        plan: the rewrites before an engine is compiled: "auto" for the fastest ones for each engine (see `tune`),
            "none", or a `Plan` for all. Target "cuda" and the reference have rewrites of their own, and none.
        batch: images a run, or (smallest, largest), or "SMALLEST..LARGEST".
        layout, output, resize, mean, std: see `IOContract`.
        classes: a class set, its name (`agln_fast.data.list_class_sets`), or the K names; None to go by K.
        config: what the network is, where the checkpoint cannot tell.
        compute_capabilities: for tensorrt-rtx, e.g. ("sm86",); none for all that it supports.
        workspace_bytes: limit of TensorRT's scratch memory; None for the library's own.
        timing_cache: file that tensorrt reads and updates; tensorrt-rtx has none.
        samples: image, folder or pattern to verify with; None for Scenes.
        min_agreement: smallest share of equal labels, 0..1; None for 0.999 in fp32, 0.99 (weighted) in half.
        tune_s: seconds for each engine to choose its plan in, see `tune`; None for a short race.
        threads: CPU threads for races and the verification.
        strict: deliver nothing if one engine disagrees.
        overwrite: replace an existing bundle.
        progress: a rich progress display that the caller has started. It shows each step with its number and its
            time; one that is disabled prints a line for each. Without it they go to the logger "agln_fast.build".

    Raises:
        CheckpointError, ConfigError, BuildError, VerificationError, MissingPackageError: nothing is left behind.
    """
    options = check_options(
        path,
        size=size,
        precision=precision,
        targets=targets,
        plan=plan,
        batch=batch,
        layout=layout,
        output=output,
        resize=resize,
        mean=mean,
        std=std,
        classes=classes,
        compute_capabilities=compute_capabilities,
        workspace_bytes=workspace_bytes,
        timing_cache=timing_cache,
        samples=samples,
        min_agreement=min_agreement,
        tune_s=tune_s,
        threads=threads,
        overwrite=overwrite,
    )
    use_threads()
    contract, destination = options.contract, options.destination
    wanted = _wanted(options.precisions)
    capabilities = {
        flavour: resolve_capabilities(flavour, compute_capabilities if flavour == "tensorrt-rtx" else ())
        for flavour in get_args(Flavour)
        if flavour in options.precisions
    }
    steps = Steps(progress, _agenda(wanted, plan))

    steps.start(_READ)
    if isinstance(checkpoint, SegmentationNetwork):
        network = copy.deepcopy(checkpoint).float().cpu().eval()
    else:
        network = load_checkpoint(checkpoint, config)
    names = _class_set(classes, network.config.num_classes)
    created_with = {
        **{package: version(package) for package in ("agln-fast", "torch", "onnx")},
        "python": platform.python_version(),
    }
    properties = {
        "agln_fast.model": network.config.to_json(),
        "agln_fast.classes": "\n".join(names.classes),
        "agln_fast.palette": " ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour in names.palette),
        "agln_fast.created_with": " ".join(f"{name}={number}" for name, number in created_with.items()),
    }
    manifest = Manifest(network.config, names.classes, names.palette, contract, (), {}, created_with)
    with whole_folder(destination, is_bundle if overwrite else None) as folder:
        frames = sample_frames(samples, contract)
        cost = complexity(network.config, contract.height, contract.width)[-1]
        steps.start(_REFERENCE, about(len(frames) * (cost.convolution + cost.matmul) / _CPU_MACS))
        began = time.perf_counter()
        references = make_reference(network, Bundle(folder, manifest), frames)
        seconds = (time.perf_counter() - began) / sum(len(reference.labels) for reference in references)
        save_checkpoint(network, folder / _WEIGHTS)
        drafts = folder / ".graphs"
        drafts.mkdir()
        work = _Work(
            Graphs(network, contract, drafts, properties),
            folder,
            steps,
            progress,
            seconds,
            plan=plan,
            tune_s=options.tune_s,
            threads=threads,
            capabilities=capabilities,
            workspace_bytes=workspace_bytes,
            timing_cache=timing_cache,
        )
        plans = [work.choose_plan(engine) for engine in wanted]
        records = [work.make(engine, *chosen) for engine, chosen in zip(wanted, plans, strict=True)]
        shutil.rmtree(drafts)
        manifest = replace(manifest, engines=tuple(records))
        engines, left_out = work.compare(Bundle(folder, manifest), references, min_agreement)
        asked = {engine.name for engine in wanted if engine.graph is not None or engine.target == "cuda"}
        if left_out and (strict or asked <= left_out.keys()):
            raise VerificationError("; ".join(left_out.values()))
        used = {name for engine in engines for name in engine.files}
        for name in {name for record in records for name in record.files} - used:
            (folder / name).unlink()
        manifest = replace(manifest, engines=tuple(engines), left_out=left_out)
        steps.start(_WRITE)
        write_report(folder / "report.md", destination.name, manifest, folder)
        seal(folder, manifest)
    steps.finish()
    return open_bundle(destination)


@dataclass(frozen=True)
class _Wanted:
    """An engine to build: `graph` is the type of the ONNX file it is made of, None for the weights themselves."""

    backend: str
    precision: Precision
    target: str
    graph: Precision | None

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.precision}"

    def record(self, file: str, versions: dict[str, str]) -> EngineRecord:
        return EngineRecord(self.name, self.backend, self.precision, file, self.target, versions)


def _wanted(asked: Mapping[str, Sequence[str]]) -> list[_Wanted]:
    """Every engine that the precisions of each target ask for; the reference weights can always be run by torch."""
    wanted = []
    for target, precisions in asked.items():
        for kind in cast(list[Precision], _resolve(target, precisions)):
            if target == "cuda":
                wanted.append(_Wanted("fused", kind, target, None))
            elif target != "cpu":
                wanted.append(_Wanted(target, kind, target, kind))
            elif kind in ("int8", "bf16"):
                # OpenVINO computes in bf16 from the fp32 graph; ONNX Runtime has no bf16 convolution on CPUs.
                wanted.append(_Wanted("openvino", kind, target, "fp32"))
            else:
                wanted += [_Wanted("openvino", kind, target, kind), _Wanted("onnxruntime", kind, target, kind)]
    wanted += [_Wanted("fused", "fp32", "cpu", None), _Wanted("torch", "fp32", "cpu", None)]
    return list({engine.name: engine for engine in wanted}.values())


def _resolve(target: str, precisions: Sequence[str]) -> list[str]:
    """Precisions without "auto"; int8 is none of it, because it takes minutes and costs accuracy."""
    automatic = ["fp16"]
    if target == "cpu":
        bf16 = _Wanted("openvino", "bf16", "cpu", "fp32").record("", {})
        automatic = ["fp32", "bf16"] if OpenVinoBackend.obstacle(bf16) is None else ["fp32"]
    resolved = [kind for asked in precisions for kind in (automatic if asked == "auto" else [asked])]
    return list(dict.fromkeys(resolved))


def _agenda(wanted: Sequence[_Wanted], plan: PlanChoice) -> list[str]:
    """The names of all steps."""
    graphs = [engine for engine in wanted if engine.graph is not None]
    return [
        _READ,
        _REFERENCE,
        *(_CHOOSE.format(engine.name) for engine in graphs if plan == "auto"),
        *(_MAKE.format(engine.name) for engine in graphs),
        *(_COMPARE.format(engine.name) for engine in wanted),
        _WRITE,
    ]


@dataclass
class _Work:
    """What the steps of one build share. `seconds`: what the reference took for an image."""

    graphs: Graphs
    folder: Path
    steps: Steps
    progress: Progress | None
    seconds: float
    plan: PlanChoice
    tune_s: float | None
    threads: int | None
    capabilities: Mapping[Flavour, Sequence[str]]
    workspace_bytes: int | None
    timing_cache: Path | None

    def choose_plan(self, engine: _Wanted) -> tuple[Plan, PlanChosenBy]:
        """The plan of `engine`, and who chose it."""
        if engine.graph is None:
            return NO_PLAN, "fixed"
        if isinstance(self.plan, Plan):
            return suitable(self.plan, engine.backend, engine.precision), "user"
        if self.plan == "none":
            return NO_PLAN, "user"
        longest = SHORT_S if self.tune_s is None else self.tune_s
        self.steps.start(_CHOOSE.format(engine.name), about(self._export_s() + min(longest, 2 + 9 * self.seconds)))
        tuning = tune_engine(self.graphs, engine.backend, engine.precision, budget_s=self.tune_s, threads=self.threads)
        return tuning.plan, tuning.chosen_by

    def make(self, engine: _Wanted, plan: Plan, chosen_by: PlanChosenBy) -> EngineRecord:
        """Write the file of `engine`, if none is there that serves it."""
        if engine.graph is None:
            return replace(engine.record(_WEIGHTS, self._versions(engine)), plan_chosen_by=chosen_by)
        exported = 0.0 if plan in self.graphs.plans(engine.graph) else self._export_s()
        self.steps.start(_MAKE.format(engine.name), about(exported + self._make_s(engine)))
        if engine.precision == "int8":
            file, contract = self.folder / "model.int8.xml", self.graphs.contract
            quantize_onnx(self.graphs(engine.graph, plan), file, calibration_frames(contract), contract)
            record = engine.record(file.name, self._versions(engine))
        elif engine.target == "cpu":
            record = engine.record(self._delivered(engine, plan).name, self._versions(engine))
        else:
            record = self._tensorrt(engine, plan)
        return replace(record, plan=plan, plan_chosen_by=chosen_by)

    def _delivered(self, engine: _Wanted, plan: Plan) -> Path:
        """The graph of `engine` in its place in the bundle.

        The first one of a type has a short name; others of that type, rewritten otherwise, are named by the engine.
        """
        assert engine.graph is not None
        file = self.graphs(engine.graph, plan)
        if file.parent == self.folder:
            return file
        short = self.folder / ("model.onnx" if engine.graph == "fp32" else f"model.{engine.graph}.onnx")
        return self.graphs.move(
            engine.graph, plan, self.folder / f"model.{engine.name}.onnx" if short.exists() else short
        )

    def _tensorrt(self, engine: _Wanted, plan: Plan) -> EngineRecord:
        flavour, contract = cast(Flavour, engine.backend), self.graphs.contract
        suffix = "rtx" if flavour == "tensorrt-rtx" else "trt"
        file = self.folder / f"model.{engine.precision}.{suffix}.engine"
        built = build_tensorrt_engine(
            self.graphs(engine.precision, plan),
            file,
            flavour=flavour,
            precision=engine.precision,
            compute_capabilities=self.capabilities[flavour],
            batch=None if contract.min_batch == contract.max_batch else _profile(contract),
            workspace_bytes=self.workspace_bytes,
            timing_cache=self.timing_cache if flavour == "tensorrt" else None,
            progress=self.progress,
        )
        record = engine.record(file.name, built.versions)
        return replace(record, precision=built.precision, compute_capabilities=tuple(built.compute_capabilities))

    def compare(
        self, draft: Bundle, references: Sequence[Reference], minimum: float | None
    ) -> tuple[list[EngineRecord], dict[str, str]]:
        """The engines of `draft` with their verification, but for those that disagree: name -> how."""
        engines, left_out = [], {}
        for record in draft.manifest.engines:
            images = 1 + sum(len(reference.labels) for reference in references) + 2 * scenes_to_judge(draft, record)
            self.steps.start(_COMPARE.format(record.name), about(1 + images * self.seconds))
            try:
                outcome = judge(draft, record, references, minimum=minimum, threads=self.threads)
            except VerificationError as error:
                left_out[record.name] = printable(error, _LONGEST_REASON)
            else:
                engines.append(replace(record, verification=outcome))
        return engines, left_out

    def _versions(self, engine: _Wanted) -> dict[str, str]:
        packages = [_PACKAGES.get(engine.backend, engine.backend), *(["nncf"] if engine.precision == "int8" else [])]
        return {package: version(package) for package in packages if _is_installed(package)}

    def _export_s(self) -> float:
        """Seconds of an export, about: tracing goes by modules."""
        return 1.5 + 0.012 * sum(1 for _ in self.graphs.network.modules())

    def _make_s(self, engine: _Wanted) -> float:
        """Seconds to make an engine of its graph, about."""
        if engine.target != "cpu":
            return 3 + 1e-7 * sum(parameter.numel() for parameter in self.graphs.network.parameters())
        return 15 + 2 * _CALIBRATION * self.seconds if engine.precision == "int8" else 0.0


def calibration_frames(contract: IOContract) -> list[npt.NDArray[np.uint8]]:
    """Scenes of the train split, (height, width, 3), to quantise by."""
    return sample_images(_CALIBRATION, contract.height, contract.width, split="train")


def _profile(contract: IOContract) -> tuple[int, int, int]:
    """Smallest, optimal and largest batch of TensorRT's optimisation profile."""
    return contract.min_batch, contract.max_batch, contract.max_batch


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _class_set(classes: str | Sequence[str] | ClassSet | None, num_classes: int) -> ClassSet:
    if classes is None:
        return default_class_set(num_classes)
    known = class_set(classes) if isinstance(classes, str) else classes
    names = known.classes if isinstance(known, ClassSet) else tuple(known)
    if len(names) != num_classes:
        raise ConfigError(f"classes: {len(names)} names for a network of {num_classes} classes")
    if isinstance(known, ClassSet):
        return known
    return ClassSet("custom", "custom", names, default_class_set(num_classes).palette)
