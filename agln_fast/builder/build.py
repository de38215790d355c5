"""Checkpoint -> bundle: export, engines, verification, manifest; written whole or not at all."""

from __future__ import annotations

import copy
import inspect
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import ParamSpec

from agln_fast.artefact import Artefact
from agln_fast.builder.judge import Judge
from agln_fast.builder.options import BuildOptions, Wanted
from agln_fast.builder.report import write_report
from agln_fast.builder.sensitivity import Sensitivity
from agln_fast.builder.steps import Steps, about
from agln_fast.builder.tune import SHORT_S, choose_plan
from agln_fast.builder.workshop import Workshop
from agln_fast.bundle import Bundle, is_bundle, open_bundle, seal
from agln_fast.data.classes import ClassSet, class_set, default_class_set
from agln_fast.engines import KINDS, REFERENCE
from agln_fast.errors import ConfigError, VerificationError, printable
from agln_fast.files import whole_folder
from agln_fast.forking import use_threads
from agln_fast.manifest import EngineRecord, Manifest, PlanChosenBy
from agln_fast.models.checkpoint import load_checkpoint
from agln_fast.models.complexity import complexity
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan.fuse import fused_plan
from agln_fast.plan.plan import Plan
from agln_fast.runtime.reference_file import REFERENCE_FILE, REFERENCE_IMAGES, write_reference
from agln_fast.runtime.references import SAMPLES, make_reference, sample_frames, sample_images
from agln_fast.runtime.verify import LEAST_ROUNDS, Reference

__all__ = ["build", "make_bundle"]

_READ, _REFERENCE, _WRITE = "read the checkpoint", "run the fp32 reference", "write the bundle"
_CHOOSE, _MAKE, _COMPARE = "choose the plan of {}", "make {}", "compare {} with the reference"
_MEASURE, _SEARCH = "run the fp32 reference on the data", "find what {} must leave in floating point"
_CPU_MACS = 1e11  # multiply-adds a second of two cores, to tell how long the reference takes
_LONGEST_REASON = 1000  # characters

_P = ParamSpec("_P")


def _with_parameters_of(
    options: Callable[_P, BuildOptions],
) -> Callable[[Callable[[BuildOptions], Bundle]], Callable[_P, Bundle]]:
    """Give a function of options their own parameters, to be called with."""

    def decorate(act: Callable[[BuildOptions], Bundle]) -> Callable[_P, Bundle]:
        @wraps(act)
        def call(*args: _P.args, **keywords: _P.kwargs) -> Bundle:
            return act(options(*args, **keywords))

        signature = inspect.signature(options).replace(return_annotation="Bundle")
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


@_with_parameters_of(BuildOptions)
def build(options: BuildOptions) -> Bundle:
    """Build a bundle of verified engines from a checkpoint.

    The parameters are those of `agln_fast.builder.options.BuildOptions`, which explains them. An engine that disagrees
    with the reference is left out (`manifest.left_out` says why), and the others are delivered.

    Raises:
        CheckpointError, ConfigError, BuildError, VerificationError, MissingPackageError: nothing is left behind.
    """
    return make_bundle(options)


def make_bundle(options: BuildOptions) -> Bundle:
    """As `build`, of options that are made already."""
    use_threads()
    steps = Steps(options.progress, _agenda(options))
    steps.start(_READ)
    network, classes = _read(options)
    with whole_folder(options.destination, is_bundle if options.overwrite else None) as folder:
        references, seconds = _refer(network, options, steps, folder / REFERENCE_FILE)
        drafts = folder / ".drafts"
        drafts.mkdir()
        created_with = _created_with()
        workshop = _open_workshop(network, classes, created_with, options, drafts)
        judge = _open_judge(workshop, classes, references, options)
        work = _Work(workshop, options, steps, judge, seconds)
        work.measure_reference()
        plans = [work.choose_plan(engine) for engine in options.wanted]
        made, left_out = work.make_all(plans, folder)
        shutil.rmtree(drafts)
        engines = work.compare(made, left_out)
        _check_left_out(left_out, options)
        _keep_files_of(engines, [each.record for each in made], folder)
        contract = options.contract
        manifest = Manifest(
            network.config, classes.classes, classes.palette, contract, tuple(engines), left_out, created_with
        )
        steps.start(_WRITE)
        write_report(folder / "report.md", options.destination.name, manifest, folder)
        seal(folder, manifest)
    steps.finish()
    return open_bundle(options.destination)


def _agenda(options: BuildOptions) -> list[str]:
    """The names of all steps."""
    return [
        _READ,
        _REFERENCE,
        *([_MEASURE] if _may_weigh(options) else []),
        *(_CHOOSE.format(engine.name) for engine in options.wanted if _is_chosen(engine, options)),
        *(step for engine in options.wanted for step in _steps_to_make(engine)),
        *(_COMPARE.format(engine.name) for engine in options.wanted),
        _WRITE,
    ]


def _may_weigh(options: BuildOptions) -> bool:
    """Whether an engine may be judged by what it loses; without data that is known once the classes are."""
    precisions = {engine.precision for engine in options.wanted}
    return "int8" in precisions or (options.data is not None and precisions != {"fp32"})


def _steps_to_make(engine: Wanted) -> list[str]:
    if engine.of_weights:
        return []
    return [*([_SEARCH.format(engine.name)] if engine.precision == "int8" else []), _MAKE.format(engine.name)]


def _is_chosen(engine: Wanted, options: BuildOptions) -> bool:
    """Whether choosing its plan takes time."""
    return options.plan == "auto" and engine.kind.plans != "fixed" and not engine.kernels


def _read(options: BuildOptions) -> tuple[SegmentationNetwork, ClassSet]:
    """The network, and what its classes mean.

    Raises:
        CheckpointError: it cannot be read.
        ConfigError: it has another number of classes.
    """
    if isinstance(options.checkpoint, SegmentationNetwork):
        network = copy.deepcopy(options.checkpoint).float().cpu().eval()
    else:
        network = load_checkpoint(options.checkpoint, options.config, weights=options.weights)
    asked, count = options.classes, network.config.num_classes
    labelled = options.pictures.labelled
    if labelled is not None:
        labelled.check_classes(count, "the network")
    known = class_set(asked) if isinstance(asked, str) else asked
    if known is None:
        of_data = None if labelled is None else labelled.class_set
        return network, network.class_set or of_data or default_class_set(count)
    names = known.classes if isinstance(known, ClassSet) else tuple(known)
    if len(names) != count:
        raise ConfigError(f"classes: {len(names)} names for a network of {count} classes")
    if not isinstance(known, ClassSet):
        known = ClassSet("custom", "custom", names, default_class_set(count).palette)
    return network, known


def _refer(
    network: SegmentationNetwork, options: BuildOptions, steps: Steps, file: Path
) -> tuple[list[Reference], float]:
    """What the network makes of the samples, and the seconds that it took for an image; `file` is the bundle's own."""
    contract, pictures = options.contract, options.pictures
    of_the_user = options.samples is not None or pictures.dataset is not None
    if options.samples is None and pictures.dataset is not None:
        frames = pictures.samples(contract, SAMPLES)
    else:
        frames = sample_frames(options.samples, contract)
    cost = complexity(network.config, contract.height, contract.width)[-1]
    steps.start(_REFERENCE, about(len(frames) * (cost.convolution + cost.matmul) / _CPU_MACS))
    began = time.perf_counter()
    references = make_reference(network, contract, frames)
    seconds = (time.perf_counter() - began) / sum(len(reference.labels) for reference in references)
    kept = references
    if of_the_user:  # which are the user's, and none of what is given away
        frames = sample_images(REFERENCE_IMAGES, contract.height, contract.width)
        kept = make_reference(network, contract, frames)
    write_reference(file, frames, kept, contract, network.config.num_classes, options.min_agreement)
    return references, seconds


def _created_with() -> dict[str, str]:
    packages = ("agln-fast", "torch", "onnx")
    return {**{package: version(package) for package in packages}, "python": platform.python_version()}


def _open_workshop(
    network: SegmentationNetwork, classes: ClassSet, created_with: dict[str, str], options: BuildOptions, folder: Path
) -> Workshop:
    return Workshop(
        network,
        options.contract,
        folder,
        metadata={
            "agln_fast.model": network.config.to_json(),
            "agln_fast.classes": "\n".join(classes.classes),
            "agln_fast.palette": " ".join("#{:02x}{:02x}{:02x}".format(*colour) for colour in classes.palette),
            "agln_fast.created_with": " ".join(f"{name}={number}" for name, number in created_with.items()),
        },
        compute_capabilities=options.compute_capabilities,
        workspace_bytes=options.workspace_bytes,
        timing_cache=options.timing_cache,
        progress=options.progress,
        pictures=options.pictures,
    )


def _open_judge(workshop: Workshop, classes: ClassSet, references: Sequence[Reference], options: BuildOptions) -> Judge:
    return Judge(
        options.pictures,
        classes,
        KINDS[REFERENCE].make(workshop, "fp32"),
        references,
        options.max_miou_loss,
        options.min_agreement,
        options.threads,
    )


@dataclass(frozen=True)
class _Made:
    """An engine in the bundle's folder, and what is known of it."""

    artefact: Artefact
    record: EngineRecord


@dataclass(frozen=True)
class _Work:
    """What the steps for each engine share. `seconds`: what the reference took for an image."""

    workshop: Workshop
    options: BuildOptions
    steps: Steps
    judge: Judge
    seconds: float

    def measure_reference(self) -> None:
        """Run the reference over what engines are judged by, if any is."""
        if _may_weigh(self.options):
            weighed = any(self.judge.weighs(engine.precision) for engine in self.options.wanted)
            images = len(self.options.pictures.judged) if weighed else 0
            self.steps.start(_MEASURE, about(images * self.seconds))
            if weighed:
                self.judge.yardstick  # noqa: B018

    def choose_plan(self, engine: Wanted) -> tuple[Plan, PlanChosenBy]:
        """The plan of `engine`, and who chose it."""
        options = self.options
        if engine.kernels:
            return fused_plan(self.workshop.model), "fixed"
        if _is_chosen(engine, options):
            longest = SHORT_S if options.budget_s is None else options.budget_s
            expected = about(self._export_s() + min(longest, 2 + 9 * self.seconds))
            self.steps.start(_CHOOSE.format(engine.name), expected)
        return choose_plan(
            self.workshop,
            engine.kind,
            engine.precision,
            options.plan,
            budget_s=options.budget_s,
            threads=options.threads,
        )

    def make_all(self, plans: Sequence[tuple[Plan, PlanChosenBy]], folder: Path) -> tuple[list[_Made], dict[str, str]]:
        """All engines with their files in `folder`, and those that cannot be good enough: name -> why."""
        made, left_out = [], {}
        for engine, (plan, chosen_by) in zip(self.options.wanted, plans, strict=True):
            try:
                found = self.search(engine, plan)
            except VerificationError as error:
                left_out[engine.name] = printable(error, _LONGEST_REASON)
                continue
            artefact = self.workshop.deliver(self.make(engine, plan, found.floating), folder)
            record = replace(EngineRecord.of(artefact, engine.target, chosen_by), accuracy=found.accuracy)
            made.append(_Made(artefact, record))
        return made, left_out

    def search(self, engine: Wanted, plan: Plan) -> Sensitivity:
        """What an int8 engine leaves in floating point; nothing, where nothing tells what it loses."""
        if engine.precision != "int8":
            return Sensitivity((), None, {})
        weighs = self.judge.weighs(engine.precision)
        images = len(self.options.pictures.judged) if weighs else 0
        parameters = sum(each.numel() for each in self.workshop.network.parameters())
        expected = engine.kind.seconds_to_make("int8", parameters, self.seconds) + images * self.seconds
        self.steps.start(_SEARCH.format(engine.name), f"{about(expected)} or a few times as long" if weighs else "")
        return self.judge.choose_floating(engine.kind, self.workshop, plan) if weighs else Sensitivity((), None, {})

    def make(self, engine: Wanted, plan: Plan, floating: Sequence[str] = ()) -> Artefact:
        """The file of `engine`; the one of a race or a search, if there was one."""
        if not engine.of_weights:
            graph = engine.kind.graph_type(engine.precision)
            parameters = sum(each.numel() for each in self.workshop.network.parameters())
            made = engine.kind.seconds_to_make(engine.precision, parameters, self.seconds)
            exported = 0.0 if graph is None or plan in self.workshop.plans(graph) else self._export_s()
            self.steps.start(_MAKE.format(engine.name), about(exported + made))
        return engine.kind.make(self.workshop, engine.precision, plan, *([floating] if floating else []))

    def compare(self, made: Sequence[_Made], left_out: dict[str, str]) -> list[EngineRecord]:
        """The records with their verification, but for engines that disagree: those go to `left_out`."""
        engines = []
        count = LEAST_ROUNDS * sum(len(each.labels) for each in self.judge.references)
        for artefact, record in ((each.artefact, each.record) for each in made):
            weighed = record.accuracy is None and self.judge.weighs(artefact.precision)
            images = count + (len(self.options.pictures.judged) if weighed else 0)
            self.steps.start(_COMPARE.format(artefact.name), about(1 + images * self.seconds))
            try:
                outcome, accuracy = self.judge.judge(artefact, record.accuracy)
            except VerificationError as error:
                left_out[artefact.name] = printable(error, _LONGEST_REASON)
            else:
                engines.append(replace(record, verification=outcome, accuracy=accuracy))
        return engines

    def _export_s(self) -> float:
        """Seconds of an export, about: tracing goes by modules."""
        return 1.5 + 0.012 * sum(1 for _ in self.workshop.network.modules())


def _check_left_out(left_out: dict[str, str], options: BuildOptions) -> None:
    """
    Raises:
        VerificationError: an engine disagrees and none may, or all that were asked for do.
    """
    asked = {engine.name for engine in options.wanted if not engine.of_weights or engine.target != "cpu"}
    if left_out and (options.strict or asked <= left_out.keys()):
        raise VerificationError("; ".join(left_out.values()))


def _keep_files_of(engines: Sequence[EngineRecord], records: Sequence[EngineRecord], folder: Path) -> None:
    """Remove what only engines that were left out are opened from."""
    used = {name for engine in engines for name in engine.files}
    for name in {name for record in records for name in record.files} - used:
        (folder / name).unlink()
