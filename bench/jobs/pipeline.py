"""What is done around an engine, against the engine: milliseconds before, in and after it, for images of three sizes.

python -m agln_fast.bench.jobs.pipeline BUNDLE [-o FILE.json] [--rounds N] [--threads N]

Every engine of the bundle that runs on this CPU, in turns, on drawn scenes of 128x128, 512x512 and 1080x1920 pixels.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from agln_fast.bench.race.results import Results, save_results
from agln_fast.bench.race.rows import PipelineRow
from agln_fast.bundle import open_bundle
from agln_fast.data.scenes import Scenes
from agln_fast.engines import packages
from agln_fast.machine import machine
from agln_fast.runtime.images import ImageArray
from agln_fast.runtime.result import Timing
from agln_fast.runtime.segmenter import Segmenter, load, runnable_engines
from agln_fast.runtime.turns import rounds as in_turns

__all__ = ["GOALS_MS", "main", "measure"]

GOALS_MS = {(128, 128): 1.5, (512, 512): 8.0, (1080, 1920): 30.0}
"""(height, width), pixels -> milliseconds before and after an engine that gives 12 maps of logits of 128x128."""
_WARM_UP = 3


def measure(bundle: str | Path, rounds: int = 30, threads: int | None = None) -> list[PipelineRow]:
    """For each engine on the CPU and each size: medians and minima of pre, engine and post, milliseconds.

    Raises:
        BundleError: there is no such bundle.
    """
    opened = open_bundle(bundle)
    records = [record for record, obstacle in runnable_engines(opened) if obstacle is None and record.target == "cpu"]
    rows = []
    with ExitStack() as stack:
        segmenters = [
            stack.enter_context(load(opened, record.backend, precision=record.precision, threads=threads))
            for record in records
        ]
        for size in GOALS_MS:
            image = Scenes("val", size=size)[0].image
            timings: list[list[Timing]] = [[] for _ in segmenters]
            turns = [partial(_turn, *pair, image) for pair in zip(segmenters, timings, strict=True)]
            for _ in islice(in_turns(turns), _WARM_UP + rounds):
                pass
            rows += [_row(record.name, size, found[_WARM_UP:]) for record, found in zip(records, timings, strict=True)]
    return rows


def _turn(segment: Segmenter, timings: list[Timing], image: ImageArray) -> None:
    segment(image)  # the engine's threads are awake from now on, as they are in a stream of images
    timings.append(segment(image).timing)


def _row(name: str, size: tuple[int, int], timings: Sequence[Timing]) -> PipelineRow:
    columns = {
        "pre": [timing.preprocess for timing in timings],
        "engine": [timing.engine for timing in timings],
        "post": [timing.postprocess for timing in timings],
        "pre_and_post": [timing.preprocess + timing.postprocess for timing in timings],
    }
    times = {f"{column}_ms": statistics.median(values) for column, values in columns.items()}
    times |= {f"least_{column}_ms": min(values) for column, values in columns.items()}
    return PipelineRow(name, size[0], size[1], **times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m agln_fast.bench.jobs.pipeline", description="Time what is done around engines."
    )
    parser.add_argument("bundle")
    parser.add_argument("-o", "--output", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    rows = measure(options.bundle, options.rounds, options.threads)
    table = Table("engine", "image", "pre ms", "engine ms", "post ms", "pre + post ms")
    for row in rows:
        times = (f"{time:.2f}" for time in (row.pre_ms, row.engine_ms, row.post_ms, row.pre_and_post_ms))
        table.add_row(row.engine_name, f"{row.height}x{row.width}", *times)
    Console().print(table)
    if options.output is not None:
        command = shlex.join(["python", "-m", "agln_fast.bench.jobs.pipeline", *(arguments or sys.argv[1:])])
        today = datetime.now(UTC).date().isoformat()
        save_results(
            Results(machine(options.threads, packages()), command, today, tuple(rows), kind="pipeline"), options.output
        )


if __name__ == "__main__":
    main()
