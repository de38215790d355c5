"""`agln-fast run --ray`: a folder or store of any number of images to masks, on Ray Data."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from agln_fast.cli.console import err, out, print_json, progress_bar, shown
from agln_fast.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from agln_fast.bundle import Bundle
    from agln_fast.serving.offline import Report

__all__ = ["RayOptions", "check_no_ray", "run_offline"]

_MOST_SHOWN = 20  # of what failed


@dataclass(frozen=True)
class RayOptions:
    """Options of `run` that belong to Ray, as they are typed."""

    ray: bool = False
    address: str | None = None
    workers: int | None = None
    overlays: bool = False

    @property
    def asked(self) -> bool:
        """Whether Ray is to run it."""
        return self.ray or self.address is not None


def check_no_ray(images: Sequence[str], output: str | None, options: RayOptions) -> None:
    """
    Raises:
        ConfigError: options that only Ray has, or places that only Ray reaches.
    """
    if options.workers is not None or options.overlays:
        raise ConfigError(f"--{'overlays' if options.overlays else 'workers'} is for Ray: give --ray, too")
    for place in (*images, output or ""):
        if place.startswith(("s3://", "gs://", "abfs://", "hdfs://", "file://")):
            raise ConfigError(f"{place}: give --ray, too: it reads and writes stores")


def run_offline(
    bundle: Bundle,
    images: Sequence[str],
    output: str | None,
    options: RayOptions,
    *,
    recursive: bool,
    json: bool,
    **engine: Any,
) -> None:
    """Segment what `images` name into masks at `output`. `engine`: of `Job.of`.

    Raises:
        typer.Exit: 1, when some images failed; 4, when all did.
    """
    from agln_fast.serving.cluster import OWN, cluster
    from agln_fast.serving.offline import segment_pictures
    from agln_fast.serving.stores import Output, find_pictures

    if output is None:
        raise ConfigError("missing option -o: give a folder for the masks, or a place such as s3://bucket/masks")
    pictures, failed = find_pictures(images, recursive=recursive)
    # What Ray tells about workers it prints to standard output, which belongs to the result.
    with (
        Output(output).with_parts() as place,
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        cluster(options.address or OWN),
        progress_bar("images", remaining=True, rate=True) as bar,
    ):
        task = bar.add_task("segment", total=len(pictures))
        report = segment_pictures(
            bundle,
            pictures,
            place,
            workers=options.workers,
            overlays=options.overlays,
            advance=lambda: bar.advance(task),
            **engine,
        )
    failed |= report.failed
    _tell(report, failed, json)
    if failed:
        raise typer.Exit(1 if report.segmented + report.skipped else ImageError.exit_code)


def _tell(report: Report, failed: dict[str, str], json: bool) -> None:
    rate = report.segmented / report.seconds if report.seconds else 0.0
    milliseconds = {stage: round(value, 3) for stage, value in report.milliseconds.items()}
    if json:
        print_json(
            {
                "segmented": report.segmented,
                "skipped": report.skipped,
                "failed": failed,
                "seconds": round(report.seconds, 3),
                "seconds_until_the_first": round(report.waited, 3),
                "images_per_second": round(rate, 3),
                "milliseconds": milliseconds,
                "engines": dict(report.engines),
                "workers": report.workers,
                "processes": len(report.processes),
                "index": report.index,
            }
        )
    else:
        times = f"{report.seconds:.1f} s ({report.waited:.1f} s until the first)"
        out.print(
            f"{report.segmented} segmented, {report.skipped} were there, {len(failed)} failed, in {times}",
            highlight=False,
        )
        if report.segmented:
            by = f"{report.workers} worker{'s' if report.workers > 1 else ''}, {', '.join(report.engines)}"
            stages = ", ".join(f"{stage} {value:.1f}" for stage, value in milliseconds.items())
            out.print(f"{rate:.1f} images/s by {shown(by)}; ms an image: {stages}", highlight=False)
        out.print(shown(report.index), highlight=False)
    for message in list(failed.values())[:_MOST_SHOWN]:
        err.print(f"[bold red]failed:[/] {shown(message)}", highlight=False)
    if len(failed) > _MOST_SHOWN:
        err.print(f"… and {len(failed) - _MOST_SHOWN} more: {shown(report.index)} has them all", highlight=False)
