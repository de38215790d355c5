"""`agln-fast build`: a checkpoint becomes a bundle of verified engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agln_fast.cli.console import Json, out, print_json, progress_bar, shown
from agln_fast.cli.datasets import DataRoot, SkipBad, Split, tell_skipped
from agln_fast.cli.files import read_plan, read_text
from agln_fast.cli.request import WeightsName
from agln_fast.errors import ConfigError, VerificationError

if TYPE_CHECKING:
    from agln_fast.bundle import Bundle
    from agln_fast.data.classes import ClassSet

__all__ = ["Calibration", "DataOrImages", "MaxLoss", "build", "print_built", "print_engines"]

DataOrImages = Annotated[
    str | None,
    typer.Option(help="Your data, to calibrate and judge by: a dataset, or a folder of images without masks."),
]
Calibration = Annotated[
    int | None, typer.Option(help="Images that int8 is calibrated on; default 128, or half of a small dataset.")
]
MaxLoss = Annotated[
    float, typer.Option(help="Points of mIoU that an engine may lose against fp32; without masks, of agreement.")
]


def build(
    checkpoint: Annotated[Path, typer.Argument(help="Weights: .pth, .safetensors, or a shipped name (agln_nano).")],
    output: Annotated[Path, typer.Option("-o", "--bundle", help="The bundle to write, NAME.agln.")],
    size: Annotated[str, typer.Option(help="Height x width of the engine's input.")] = "512x512",
    precision: Annotated[list[str], typer.Option(help="fp32, fp16, bf16, int8 or auto; may be repeated.")] = ["auto"],  # noqa: B006
    target: Annotated[list[str], typer.Option(help="cpu, cuda, tensorrt, tensorrt-rtx; may be repeated.")] = ["cpu"],  # noqa: B006
    plan: Annotated[str, typer.Option(help="Rewrites: auto (a cost model and a race), none, or a JSON file.")] = "auto",
    kernels: Annotated[
        str, typer.Option(help="Our kernels as layers of TensorRT: auto, both (with and without), only, none.")
    ] = "auto",
    batch: Annotated[str, typer.Option(help="Images a run: N, or SMALLEST..LARGEST.")] = "1",
    kind: Annotated[str, typer.Option("--output", help="What the engine returns: labels or logits.")] = "labels",
    layout: Annotated[
        str, typer.Option(help="Engine input: uint8_nhwc (normalises inside) or float_nchw.")
    ] = "uint8_nhwc",
    resize: Annotated[str, typer.Option(help="stretch, pad (keeps the ratio) or slide (needs logits).")] = "stretch",
    classes: Annotated[
        str | None,
        typer.Option(help="Class set (pascal_voc, ade20k, …) or a class file; default the checkpoint's, or by count."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="JSON file with the model config, where names cannot tell.")
    ] = None,
    weights: WeightsName = None,
    mean: Annotated[str | None, typer.Option(help="R,G,B in 0..1; default ImageNet's.")] = None,
    std: Annotated[str | None, typer.Option(help="R,G,B in 0..1; default ImageNet's.")] = None,
    sm: Annotated[list[str], typer.Option(help="Compute capability for tensorrt-rtx, e.g. sm86; repeatable.")] = [],  # noqa: B006
    workspace: Annotated[int | None, typer.Option(min=1, help="TensorRT's scratch memory, MiB.")] = None,
    timing_cache: Annotated[Path | None, typer.Option(help="TensorRT's timing cache, read and updated.")] = None,
    data: DataOrImages = None,
    data_root: DataRoot = None,
    split: Split = None,
    skip_bad: SkipBad = False,
    calibration: Calibration = None,
    max_miou_loss: MaxLoss = 0.5,
    samples: Annotated[str | None, typer.Option(help="Image, folder or pattern to verify with.")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="Smallest agreement with fp32 that passes, 0..1.")] = None,
    tune: Annotated[
        float | None, typer.Option(min=0, help="Seconds for each engine to choose its plan in; default a short race.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads for races and the verification.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Deliver nothing if one engine disagrees.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing bundle.")] = False,
    json: Json = False,
) -> None:
    """Build engines from a checkpoint, compare each with the fp32 network, and write the bundle.

    An engine that disagrees is left out; the others are delivered, and the exit code is 8.

    Example: agln-fast build agln_r50.pth -o street.agln --target cpu --target tensorrt-rtx --precision fp16
    """
    from agln_fast.builder.options import BuildOptions
    from agln_fast.cli.places import check_file
    from agln_fast.contract import parse_batch
    from agln_fast.models.config import ModelConfig
    from agln_fast.models.shipped import find_checkpoint

    options: dict[str, Any] = {
        "size": size,
        "precision": precision,
        "targets": target,
        "plan": read_plan(plan),
        "kernels": kernels,
        "batch": parse_batch(batch),
        "layout": layout,
        "output": kind,
        "resize": resize,
        "classes": _class_set(classes),
        "compute_capabilities": sm,
        "workspace_bytes": None if workspace is None else workspace * 2**20,
        "timing_cache": timing_cache,
        "data": data,
        "data_root": data_root,
        "split": split,
        "skip_bad": skip_bad,
        "calibration": calibration,
        "max_miou_loss": max_miou_loss,
        "samples": samples,
        "min_agreement": min_agreement,
        "tune_s": tune,
        "threads": threads,
        "overwrite": force,
    }
    options |= {name: _colour(name, text) for name, text in (("mean", mean), ("std", std)) if text is not None}
    model = None if config is None else ModelConfig.from_json(read_text(config))
    check_file(timing_cache)
    asked = BuildOptions(checkpoint, output, config=model, weights=weights, strict=strict, **options)
    dataset = asked.pictures.dataset
    find_checkpoint(checkpoint)

    # From here on PyTorch is needed, which takes seconds to load.
    from agln_fast.builder.build import make_bundle

    with progress_bar("steps") as progress:
        bundle = make_bundle(replace(asked, data=dataset, data_root=None, split=None, progress=progress))
    if dataset is not None:
        tell_skipped(dataset)
    print_built(bundle, json=json)


def print_built(bundle: Bundle, *, json: bool) -> None:
    """Show what was built.

    Raises:
        VerificationError: an engine was left out.
    """
    if json:
        print_json({"bundle": str(bundle.path), **bundle.manifest.to_dict()})
    else:
        print_engines(bundle)
        out.print(f"wrote {bundle.path}", highlight=False, markup=False)
    if bundle.manifest.left_out:
        raise VerificationError(f"left out of {bundle.path}: {', '.join(bundle.manifest.left_out)}")


def _class_set(option: str | None) -> str | ClassSet | None:
    """What `--classes` stands for: the name of a class set, or what a class file says."""
    from agln_fast.data.class_file import read_classes

    if option is None or not Path(option).is_file():
        return option
    return read_classes(option).class_set(Path(option).stem)


def _colour(name: str, text: str) -> tuple[float, ...]:
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{name} {text!r}: give three numbers, such as 0.485,0.456,0.406") from None
    return red, green, blue


def print_engines(bundle: Bundle) -> None:
    """Show the bundle's engines with size, agreement and latency, and why some could not run."""
    from agln_fast.builder.report import accuracies, engine_table, obstacles

    model, contract = bundle.manifest.model, bundle.manifest.contract
    title = f"{shown(bundle.path.name)}: {model.architecture}, {model.encoder}, {contract.height}x{contract.width}"
    header, *rows = engine_table(bundle.manifest, bundle.path)
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)
    for column in header:
        table.add_column(column, justify="left" if column in ("engine", "status") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    out.print(table)
    for line in [*accuracies(bundle.manifest), *obstacles(bundle.manifest)]:
        out.print(line, highlight=False, markup=False)
