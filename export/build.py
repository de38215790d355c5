"""Checkpoint -> bundle: export, engines, verification, manifest; written whole or not at all."""

from __future__ import annotations

import copy
import errno
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import cast, get_args

from rich.progress import Progress

from agln_fast.backends.openvino import OpenVinoBackend
from agln_fast.bundle import Bundle, EngineRecord, Manifest, open_bundle, seal
from agln_fast.contract import IMAGENET_MEAN, IMAGENET_STD, IOContract, Layout, Output, Precision, Resize
from agln_fast.data.classes import ClassSet, class_set, default_class_set
from agln_fast.errors import AglnError, BuildError, ConfigError, did_you_mean
from agln_fast.export.onnx import export_onnx
from agln_fast.export.report import write_report
from agln_fast.export.tensorrt import Flavour, build_tensorrt_engine, resolve_capabilities
from agln_fast.models.checkpoint import load_checkpoint, save_checkpoint
from agln_fast.models.config import ModelConfig
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.runtime.verify import check_minimum, make_reference, sample_frames, verify_engine

__all__ = ["TARGETS", "build", "parse_size"]

_PACKAGES = {"fused": "torch"}
TARGETS = ("cpu", "cuda", "tensorrt", "tensorrt-rtx")


def build(
    checkpoint: str | os.PathLike[str] | SegmentationNetwork,
    path: str | os.PathLike[str],
    *,
    size: tuple[int, int] | str = (512, 512),
    precision: str | Sequence[str] = "auto",
    targets: str | Sequence[str] = ("cpu",),
    batch: int | tuple[int, int] = 1,
    layout: Layout = "uint8_nhwc",
    output: Output = "labels",
    resize: Resize = "stretch",
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    classes: str | Sequence[str] | None = None,
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
        precision: "fp32", "fp16", "bf16", "auto" (CPU: fp32, and bf16 where the CPU has it; GPU: fp16), or several.
        targets: of TARGETS; "cuda" is the fused runtime on any CUDA device.
        batch: images a run, or (smallest, largest).
        layout, output, resize, mean, std: see `IOContract`.
        classes: a class set's name (`agln_fast.data.list_class_sets`), or the K names; None to go by K.
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
    contract = IOContract(
        *parse_size(size),
        *_batch_range(batch),
        layout=layout,
        output=output,
        resize=resize,
        mean=mean,
        std=std,
    )
    targets = [targets] if isinstance(targets, str) else list(targets)
    wanted = _plan_engines(targets, precision)
    if compute_capabilities and "tensorrt-rtx" not in targets:
        raise ConfigError(
            "compute capabilities are for target tensorrt-rtx; the others build for the GPU that is there"
        )
    if timing_cache is not None and "tensorrt" not in targets:
        raise ConfigError("timing cache: only target tensorrt has one")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ConfigError(f"workspace of {workspace_bytes} bytes: must be at least 1")
    check_minimum(min_agreement)
    capabilities = {
        flavour: resolve_capabilities(flavour, compute_capabilities if flavour == "tensorrt-rtx" else ())
        for flavour in get_args(Flavour)
        if flavour in targets
    }
    destination = _destination(Path(path), overwrite)
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
    with _whole_or_nothing(destination) as folder:
        save_checkpoint(network, folder / "weights.safetensors")
        graphs: dict[Precision, Path] = {}
        for kind in sorted({engine.graph for engine in wanted if engine.graph is not None}):
            steps.start(f"ONNX {kind}")
            graphs[kind] = folder / ("model.onnx" if kind == "fp32" else f"model.{kind}.onnx")
            export_onnx(network, graphs[kind], contract, kind, properties)
        engines = []
        for engine in wanted:
            if engine.target in ("cpu", "cuda"):
                file = "weights.safetensors" if engine.graph is None else graphs[engine.graph].name
                engines.append(engine.record(file, _installed(_PACKAGES.get(engine.backend, engine.backend))))
                continue
            assert engine.graph is not None
            steps.start(f"{engine.backend} {engine.precision}")
            flavour = cast(Flavour, engine.backend)
            suffix = "rtx" if engine.backend == "tensorrt-rtx" else "trt"
            plan = folder / f"model.{engine.precision}.{suffix}.engine"
            built = build_tensorrt_engine(
                graphs[engine.graph],
                plan,
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
                    engine.record(plan.name, built.versions),
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
            plan=("fold_batchnorm",) if graphs else (),
            created_with=created_with,
        )
        draft = Bundle(folder, manifest)
        steps.start("reference")
        references = make_reference(network, draft, frames)
        verified = []
        for record in engines:
            steps.start(f"verify {record.name}")
            outcome = verify_engine(draft, record, references, minimum=min_agreement, threads=threads)
            verified.append(replace(record, verification=outcome))
        manifest = replace(manifest, engines=tuple(verified))
        write_report(folder / "report.md", destination.name, manifest, folder)
        seal(folder, manifest)
    steps.finish()
    return open_bundle(destination)


def parse_size(size: tuple[int, int] | str) -> tuple[int, int]:
    """(height, width) in pixels from itself or from "HxW".

    Raises:
        ConfigError: neither.
    """
    if isinstance(size, str):
        match = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", size.strip().lower())
        if match is None:
            raise ConfigError(f"size {size!r}: give height x width in pixels, such as 512x512")
        return int(match[1]), int(match[2])
    if not isinstance(size, tuple | list) or len(size) != 2 or not all(isinstance(side, int) for side in size):
        raise ConfigError(f"size {size!r}: needs two whole numbers, height and width")
    return size[0], size[1]


def _batch_range(batch: int | tuple[int, int]) -> tuple[int, int]:
    ends = (batch, batch) if isinstance(batch, int) else batch
    if not isinstance(ends, tuple | list) or len(ends) != 2 or any(type(end) is not int for end in ends):
        raise ConfigError(f"batch {batch!r}: give a number of images, or the smallest and the largest")
    return ends[0], ends[1]


@dataclass(frozen=True)
class _Wanted:
    """An engine to build: `graph` is the type of the ONNX file it is made of, None for the weights themselves."""

    backend: str
    precision: Precision
    target: str
    graph: Precision | None

    def record(self, file: str, versions: dict[str, str]) -> EngineRecord:
        return EngineRecord(
            f"{self.backend}-{self.precision}", self.backend, self.precision, file, self.target, versions
        )


def _plan_engines(targets: Sequence[str], precision: str | Sequence[str]) -> list[_Wanted]:
    """Every engine that `targets` and `precision` ask for; the reference weights can always be run by torch."""
    precisions = [precision] if isinstance(precision, str) else list(precision)
    for kind in precisions:
        known = [*get_args(Precision), "auto"]
        if kind not in known:
            raise ConfigError(f"unknown precision {kind!r}{did_you_mean(kind, known)}; known: {', '.join(known)}")
    if not targets or not precisions:
        raise ConfigError(f"give at least one precision, and one target of {', '.join(TARGETS)}")
    wanted = []
    for target in targets:
        if target not in TARGETS:
            raise ConfigError(f"unknown target {target!r}{did_you_mean(target, TARGETS)}; known: {', '.join(TARGETS)}")
        for kind in cast(list[Precision], _resolve(target, precisions)):
            if target == "cuda":
                wanted.append(_Wanted("fused", kind, target, None))
            elif target != "cpu":
                wanted.append(_Wanted(target, kind, target, kind))
            elif kind == "bf16":
                # OpenVINO computes in bf16 from the fp32 graph; ONNX Runtime has no bf16 convolution on CPUs.
                wanted.append(_Wanted("openvino", kind, target, "fp32"))
            else:
                wanted += [_Wanted("openvino", kind, target, kind), _Wanted("onnxruntime", kind, target, kind)]
    wanted += [_Wanted("fused", "fp32", "cpu", None), _Wanted("torch", "fp32", "cpu", None)]
    return list({(engine.backend, engine.precision): engine for engine in wanted}.values())


def _resolve(target: str, precisions: list[str]) -> list[str]:
    automatic = ["fp16"]
    if target == "cpu":
        has_bf16 = OpenVinoBackend.obstacle(_Wanted("openvino", "bf16", "cpu", "fp32").record("", {})) is None
        automatic = ["fp32", "bf16"] if has_bf16 else ["fp32"]
    resolved = [kind for asked in precisions for kind in (automatic if asked == "auto" else [asked])]
    return list(dict.fromkeys(resolved))


def _profile(contract: IOContract) -> tuple[int, int, int]:
    """Smallest, optimal and largest batch of TensorRT's optimisation profile."""
    return contract.min_batch, contract.max_batch, contract.max_batch


def _installed(package: str) -> dict[str, str]:
    try:
        return {package: version(package)}
    except PackageNotFoundError:
        return {}


def _class_set(classes: str | Sequence[str] | None, num_classes: int) -> ClassSet:
    if classes is None:
        return default_class_set(num_classes)
    named = class_set(classes) if isinstance(classes, str) else None
    names = tuple(classes) if named is None else named.classes
    if len(names) != num_classes:
        raise ConfigError(f"classes: {len(names)} names for a network of {num_classes} classes")
    return named or ClassSet("custom", "custom", names, default_class_set(num_classes).palette)


def _destination(path: Path, overwrite: bool) -> Path:
    path = path if path.suffix == ".agln" else path.with_name(path.name + ".agln")
    if path.exists():
        if not overwrite:
            raise ConfigError(
                f"{path}: exists already; choose another name, or replace it with --force (overwrite=True)"
            )
        if not (path / "manifest.json").is_file():
            raise ConfigError(f"{path}: exists and is no bundle, so it is not replaced; choose another name")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.absolute().parent}; create it first")
    return path


@contextmanager
def _whole_or_nothing(destination: Path) -> Iterator[Path]:
    """A temporary sibling folder that becomes `destination` at the end, or vanishes when anything fails."""
    folder: Path | None = None
    replaced: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.absolute().parent))
        yield folder
        folder.chmod(0o755)
        if destination.exists():
            replaced = folder.with_name(folder.name + ".old")
            destination.rename(replaced)
        folder.rename(destination)
    except AglnError as error:
        # The temporary folder is gone when the message is read.
        error.args = (str(error).replace(str(folder), str(destination)),)
        raise
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "check the folder and its permissions"
        raise BuildError(f"{destination}: cannot be written ({error}); {hint}") from None
    finally:
        if replaced is not None and replaced.exists() and not destination.exists():
            replaced.rename(destination)
        for leftover in (folder, replaced):
            if leftover is not None:
                shutil.rmtree(leftover, ignore_errors=True)


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
