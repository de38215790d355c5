"""The paper's ablations on Scenes, in the manner of Tables IV, V, VII and VIII: variants times seeds.

python -m agln_fast.bench.jobs.ablation FOLDER [--seeds 0 1] [--epochs 4] [--size 96]

Goes on where it was stopped. Several processes may share FOLDER if their seeds differ; the last one writes the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from rich.progress import Progress

from agln_fast.bench.race.results import Results, save_results
from agln_fast.bench.race.rows import AblationRow
from agln_fast.data.dataset import CachedDataset
from agln_fast.data.scenes import Scenes
from agln_fast.errors import ConfigError
from agln_fast.evaluation.evaluate import evaluate
from agln_fast.files import replacing
from agln_fast.machine import machine
from agln_fast.models.complexity import complexity
from agln_fast.models.config import preset
from agln_fast.runtime.networks import load_network
from agln_fast.training.config import TrainingConfig
from agln_fast.training.trainer import train

__all__ = ["VARIANTS", "main", "markdown"]

VARIANTS = {
    "fpn_nano": ("FPN", "IV, V, VII"),
    "agln_minus_gap_nano": ("AGLN− with GAP", "IV"),
    "agln_minus_nano": ("AGLN−", "IV, V"),
    "agln_minus_cr_nano": ("AGLN− + resampling", "V"),
    "agln_minus_sg_nano": ("AGLN− + spatial gating", "V"),
    "agln_straight_nano": ("AGLN, straight", "V, VII"),
    "agln_nano": ("AGLN, dense", "VII, VIII"),
    "agln_lite_nano": ("AGLN-Lite", "VIII"),
}
"""Preset -> what it is, and in which tables of the paper its like stands."""

MULTISCALE = ("fpn_nano", "agln_nano", "agln_lite_nano")
"""Judged at several scales, too, which takes sixty times as long."""


def run(model: str, seed: int, epochs: float, size: int, folder: Path, data: dict[str, CachedDataset]) -> AblationRow:
    """Train and evaluate, unless FOLDER holds the outcome."""
    place = folder / f"{model}-{seed}"
    stored = place / "outcome.json"
    if stored.exists():
        outcome = AblationRow(**json.loads(stored.read_text(encoding="utf-8")))
        if (outcome.epochs, outcome.size) != (epochs, size):
            raise ConfigError(f"{place}: {outcome.epochs:g} epochs at {outcome.size} pixels; choose another folder")
        return outcome
    config = TrainingConfig(
        model=model,
        seed=seed,
        epochs=epochs,
        crop=size,
        base_size=size,
        accelerator="cpu",
        validate_every=epochs,
        cache=False,
    )
    with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
        trained = train(config, place, resume=True, progress=progress, train_set=data["train"], val_set=data["val"])
        with load_network(trained.network, size=(size, size), resize="stretch") as segment:
            single = evaluate(segment, data["test"], progress=progress)
            multiple = evaluate(segment, data["test"], tta=True, progress=progress) if model in MULTISCALE else None
    outcome = AblationRow(
        model,
        seed,
        epochs,
        size,
        single.metrics.mean_iou,
        single.metrics.pixel_accuracy,
        None if multiple is None else multiple.metrics.mean_iou,
        trained.log[-1].seconds,
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {version('torch')}",
    )
    with replacing(stored, ConfigError) as part:
        part.write_text(json.dumps(asdict(outcome), indent=2) + "\n", encoding="utf-8")
    return outcome


def markdown(outcomes: list[AblationRow]) -> str:
    """A table in Markdown: mean over the seeds, and half the distance between the best and the worst."""
    lines = [
        "| network | the paper's table | mIoU % | multi-scale | pixel accuracy % | parameters | multiply-adds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model, (title, table) in VARIANTS.items():
        of_model = [outcome for outcome in outcomes if outcome.model == model]
        if not of_model:
            continue
        total = complexity(preset(model, 12), of_model[0].size, of_model[0].size)[-1]
        columns = [
            _spread([outcome.miou for outcome in of_model]),
            _spread([outcome.multiscale_miou for outcome in of_model if outcome.multiscale_miou is not None]),
            _spread([outcome.pixel_accuracy for outcome in of_model]),
            f"{total.parameters / 1e6:.3f} M",
            f"{(total.convolution + total.matmul) / 1e6:.0f} M",
        ]
        lines.append(f"| {title} (`{model}`) | {table} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    if not values:
        return "none"
    return f"{100 * statistics.mean(values):.2f} ± {50 * (max(values) - min(values)):.2f}"


def main() -> None:
    """Entry point of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--size", type=int, default=96, help="side of scenes and crops, pixels")
    parser.add_argument("--models", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    arguments = parser.parse_args()
    size = arguments.size
    data = {split: CachedDataset(Scenes(split, size=(size, size))) for split in ("train", "val", "test")}
    for seed in arguments.seeds:
        for model in arguments.models:
            outcome = run(model, seed, arguments.epochs, size, arguments.folder, data)
            print(f"{model} seed {seed}: mIoU {outcome.miou:.2%}, pixels {outcome.pixel_accuracy:.2%}", flush=True)
    files = sorted(arguments.folder.glob("*/outcome.json"))
    outcomes = [AblationRow(**json.loads(file.read_text(encoding="utf-8"))) for file in files]
    command = shlex.join(["python", "-m", "agln_fast.bench.jobs.ablation", *sys.argv[1:]])
    today = datetime.now(UTC).date().isoformat()
    save_results(
        Results(machine(), command, today, tuple(outcomes), kind="ablation"), arguments.folder / "ablation.json"
    )
    (arguments.folder / "ablation.md").write_text(markdown(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main()
