"""Rows as the suite would measure them, with numbers that are easy to check."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from agln_fast.bench.race.results import Results
from agln_fast.bench.race.rows import Row

_ROW = Row(
    network="agln_resnet50",
    contestant="openvino",
    ours=False,
    precision="fp32",
    device="cpu",
    size="512x512",
    batch=1,
    num_classes=59,
    settings="LATENCY, f32, 2 threads",
    plan="",
    median_ms=100.0,
    p95_ms=110.0,
    p99_ms=120.0,
    engine_ms=100.0,
    images_per_second=10.0,
    ratio=1.0,
    ratio_low=1.0,
    ratio_high=1.0,
    peak_memory_mb=812.4,
    size_mb=171.0,
    build_s=4.0,
    gmacs=196.0,
    parameters_m=42.8,
    peak_fraction=0.6,
    agreement=0.99996,
    miou=59.46,
)
_FASTER = {"ratio": 1.56, "ratio_low": 1.5, "ratio_high": 1.6}
MACHINE = {"cpu": "Xeon", "threads": 2, "gpu": None, "python": "3.11.7", "torch": "2.13.0", "triton": None}


def row(median_ms: float = 100.0, **changes: Any) -> Row:
    """A peer on AGLN; the 95th percentile is 10 % above the median."""
    times = {"median_ms": median_ms, "p95_ms": 1.1 * median_ms, "images_per_second": 1000 / median_ms}
    return replace(_ROW, **times | changes)


def results() -> Results:
    """Three networks, six contestants each; a ladder; and scaling over seven sizes and five batches."""
    rows, scaling = [], []
    for network, ms in (("fpn_resnet50", 400.0), ("agln_resnet50", 700.0), ("agln_lite_resnet50", 500.0)):
        rows += [
            row(0.64 * ms, network=network, contestant="planned openvino", ours=True, **_FASTER),
            row(ms, network=network),
            row(1.1 * ms, network=network, contestant="onnxruntime", ratio=0.91, ratio_low=0.9, ratio_high=0.93),
            row(1.7 * ms, network=network, contestant="torch channels_last", ratio=None, miou=None),
            row(0.15 * ms, network=network, contestant="planned openvino", ours=True, precision="bf16", **_FASTER),
            row(0.23 * ms, network=network, precision="bf16"),
        ]
    for contestant, precision, ms in (("planned openvino", "bf16", 109.0), ("openvino", "fp32", 706.0)):
        one = {"contestant": contestant, "precision": precision, "ours": contestant != "openvino"}
        sides = (256, 384, 512, 768, 1024, 1536, 2048)
        scaling += [row(ms * (side / 512) ** 2, size=f"{side}x{side}", **one) for side in sides]
        scaling += [row(ms * batch**0.5, batch=batch, **one) for batch in (2, 4, 8, 16)]
    ladder = [
        row(706.0, contestant="openvino, best peer"),
        row(353.0, contestant="fold_batchnorm", ours=True, plan="fold_batchnorm"),
        row(70.6, contestant="winograd(3)", ours=True, plan="fold_batchnorm winograd(3)"),
    ]
    return Results(MACHINE, "agln-fast bench", "2026-01-02", tuple(rows), tuple(ladder), tuple(scaling))
