"""What a bundle holds, how fast, how close to the reference: rows for the screen, and `report.md`."""

from __future__ import annotations

from pathlib import Path

from agln_fast.manifest import Accuracy, EngineRecord, Manifest

__all__ = ["accuracies", "engine_table", "obstacles", "write_report"]

_STATUS = {"passed": "passed", "failed": "FAILED", "not verified on this machine": "not run"}


def engine_table(manifest: Manifest, folder: Path) -> list[tuple[str, ...]]:
    """Header and one row for each engine of the bundle in `folder`: size, agreement, latency, status.

    Logit errors have a column only where an engine returns logits.
    """
    rows: list[tuple[str, ...]] = [("engine", "MB", "agreement", "weighted", "logit error", "ms", "status")]
    rows += [_row(engine, folder) for engine in manifest.engines]
    if manifest.contract.output == "labels":
        rows = [(*row[:4], *row[5:]) for row in rows]
    return rows


def _row(engine: EngineRecord, folder: Path) -> tuple[str, ...]:
    size = f"{sum((folder / name).stat().st_size for name in engine.files) / 1e6:.0f}"
    check = engine.verification
    status = "not run" if check is None else _STATUS[check.status]
    if check is None or check.agreement is None or check.weighted_agreement is None:
        return engine.name, size, "–", "–", "–", "–", status
    return (
        engine.name,
        size,
        f"{check.agreement:.3%}",
        f"{check.weighted_agreement:.3%}",
        "–" if check.max_logit_error is None else f"{check.max_logit_error:.1e}",
        "–" if check.latency_ms is None else f"{check.latency_ms:.1f}",
        status,
    )


def accuracies(manifest: Manifest) -> list[str]:
    """A line for each engine whose loss was measured, and for each that leaves blocks in floating point."""
    lines = [_loss(engine, engine.accuracy) for engine in manifest.engines if engine.accuracy is not None]
    lines += [
        f"{engine.name}: in floating point, because they cost most: {', '.join(engine.floating)}"
        for engine in manifest.engines
        if engine.floating
    ]
    return lines


def _loss(engine: EngineRecord, accuracy: Accuracy) -> str:
    ran = f", its int8 graph run by {accuracy.backend}" if accuracy.backend != engine.backend else ""
    return (
        f"{engine.name}: {100 * accuracy.score:.2f} % {accuracy.measure}, fp32 {100 * accuracy.reference:.2f} %: loses "
        f"{accuracy.loss:.2f} points ({accuracy.low:.2f} to {accuracy.high:.2f}) on {accuracy.images} images of "
        f"{accuracy.dataset}, {accuracy.split}{ran}"
    )


def obstacles(manifest: Manifest) -> list[str]:
    """A line for each engine that could not be verified, and for each that was left out, and why."""
    return [
        *(
            f"{engine.name}: {engine.verification.status}: {engine.verification.reason}"
            for engine in manifest.engines
            if engine.verification is not None and engine.verification.reason
        ),
        *(f"left out: {reason}" for reason in manifest.left_out.values()),
    ]


def write_report(path: Path, name: str, manifest: Manifest, folder: Path) -> None:
    """Write the report of the bundle `name`, whose files lie in `folder`, to `path`."""
    model, contract = manifest.model, manifest.contract
    header, *engines = engine_table(manifest, folder)
    rows = [header, ("---",) * len(header), *engines]
    batch = str(contract.max_batch)
    if contract.min_batch != contract.max_batch:
        batch = f"{contract.min_batch} to {contract.max_batch}"
    lines = [
        f"# {name}",
        "",
        f"{model.architecture} with {model.encoder}, {model.num_classes} classes; input {contract.height}x"
        f"{contract.width}, batch {batch}, {contract.layout} -> {contract.output}, resize policy {contract.resize}.",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
        "",
        *(f"- {line}" for line in [*accuracies(manifest), *obstacles(manifest)]),
        "",
        "Agreement is the share of pixels with the label of the fp32 reference network; weighted, each pixel counts by",
        "the reference's margin between its first and second class. Times are medians of single runs on the machine",
        "that built the bundle. What an engine loses is the fp32 network's score minus its own, in percentage points,",
        "with the 95 % bootstrap interval over the images; agreement is a score, too, where there are no masks.",
        "",
        "Built with " + ", ".join(f"{package} {number}" for package, number in manifest.created_with.items()) + ".",
        "",
    ]
    path.write_text("\n".join(lines))
