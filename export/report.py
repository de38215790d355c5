"""What a bundle holds, how fast, how close to the reference: rows for the screen, and `report.md`."""

from __future__ import annotations

from pathlib import Path

from agln_fast.bundle import EngineRecord, Manifest

__all__ = ["ENGINE_COLUMNS", "engine_row", "obstacles", "write_report"]

ENGINE_COLUMNS = ("engine", "MB", "agreement", "weighted", "logit error", "ms", "status")


def engine_row(engine: EngineRecord, folder: Path) -> tuple[str, ...]:
    """The cells of ENGINE_COLUMNS for one engine of the bundle in `folder`."""
    size = f"{(folder / engine.file).stat().st_size / 1e6:.1f}"
    check = engine.verification
    if check is None or check.agreement is None or check.weighted_agreement is None:
        return (
            engine.name,
            size,
            "–",
            "–",
            "–",
            "–",
            "not run here" if check is None or check.status != "failed" else "FAILED",
        )
    return (
        engine.name,
        size,
        f"{check.agreement:.3%}",
        f"{check.weighted_agreement:.3%}",
        "–" if check.max_logit_error is None else f"{check.max_logit_error:.1e}",
        "–" if check.latency_ms is None else f"{check.latency_ms:.1f}",
        check.status,
    )


def obstacles(manifest: Manifest) -> list[str]:
    """A line for each engine that could not be verified: why, and for which GPUs it was built."""
    lines = []
    for engine in manifest.engines:
        if engine.verification is not None and engine.verification.reason:
            built = f"built for {', '.join(engine.compute_capabilities)}; " if engine.compute_capabilities else ""
            lines.append(f"{engine.name}: {built}{engine.verification.status}: {engine.verification.reason}")
    return lines


def write_report(path: Path, name: str, manifest: Manifest, folder: Path) -> None:
    """Write the report of the bundle `name`, whose files lie in `folder`, to `path`."""
    model, contract = manifest.model, manifest.contract
    rows = [ENGINE_COLUMNS, ("---",) * len(ENGINE_COLUMNS), *(engine_row(e, folder) for e in manifest.engines)]
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
        *(f"- {line}" for line in obstacles(manifest)),
        "",
        "Agreement is the share of pixels with the label of the fp32 reference network; weighted, each pixel counts by",
        "the reference's margin between its first and second class. Times are medians of single runs on the machine",
        "that built the bundle.",
        "",
        "Built with " + ", ".join(f"{package} {number}" for package, number in manifest.created_with.items()) + ".",
        "",
    ]
    path.write_text("\n".join(lines))
