"""`make checkpoints`: train the checkpoints that ship, store them in half the size, and write their model card.

python -m agln_fast.bench.jobs.checkpoints FOLDER

Goes on where it was stopped; FOLDER keeps the runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import textwrap
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress

import agln_fast
from agln_fast.data.scenes import SCENE_SIZE, Scenes
from agln_fast.errors import VerificationError
from agln_fast.evaluation.evaluate import Evaluation, evaluate
from agln_fast.figures.saving import save_figure
from agln_fast.models.checkpoint import load_checkpoint, save_checkpoint
from agln_fast.models.complexity import complexity
from agln_fast.runtime.networks import load_network
from agln_fast.training.config import TrainingConfig
from agln_fast.training.trainer import LogRow, TrainingRun, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["NETWORKS", "main"]

NETWORKS = {"fpn_nano": "FPN", "agln_nano": "AGLN", "agln_lite_nano": "AGLN-Lite"}
SHIPPED = Path(agln_fast.__file__).parent / "checkpoints"
LARGEST_LOSS = 0.001
"""The most mIoU (0..1) that storing the weights as float16 may cost."""


def store(run: TrainingRun, path: Path) -> tuple[Evaluation, Evaluation, Evaluation]:
    """Write the weights as float16; evaluate what was trained, and what was stored at one scale and at several.

    Raises:
        VerificationError: float16 costs more than LARGEST_LOSS; nothing is stored.
    """
    test = Scenes("test")
    draft = run.weights.with_name("float16.safetensors")
    save_checkpoint(run.network, draft, dtype=torch.float16)
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        with load_network(run.network, size=SCENE_SIZE, resize="stretch") as segment:
            trained = evaluate(segment, test, progress=progress)
        with load_network(load_checkpoint(draft), size=SCENE_SIZE, resize="stretch") as segment:
            single = evaluate(segment, test, progress=progress)
            multiple = evaluate(segment, test, tta=True, progress=progress)
    loss = trained.metrics.mean_iou - single.metrics.mean_iou
    if not loss <= LARGEST_LOSS:
        raise VerificationError(f"{path.name}: float16 costs {loss:.3%} of mIoU, more than {LARGEST_LOSS:.1%}")
    path.parent.mkdir(exist_ok=True)
    draft.replace(path)
    return trained, single, multiple


def draw_curves(logs: dict[str, tuple[LogRow, ...]]) -> Figure:
    """Loss on the training split and mIoU on the validation split against the epoch."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasAgg(figure)
    loss, miou = figure.subplots(1, 2)
    for (name, log), colour in zip(logs.items(), ("#76787e", "#c2410c", "#0e7490"), strict=True):
        epochs = [row.epoch for row in log]
        loss.plot(epochs, [row.loss for row in log], color=colour, label=NETWORKS[name])
        miou.plot(epochs, [100 * row.val_miou for row in log], color=colour, label=NETWORKS[name])
    for axes, title in ((loss, "training loss"), (miou, "validation mIoU, %")):
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel("epoch", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    miou.legend(frameon=False, fontsize=8)
    return figure


def model_card(
    config: TrainingConfig, runs: dict[str, TrainingRun], results: dict[str, tuple[Evaluation, Evaluation, Evaluation]]
) -> str:
    """README.md of the folder of checkpoints."""
    lines = [
        "# Checkpoints that ship",
        "",
        "Trained by `make checkpoints` (`python -m agln_fast.bench.jobs.checkpoints FOLDER`), which also wrote this",
        "page.",
        '`agln_fast.load_checkpoint("agln_nano")` and `agln-fast build agln_nano …` find them by name.',
        "",
        "| checkpoint | mIoU % | scales, flips | accuracy % | float32 | parameters | multiply-adds | file | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (trained, single, multiple) in results.items():
        total = complexity(runs[name].network.config, *SCENE_SIZE)[-1]
        size = (SHIPPED / f"{name}.safetensors").stat().st_size
        lines.append(
            f"| `{name}` | {100 * single.metrics.mean_iou:.2f} | {100 * multiple.metrics.mean_iou:.2f} "
            f"| {100 * single.metrics.pixel_accuracy:.2f} | {100 * trained.metrics.mean_iou:.2f} "
            f"| {total.parameters / 1e6:.3f} M | {(total.convolution + total.matmul) / 1e6:.0f} M "
            f"| {size / 1e6:.2f} MB | {runs[name].log[-1].seconds / 60:.0f} |"
        )
    lines += ["", "Accuracy is that of pixels; float32: mIoU before the weights were rounded to float16."]
    classes = next(iter(results.values()))[1].class_set.classes
    header = " | ".join(NETWORKS[name] for name in results)
    lines += ["", f"| IoU % by class | {header} |", "| --- |" + " --- |" * len(results)]
    for index, title in enumerate(classes):
        values = " | ".join(f"{100 * single.metrics.iou[index]:.1f}" for _, single, _ in results.values())
        lines.append(f"| {title} | {values} |")
    threads = torch.get_num_threads()
    lines += [
        "",
        f"**Data.** Scenes, procedural ([datasets](../../docs/datasets.md)): {config.train_split} split, "
        f"{len(Scenes(config.train_split))} scenes of {SCENE_SIZE[0]}x{SCENE_SIZE[1]} pixels. The numbers are of the "
        f"test split, {len(Scenes('test'))} scenes that no decision was made on; the curves show the validation split.",
        "",
        f"**Recipe.** From random weights, seed {config.seed}: SGD, momentum {config.momentum}, weight decay "
        f"{config.weight_decay:g}, learning rate {config.base_lr:g} falling with (1 - iteration / total)^"
        f"{config.poly_power:g}, {config.epochs:g} epochs in batches of {config.batch_size}, "
        f"scales {config.min_scale:g} to {config.max_scale:g}, flips, crops of {config.crop}, cross-entropy, "
        f"{config.precision}.",
        "",
        "**Network.** ResNet-18 at a quarter of its width, 32 channels in the decoder, 32 descriptors, the formulation "
        "of the release ([models](../../docs/models.md)). "
        "Weights of convolutions are stored as float16, all else as float32.",
        "",
        f"**Where.** {_machine()}, {threads} thread{'s' * (threads > 1)}, Python {platform.python_version()}, "
        f"torch {version('torch')}. Minutes are wall clock on a shared machine.",
        "",
        "**Use.** They show that everything works, and that engines keep their accuracy. They know nothing but Scenes: "
        "do not expect them to segment photographs well.",
        "",
        "![training curves](curves.svg)",
        "",
    ]
    return "\n".join(line if line.startswith("|") else textwrap.fill(line, 110) for line in lines)


def _machine() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def main() -> None:
    """Entry point of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    runs, results = {}, {}
    for name in NETWORKS:
        config = TrainingConfig(model=name, accelerator="cpu")
        with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
            runs[name] = train(config, arguments.folder / name, resume=True, progress=progress)
        results[name] = store(runs[name], SHIPPED / f"{name}.safetensors")
        print(f"{name}: mIoU {results[name][1].metrics.mean_iou:.2%} on the test split", flush=True)
    save_figure(draw_curves({name: run.log for name, run in runs.items()}), SHIPPED / "curves.svg")
    (SHIPPED / "README.md").write_text(model_card(config, runs, results), encoding="utf-8")


if __name__ == "__main__":
    main()
