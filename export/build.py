"""Checkpoint -> bundle: export, engines, verification, manifest; written whole or not at all."""

from __future__ import annotations

import copy
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, cast, get_args

import numpy as np
import numpy.typing as npt
from rich.progress import Progress

from agln_fast.backends import open_engine
from agln_fast.backends.openvino import OpenVinoBackend
from agln_fast.backends.tensorrt_library import Flavour
from agln_fast.bundle import Bundle, EngineRecord, Manifest, PlanChosenBy, open_bundle, seal
from agln_fast.contract import IMAGENET_MEAN, IMAGENET_STD, IOContract, Layout, Output, Precision, Resize
from agln_fast.data.classes import ClassSet, class_set, default_class_set
from agln_fast.data.scenes import Scenes
from agln_fast.errors import (
    ConfigError,
    MissingPackageError,
    VerificationError,
)
from agln_fast.evaluation.evaluate import compare
from agln_fast.export.onnx import export_onnx
from agln_fast.export.options import check_options
from agln_fast.export.quantize import quantize_onnx
from agln_fast.export.report import write_report
from agln_fast.export.tensorrt import build_tensorrt_engine, resolve_capabilities
from agln_fast.export.tune import Graphs, suitable, tune_engine
from agln_fast.files import whole_folder
from agln_fast.models.checkpoint import load_checkpoint, save_checkpoint
from agln_fast.models.config import ModelConfig
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.plan import NO_PLAN, Plan
from agln_fast.runtime.segmenter import Segmenter
from agln_fast.runtime.verify import make_reference, sample_frames, sample_images, verify_engine

__all__ = ["build"]

_CALIBRATION = 128  # pictures
_LARGEST_LOSS = 0.5  # points of mIoU
_PACKAGES = {"fused": "torch"}


def build(
    checkpoint: str | os.PathLike[str] | SegmentationNetwork,
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int] | str = (512, 512),
    precision: str | Sequence[str] = "auto",
    targets: str | Sequence[str] = ("cpu",),
    plan: Literal["auto", "none"] | Plan = "auto",
    batch: int | tuple[int, int] = 1,
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
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Build a bundle of verified engines from a checkpoint.

    Args:
        checkpoint: a file that `load_checkpoint` reads, or a network.
        path: the folder to write; ".agln" is appended unless it is there.
        size: (height, width) of the engine's input in pixels, or "HxW".
        precision: "fp32", "fp16", "bf16", "int8", "auto", or several. "auto" is fp16 on GPUs; on the CPU it is fp32,
            bf16 where the CPU has it, and int8 where NNCF is installed and it costs at most half a point of mIoU on
            Scenes, which takes a network of Scenes' classes. `load` takes the fastest.
        targets: of `agln_fast.export.options.TARGETS`; "cuda" is the fused runtime on any CUDA device.
        plan: the rewrites before an engine is compiled: "auto" for the fastest ones for each engine (see `tune`),
            "none", or a `Plan` for all. Target "cuda" and the reference have rewrites of their own, and none.
        batch: images a run, or (smallest, largest).
        layout, output, resize, mean, std: see `IOContract`.
        classes: a class set, its name (`agln_fast.data.list_class_sets`), or the K names; None to go by K.
        config: what the network is, where the checkpoint cannot tell.
        compute_capabilities: for tensorrt-rtx, e.g. ("sm86",); none for all that it supports.
        workspace_bytes: limit of TensorRT's scratch memory; None for the library's own.
        timing_cache: file that tensorrt reads and updates; tensorrt-rtx has none.
        samples: image, folder or pattern to verify with; None for Scenes.
        min_agreement: smallest share of equal labels, 0..1; None for 0.999 in fp32, 0.99 (weighted) in half.
        threads: CPU threads for the verification.
        overwrite: replace an existing bundle.
        progress: a rich progress display that the caller has started.

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
        threads=threads,
        overwrite=overwrite,
    )
    contract, destination = options.contract, options.destination
    wanted = _plan_engines(options.targets, options.precisions)
    capabilities = {
        flavour: resolve_capabilities(flavour, compute_capabilities if flavour == "tensorrt-rtx" else ())
        for flavour in get_args(Flavour)
        if flavour in options.targets
    }
    steps = _Steps(progress)

    steps.start("checkpoint")
    if isinstance(checkpoint, SegmentationNetwork):
        network = copy.deepcopy(checkpoint).float().cpu().eval()
    else:
        network = load_checkpoint(checkpoint, config)
    names = _class_set(classes, network.config.num_classes)
    frames = sample_frames(samples, contract)
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
    with whole_folder(destination) as folder:
        save_checkpoint(network, folder / "weights.safetensors")
        plans = _choose_plans(network, contract, wanted, plan, threads, progress, steps)
        graphs: dict[tuple[Precision, Plan], Path] = {}
        engines, left_out = [], {}
        for engine in wanted:
            chosen, chosen_by = plans[engine.backend, engine.precision]
            if engine.graph is not None and (engine.graph, chosen) not in graphs:
                steps.start(f"ONNX for {engine.backend} {engine.precision}")
                graphs[engine.graph, chosen] = file = folder / _graph_name(engine, graphs)
                export_onnx(network, file, contract, engine.graph, properties, chosen)
            if engine.target in ("cpu", "cuda"):
                name = "weights.safetensors"
                if engine.graph is not None:
                    name = graphs[engine.graph, chosen].name
                versions = _installed(_PACKAGES.get(engine.backend, engine.backend))
                if engine.precision == "int8":
                    steps.start("quantise")
                    name = f"{Path(name).stem}.int8.xml"
                    try:
                        quantize_onnx(graphs["fp32", chosen], folder / name, calibration_frames(contract), contract)
                    except MissingPackageError as error:
                        if not engine.optional:
                            raise
                        left_out[f"{engine.backend}-int8"] = str(error)
                        continue
                    versions |= _installed("nncf")
                record = engine.record(name, versions)
                engines.append(replace(record, plan=chosen, plan_chosen_by=chosen_by))
                continue
            assert engine.graph is not None
            steps.start(f"{engine.backend} {engine.precision}")
            flavour = cast(Flavour, engine.backend)
            suffix = "rtx" if engine.backend == "tensorrt-rtx" else "trt"
            engine_file = folder / f"model.{engine.precision}.{suffix}.engine"
            built = build_tensorrt_engine(
                graphs[engine.graph, chosen],
                engine_file,
                flavour=flavour,
                precision=engine.precision,
                compute_capabilities=capabilities[flavour],
                batch=None if contract.min_batch == contract.max_batch else _profile(contract),
                workspace_bytes=workspace_bytes,
                timing_cache=timing_cache if flavour == "tensorrt" else None,
                progress=progress,
            )
            engines.append(
                replace(
                    engine.record(engine_file.name, built.versions),
                    plan=chosen,
                    plan_chosen_by=chosen_by,
                    precision=built.precision,
                    compute_capabilities=tuple(built.compute_capabilities),
                )
            )
        for graph in graphs.values():
            if graph.name not in {engine.file for engine in engines}:
                graph.unlink()
        manifest = Manifest(
            model=network.config,
            classes=names.classes,
            palette=names.palette,
            contract=contract,
            engines=tuple(engines),
            left_out=left_out,
            created_with=created_with,
        )
        draft = Bundle(folder, manifest)
        steps.start("reference")
        references = make_reference(network, draft, frames)
        verified = []
        optional = {f"{engine.backend}-{engine.precision}" for engine in wanted if engine.optional}
        for record in engines:
            steps.start(f"verify {record.name}")
            try:
                outcome = verify_engine(draft, record, references, minimum=min_agreement, threads=threads)
                if record.name in optional:
                    _check_miou(draft, record, threads)
            except VerificationError as error:
                if record.name not in optional:
                    raise
                left_out[record.name] = str(error)
                for file in (folder / record.file, (folder / record.file).with_suffix(".bin")):
                    file.unlink()
                continue
            verified.append(replace(record, verification=outcome))
        manifest = replace(manifest, engines=tuple(verified))
        write_report(folder / "report.md", destination.name, manifest, folder)
        seal(folder, manifest)
    steps.finish()
    return open_bundle(destination)


@dataclass(frozen=True)
class _Wanted:
    """An engine to build: `graph` is the type of the ONNX file it is made of, None for the weights themselves.

    `optional`: it is left out where it cannot be built, or costs accuracy.
    """

    backend: str
    precision: Precision
    target: str
    graph: Precision | None
    optional: bool = False

    def record(self, file: str, versions: dict[str, str]) -> EngineRecord:
        return EngineRecord(
            f"{self.backend}-{self.precision}", self.backend, self.precision, file, self.target, versions
        )


def _plan_engines(targets: Sequence[str], precisions: Sequence[str]) -> list[_Wanted]:
    """Every engine that `targets` and `precision` ask for; the reference weights can always be run by torch."""
    wanted = []
    for target in targets:
        for kind in cast(list[Precision], _resolve(target, precisions)):
            if target == "cuda":
                wanted.append(_Wanted("fused", kind, target, None))
            elif target != "cpu":
                wanted.append(_Wanted(target, kind, target, kind))
            elif kind == "int8":
                wanted.append(_Wanted("openvino", kind, target, "fp32", optional=kind not in precisions))
            elif kind == "bf16":
                # OpenVINO computes in bf16 from the fp32 graph; ONNX Runtime has no bf16 convolution on CPUs.
                wanted.append(_Wanted("openvino", kind, target, "fp32"))
            else:
                wanted += [_Wanted("openvino", kind, target, kind), _Wanted("onnxruntime", kind, target, kind)]
    wanted += [_Wanted("fused", "fp32", "cpu", None), _Wanted("torch", "fp32", "cpu", None)]
    return list({(engine.backend, engine.precision): engine for engine in wanted}.values())


def _resolve(target: str, precisions: Sequence[str]) -> list[str]:
    automatic = ["fp16"]
    if target == "cpu":
        lower = [
            kind
            for kind in cast(list[Precision], ["bf16", "int8"])
            if OpenVinoBackend.obstacle(_Wanted("openvino", kind, "cpu", "fp32").record("", {})) is None
            and (kind != "int8" or find_spec("nncf") is not None)
        ]
        automatic = ["fp32", *lower]
    resolved = [kind for asked in precisions for kind in (automatic if asked == "auto" else [asked])]
    return list(dict.fromkeys(resolved))


def _choose_plans(
    network: SegmentationNetwork,
    contract: IOContract,
    wanted: Sequence[_Wanted],
    plan: Literal["auto", "none"] | Plan,
    threads: int | None,
    progress: Progress | None,
    steps: _Steps,
) -> dict[tuple[str, Precision], tuple[Plan, PlanChosenBy]]:
    """The plan of each engine, by backend and precision, and who chose it."""
    chosen: dict[tuple[str, Precision], tuple[Plan, PlanChosenBy]] = {}
    with tempfile.TemporaryDirectory() as folder:
        graphs = Graphs(network, contract, Path(folder))
        for engine in wanted:
            key = engine.backend, engine.precision
            if engine.graph is None:
                chosen[key] = NO_PLAN, "fixed"
            elif isinstance(plan, Plan):
                chosen[key] = suitable(plan, engine.backend, engine.precision), "user"
            elif plan == "none":
                chosen[key] = NO_PLAN, "user"
            else:
                steps.start(f"tune {engine.backend} {engine.precision}")
                # Each candidate would have to be quantised; what is best in bf16 is taken for best in int8.
                kind = "bf16" if engine.precision == "int8" else engine.precision
                tuning = tune_engine(graphs, engine.backend, kind, threads=threads, progress=progress)
                chosen[key] = tuning.plan, tuning.chosen_by
    return chosen


def _graph_name(engine: _Wanted, graphs: Mapping[tuple[Precision, Plan], Path]) -> str:
    """The first graph of a type has a short name; others of that type, rewritten otherwise, are named by the engine."""
    if any(kind == engine.graph for kind, _ in graphs):
        return f"model.{engine.backend}-{engine.precision}.onnx"
    return "model.onnx" if engine.graph == "fp32" else f"model.{engine.graph}.onnx"


def calibration_frames(contract: IOContract) -> list[npt.NDArray[np.uint8]]:
    """Scenes of the train split, (height, width, 3), to quantise by."""
    return sample_images(_CALIBRATION, contract.height, contract.width, split="train")


def _check_miou(draft: Bundle, record: EngineRecord, threads: int | None) -> None:
    """Compare `record` with the fp32 reference on Scenes' test split.

    Raises:
        VerificationError: it loses more than half a point of mIoU, or the classes are not Scenes', so nobody knows.
    """
    test = Scenes("test")
    if draft.manifest.classes != test.class_set.classes:
        raise VerificationError(
            f"{record.name}: its accuracy is unknown, because the classes are not those of Scenes; "
            "ask for it by --precision int8 if you can judge it"
        )
    reference = next(engine for engine in draft.manifest.engines if engine.backend == "torch")
    with ExitStack() as stack:
        of_reference, of_record = (
            stack.enter_context(
                Segmenter(engine, open_engine(draft, engine, threads=threads), draft.manifest.contract, test.class_set)
            )
            for engine in (reference, record)
        )
        outcome = compare(of_reference, of_record, test)
    scores = [100 * evaluation.metrics.mean_iou for evaluation in (outcome.a, outcome.b)]
    if scores[0] - scores[1] > _LARGEST_LOSS:
        raise VerificationError(
            f"{record.name}: {scores[1]:.2f} % mIoU on Scenes, the reference {scores[0]:.2f} %: "
            f"loses more than {_LARGEST_LOSS} points"
        )


def _profile(contract: IOContract) -> tuple[int, int, int]:
    """Smallest, optimal and largest batch of TensorRT's optimisation profile."""
    return contract.min_batch, contract.max_batch, contract.max_batch


def _installed(package: str) -> dict[str, str]:
    try:
        return {package: version(package)}
    except PackageNotFoundError:
        return {}


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


class _Steps:
    """Shows the step that runs in the caller's progress display, if there is one."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._task = None if progress is None else progress.add_task("build", total=None)

    def start(self, name: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=name)

    def finish(self) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description="done", total=1, completed=1)
