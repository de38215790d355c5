"""Networks side by side: build each, open every engine that runs here, and time them in turns."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from agln_fast.backends import open_engine
from agln_fast.bench.machine import machine
from agln_fast.bench.weights import random_network
from agln_fast.errors import BackendError, ConfigError, VerificationError
from agln_fast.export.build import build
from agln_fast.models.complexity import complexity
from agln_fast.runtime.verify import make_reference, sample_frames, verify_engine

__all__ = ["DEFAULT_NETWORKS", "Row", "compare_networks", "to_json"]

DEFAULT_NETWORKS = ("fpn_resnet50", "agln_resnet50", "agln_lite_resnet50")


@dataclass(frozen=True)
class Row:
    """One network on one engine; times are of the engine alone, uint8 image in, labels out.

    ratio: median over the rounds of this network's time to that of the first network on the same engine.
    agreement: share of pixels with the label of the fp32 reference.
    gmacs: multiply-adds of convolutions and matrix products for one image, 1e9.
    """

    network: str
    engine: str
    device: str
    precision: str
    size: str
    batch: int
    median_ms: float
    p95_ms: float
    images_per_second: float
    ratio: float
    agreement: float | None
    parameters_m: float
    gmacs: float


def compare_networks(
    networks: Sequence[str] = DEFAULT_NETWORKS,
    *,
    size: tuple[int, int] = (512, 512),
    num_classes: int = 59,
    batch: int = 1,
    precision: str = "auto",
    targets: Sequence[str] = ("cpu",),
    device: str | None = None,
    warmup: int = 1,
    iters: int = 5,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Build `networks` (presets, random weights), then time all their engines that run here, alternating.

    Args:
        size: height and width, pixels.
        precision, targets: as `build` has them.
        device: "cpu", "cuda", …: engines that cannot use it are left out; None for each engine's own.
        warmup, iters: rounds before and while timing; one round runs every engine of every network once.

    Raises:
        ConfigError: an unknown network, or a count that makes no sense.
        BackendError: no engine runs on that device.
    """
    if warmup < 0 or iters < 1:
        raise ConfigError(f"warmup {warmup}, iters {iters}: need at least 0 and 1")
    image = np.random.default_rng(0).integers(0, 256, (batch, *size, 3), np.uint8)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        opened, left_out, costs = [], [], {}
        for name in networks:
            model = random_network(name, num_classes)
            costs[name] = complexity(model.config, *size)[-1]
            bundle = build(
                model,
                Path(folder) / name,
                size=size,
                batch=batch,
                precision=precision,
                targets=targets,
                threads=threads,
                progress=progress,
            )
            for engine in bundle.manifest.engines:
                try:
                    if device is not None:
                        # The build compared it where it runs by default, which may be another device.
                        references = make_reference(model, bundle, sample_frames(None, bundle.manifest.contract))
                        checked = verify_engine(bundle, engine, references, device=device, threads=threads)
                        engine = replace(engine, verification=checked)
                    backend = stack.enter_context(open_engine(bundle, engine, device=device, threads=threads))
                    opened.append((name, engine, backend))
                except (BackendError, VerificationError) as error:
                    left_out.append(f"{name}: {error}")
        if not opened:
            raise BackendError(f"no engine runs here: {'; '.join(left_out)}")
        seconds: list[list[float]] = [[] for _ in opened]
        task = None if progress is None else progress.add_task("measure", total=warmup + iters)
        for i_round in range(warmup + iters):
            for times, (_, _, backend) in zip(seconds, opened, strict=True):
                before = time.perf_counter()
                backend.run(image)
                if i_round >= warmup:
                    times.append(time.perf_counter() - before)
            if progress is not None and task is not None:
                progress.advance(task)

        baselines: dict[str, list[float]] = {}
        rows = []
        for times, (name, engine, backend) in zip(seconds, opened, strict=True):
            baseline = baselines.setdefault(engine.name, times)
            median, cost = statistics.median(times), costs[name]
            rows.append(
                Row(
                    network=name,
                    engine=engine.name,
                    device=backend.device,
                    precision=backend.precision,
                    size=f"{size[0]}x{size[1]}",
                    batch=batch,
                    median_ms=1e3 * median,
                    p95_ms=1e3 * float(np.percentile(times, 95)),
                    images_per_second=batch / median,
                    ratio=statistics.median(mine / base for mine, base in zip(times, baseline, strict=True)),
                    agreement=engine.verification.agreement if engine.verification else None,
                    parameters_m=cost.parameters / 1e6,
                    gmacs=(cost.convolution + cost.matmul) / 1e9,
                )
            )
    return rows


def to_json(rows: Sequence[Row]) -> dict[str, Any]:
    """Machine and rows as plain JSON types."""
    return {"machine": machine(), "rows": [asdict(row) for row in rows]}
