"""`agln-fast eval`: judge an engine by the ground truth of a dataset, or compare two."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agln_fast.cli.console import Json, err, out, print_json, progress_bar, shown
from agln_fast.cli.datasets import Data, DataRoot, SkipBad, Split, tell_skipped, warn_of_names
from agln_fast.cli.request import WeightsName, may_be_bundle
from agln_fast.errors import ConfigError, MissingPackageError

if TYPE_CHECKING:
    from agln_fast.bundle import Bundle
    from agln_fast.contract import Resize
    from agln_fast.evaluation.evaluate import Comparison, Evaluation
    from agln_fast.runtime.augmentation import TestTimeAugmentation
    from agln_fast.runtime.segmenter import Segmenter

__all__ = ["evaluate"]


def evaluate(
    source: Annotated[
        Path, typer.Argument(help="A bundle, NAME.agln, or a checkpoint (file, name, or training), which PyTorch runs.")
    ],
    backend: Annotated[str, typer.Option(help="auto, or a backend: torch, fused, openvino, tensorrt, ...")] = "auto",
    precision: Annotated[
        str | None, typer.Option(help="fp32, fp16, bf16 or int8; default any engine's, fp32 for a checkpoint.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default the engine's own.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    weights: WeightsName = None,
    data: Data = "scenes",
    data_root: DataRoot = None,
    split: Split = None,
    skip_bad: SkipBad = False,
    size: Annotated[
        str | None,
        typer.Option(help="Height x width: of the scenes; of a checkpoint's window elsewhere, default 480x480."),
    ] = None,
    limit: Annotated[int | None, typer.Option("-n", "--limit", min=1, help="Only that many samples.")] = None,
    tta: Annotated[bool, typer.Option("--tta/--no-tta", help="Multi-scale and flip, averaged.")] = False,
    scales: Annotated[str | None, typer.Option(help="Scales of --tta; default 0.5,0.75,1,1.25,1.5,1.75.")] = None,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Whether --tta sees the mirror image, too.")] = True,
    base_size: Annotated[
        int | None, typer.Option(help="Longer side at scale 1 of --tta, pixels; default 520/480 of the window.")
    ] = None,
    other: Annotated[Path | None, typer.Option("--compare", help="Another bundle or checkpoint, or the same.")] = None,
    compare_backend: Annotated[str, typer.Option(help="Backend of --compare.")] = "auto",
    compare_precision: Annotated[str | None, typer.Option(help="Precision of --compare.")] = None,
    compare_weights: Annotated[str | None, typer.Option(help="As --weights, of --compare.")] = None,
    confusion: Annotated[
        Path | None, typer.Option(help="Draw the confusion matrix: FILE.png, .svg or .pdf; of SOURCE.")
    ] = None,
    flips: Annotated[
        Path | None, typer.Option(help="Draw where --compare disagrees, for the worst images: FILE.png, .svg or .pdf.")
    ] = None,
    json: Json = False,
) -> None:
    """Print IoU and accuracy per class, mIoU and pixel accuracy on a dataset.

    Example: agln-fast eval street.agln --backend openvino --compare street.agln --compare-backend torch
    """
    from importlib.util import find_spec

    from agln_fast.cli.places import check_figure
    from agln_fast.contract import parse_size
    from agln_fast.data.registry import open_dataset

    if flips is not None and other is None:
        raise ConfigError("--flips shows where two engines disagree: name the second one with --compare")
    if not tta and (scales, flip, base_size) != (None, True, None):
        raise ConfigError("--scales, --no-flip and --base-size are settings of --tta: add it")
    for picture in (confusion, flips):
        check_figure(picture)
    augmentation = _augmentation(scales, flip, base_size) if tta else False
    wanted = None if size is None else parse_size(size)
    sources = [_check_source(source, backend, precision, weights, device, threads)]
    if other is not None:
        sources.append(_check_source(other, compare_backend, compare_precision, compare_weights, device, threads))
    scenes_size = wanted if data == "scenes" else None
    dataset = open_dataset(data, split, data_root, size=scenes_size, length=limit, skip_bad=skip_bad)
    for bundle in filter(None, sources):
        dataset.check_classes(len(bundle.manifest.classes), f"bundle {bundle.path}")
    window = dataset[0].image.shape[:2] if data == "scenes" else wanted or (480, 480)
    if data != "scenes" and wanted and may_be_bundle(source) and (other is None or may_be_bundle(other)):
        raise ConfigError(f"size {size}: the engines of a bundle have theirs, and images of {data!r} their own")
    if find_spec("torchmetrics") is None:
        raise MissingPackageError("torchmetrics", "eval")

    # From here on PyTorch is needed, which takes seconds to load.
    from agln_fast.evaluation.evaluate import compare as compare_engines
    from agln_fast.evaluation.evaluate import evaluate as evaluate_engine

    def opened(path: Path, backend: str, precision: str | None, weights: str | None) -> Segmenter:
        # Scenes are windows: several go in a batch.
        resize: Resize = "stretch" if data == "scenes" else "slide"
        return _open(path, backend, precision, weights, device, threads, window, resize)

    comparison = None
    with opened(source, backend, precision, weights) as a, progress_bar("images") as progress:
        warn_of_names(a.class_set, dataset.class_set)
        if other is None:
            result = evaluate_engine(a, dataset, tta=augmentation, progress=progress)
        else:
            with opened(other, compare_backend, compare_precision, compare_weights) as b:
                comparison = compare_engines(a, b, dataset, tta=augmentation, progress=progress)
            result = comparison.a
    if confusion is not None:
        _draw_confusion(result, confusion)
    names = _names(comparison, source, other) if comparison is not None and other is not None else ("", "")
    drawn = flips is not None and comparison is not None and _draw_flips(comparison, names, flips)
    tell_skipped(dataset)
    if json:
        print_json((comparison or result).to_dict())
        return
    if comparison is None:
        _print_evaluation(result)
    else:
        _print_comparison(comparison, names)
    for path, done in ((confusion, True), (flips, drawn)):
        if path is not None and done:
            out.print(f"wrote {path}", highlight=False, markup=False)


def _open(
    path: Path,
    backend: str,
    precision: str | None,
    weights: str | None,
    device: str | None,
    threads: int | None,
    window: tuple[int, int],
    resize: Resize,
) -> Segmenter:
    """A bundle's engine, or the network of a checkpoint under windows of the size `window`."""
    from agln_fast.engines import REFERENCE
    from agln_fast.models.checkpoint import load_checkpoint
    from agln_fast.runtime.networks import load_network
    from agln_fast.runtime.segmenter import load

    if may_be_bundle(path):
        return load(path, backend, precision=precision, device=device, threads=threads)
    network = load_checkpoint(path, weights=weights)
    return load_network(
        network,
        size=window,
        resize=resize,
        backend=REFERENCE if backend == "auto" else backend,
        precision=precision or "fp32",
        device=device,
        threads=threads,
    )


def _check_source(
    path: Path, backend: str, precision: str | None, weights: str | None, device: str | None, threads: int | None
) -> Bundle | None:
    """Refuse what `_open` could not open, as far as names and files tell; the bundle, if it is one."""
    from agln_fast.cli.request import check_engine, open_matching
    from agln_fast.engines import check_network_precision, network_kinds
    from agln_fast.models.shipped import find_checkpoint

    if may_be_bundle(path):
        if weights is not None:
            raise ConfigError(f"weights {weights!r}: only checkpoints hold several, and {path} is a bundle")
        return open_matching(path, backend, precision, device, threads)
    check_engine(backend, precision, device, threads)
    if backend not in ("auto", *network_kinds()):
        able = ", ".join(network_kinds())
        raise ConfigError(
            f"{path}: PyTorch runs checkpoints ({able}); for backend {backend!r} build a bundle from it first"
        )
    check_network_precision(precision or "fp32")
    find_checkpoint(path)
    return None


def _augmentation(scales: str | None, flip: bool, base_size: int | None) -> TestTimeAugmentation:
    from agln_fast.runtime.augmentation import TestTimeAugmentation

    if scales is None:
        return TestTimeAugmentation(flip=flip, base_size=base_size)
    try:
        numbers = tuple(float(scale) for scale in scales.split(","))
    except ValueError:
        raise ConfigError(f"scales {scales!r}: give numbers, such as 0.5,1,1.5") from None
    return TestTimeAugmentation(numbers, flip, base_size)


def _draw_confusion(result: Evaluation, path: Path) -> None:
    from agln_fast.figures.confusion import draw_confusion
    from agln_fast.figures.saving import save_figure

    figure = draw_confusion(
        result.metrics.matrix, result.class_set.classes, title=f"{_title(result)}\n{_score(result)}"
    )
    save_figure(figure, path)


def _draw_flips(comparison: Comparison, names: tuple[str, str], path: Path) -> bool:
    """Whether there was anything to draw."""
    from agln_fast.figures.flips import draw_flips
    from agln_fast.figures.saving import save_figure

    if not comparison.worst:
        err.print(f"{path}: not drawn, the engines agree on every pixel", highlight=False, markup=False)
        return False
    a, b = names
    title = f"{a} against {b}, {_where(comparison.a)}\n{_disagreement(comparison)}; mIoU {_score_pair(comparison)}"
    margin = {"logits": "difference of logits", "probabilities": "difference of probabilities", "nothing": "weight"}
    figure = draw_flips(
        comparison.worst, comparison.a.class_set, a=a, b=b, title=title, margin=margin[comparison.weight]
    )
    save_figure(figure, path)
    return True


def _names(comparison: Comparison, source: Path, other: Path) -> tuple[str, str]:
    """What tells the two apart: their engines, their sources, or, if these are equal too, A and B."""
    a, b = comparison.a.engine, comparison.b.engine
    if source == other:
        return (a, b) if a != b else (f"A: {a}", f"B: {b}")
    return (source.stem, other.stem) if a == b else (f"{source.stem} {a}", f"{other.stem} {b}")


def _title(result: Evaluation) -> str:
    """`torch-fp32 on cpu: scenes val, 250 images, 6 scales and flip`."""
    return f"{result.engine} on {result.device}: {_where(result)}"


def _where(result: Evaluation) -> str:
    where = f"{result.dataset} {result.split}, {result.samples} images"
    if result.tta is None:
        return where
    scales = len(result.tta.scales)
    return f"{where}, {scales} scale{'' if scales == 1 else 's'}{' and flip' if result.tta.flip else ''}"


def _score(result: Evaluation) -> str:
    metrics = result.metrics
    return (
        f"mIoU {_percent(metrics.mean_iou)}, pixel accuracy {_percent(metrics.pixel_accuracy)}, "
        f"mean accuracy {_percent(metrics.mean_accuracy)}"
    )


def _score_pair(comparison: Comparison) -> str:
    return f"{_percent(comparison.a.metrics.mean_iou)} and {_percent(comparison.b.metrics.mean_iou)}"


def _disagreement(comparison: Comparison) -> str:
    plain, weighted = _percent(comparison.disagreement, 4), _percent(comparison.weighted_disagreement, 4)
    by = "" if comparison.weight == "nothing" else f", {weighted} weighted by the margin of {comparison.weight}"
    return f"labels differ on {plain} of the pixels{by}"


def _percent(rate: float, digits: int = 2) -> str:
    return "–" if math.isnan(rate) else f"{rate:.{digits}%}"


def _points(difference: float) -> str:
    return "–" if math.isnan(difference) else f"{100 * difference:+.2f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=shown(title), box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column == "class" else "right", overflow="fold")
    return table


def _print_evaluation(result: Evaluation) -> None:
    table = _table(_title(result), "class", "IoU", "accuracy", "share of pixels")
    rows = zip(result.class_set.classes, result.metrics.iou, result.metrics.accuracy, result.metrics.share, strict=True)
    for name, *rates in rows:
        table.add_row(shown(name), *map(_percent, rates))
    out.print(table)
    out.print(f"{_score(result)}; {result.milliseconds:.1f} ms an image", highlight=False)


def _print_comparison(comparison: Comparison, names: tuple[str, str]) -> None:
    title = f"{names[0]} against {names[1]}, {_where(comparison.a)}"
    table = _table(title, "class", f"IoU {names[0]}", f"IoU {names[1]}", "difference")
    ious = comparison.a.metrics.iou, comparison.b.metrics.iou, comparison.iou_difference
    for name, a, b, difference in zip(comparison.a.class_set.classes, *ious, strict=True):
        table.add_row(shown(name), _percent(a), _percent(b), _points(difference))
    out.print(table)
    for name, result in zip(names, (comparison.a, comparison.b), strict=True):
        out.print(f"{name}: {_score(result)}; {result.milliseconds:.1f} ms an image", highlight=False, markup=False)
    out.print(_disagreement(comparison), highlight=False)
    if comparison.worst:
        worst = ", ".join(f"{flips.name} {_percent(flips.weighted_share, 4)}" for flips in comparison.worst)
        out.print(f"worst images: {worst}", highlight=False, markup=False)
