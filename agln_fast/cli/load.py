"""`agln-fast load`: requests on a server, or on a bundle, and how long they take."""

from __future__ import annotations

import asyncio
import csv
import io
import json as json_module
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agln_fast.cli.console import Json, err, out, print_json, print_wide, shown
from agln_fast.errors import BackendError, ConfigError, choose

if TYPE_CHECKING:
    from agln_fast.serving.load.scenarios import Trial

__all__ = ["load"]

_REQUESTS = {"single-stream": 300, "server": 1000, "offline": 1000, "search": 1000}
_PERCENTILES = "p50", "p90", "p99", "p99.9", "max"


def load(
    target: Annotated[str, typer.Argument(help="grpc://HOST:PORT, http://HOST:PORT, or a bundle, called in here.")],
    scenario: Annotated[
        str, typer.Option(help="single-stream, server (at --rate), offline, or search (of a rate within --limit-ms).")
    ] = "single-stream",
    rate: Annotated[float | None, typer.Option(help="Requests a second, for server: Poisson arrivals.")] = None,
    limit_ms: Annotated[float | None, typer.Option(help="For search: 99 of 100 answers come within it.")] = None,
    requests: Annotated[
        int | None, typer.Option("-n", "--requests", help="Of each run; default 300 or 1000.", min=1)
    ] = None,
    in_flight: Annotated[int, typer.Option(help="For offline: requests at once.", min=1)] = 16,
    model: Annotated[str | None, typer.Option(help="Its name; default the only one of the server.")] = None,
    kind: Annotated[str, typer.Option("--input", help="pixels, or image: JPEG files, to be decoded.")] = "pixels",
    outputs: Annotated[str, typer.Option(help="labels, labels_png, runs, overlay_png, shares; by commas.")] = "labels",
    images: Annotated[
        Path | None, typer.Option(help="A folder of pictures; default drawn ones of the engine's size.")
    ] = None,
    timeout_ms: Annotated[float | None, typer.Option(help="Deadline that the server is told.", min=0.001)] = None,
    seed: Annotated[int, typer.Option(help="Of the arrivals.", min=0)] = 0,
    backend: Annotated[str, typer.Option(help="Of a bundle: auto, or a backend.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Of a bundle: CPU threads.")] = None,
    save: Annotated[Path | None, typer.Option(help="All runs as .json or .csv.")] = None,
    figure: Annotated[
        Path | None, typer.Option(help="Latency against rate: .png, .svg or .pdf; for server and search.")
    ] = None,
    json: Json = False,
) -> None:
    """Put load on a server of the Open Inference Protocol, or call a bundle, and say how long answers take.

    The scenarios are those of MLPerf Inference: SingleStream, Server (at a rate), Offline; search finds the rate.

    Example: agln-fast load grpc://127.0.0.1:8081 --scenario search --limit-ms 50 --figure load.png
    """
    choose("scenario", scenario, _REQUESTS)
    choose("input", kind, ("pixels", "image"))
    if (scenario == "server") != (rate is not None):
        raise ConfigError("--rate belongs to --scenario server, which needs it")
    if (scenario == "search") != (limit_ms is not None):
        raise ConfigError("--limit-ms belongs to --scenario search, which needs it")
    if figure is not None and scenario not in ("server", "search"):
        raise ConfigError("--figure shows latency against rate: use --scenario server or search")
    if save is not None and save.suffix not in (".json", ".csv"):
        raise ConfigError(f"{save}: give a file .json or .csv")
    from agln_fast.serving.load.targets import Asking

    asking = Asking(model, kind, tuple(filter(None, outputs.split(","))), images, timeout_ms=timeout_ms)
    trials: list[Trial] = []

    async def run() -> None:
        from agln_fast.serving.load import scenarios
        from agln_fast.serving.load.targets import open_target

        count = requests or _REQUESTS[scenario]
        opened = await open_target(target, asking, backend=backend, threads=threads)
        try:
            await opened.ask(0)  # the first one connects
            if scenario == "single-stream":
                trials.append(await scenarios.single_stream(opened, count))
            elif scenario == "offline":
                trials.append(await scenarios.offline(opened, count, in_flight))
            elif rate is not None:
                trials.append(await scenarios.server(opened, rate, count, seed))
            elif limit_ms is not None:
                async for trial in scenarios.search(opened, limit_ms, count):
                    trials.append(trial)
                    if err.is_terminal and trial.offered:
                        p99 = trial.percentiles.get("p99")
                        err.print(f"{trial.offered:.1f}/s: p99 {'none' if p99 is None else f'{p99:.1f} ms'}")
        finally:
            await opened.close()

    asyncio.run(run())
    if save is not None:
        _save(trials, save)
    if figure is not None:
        _draw(trials, figure, target, limit_ms)
    if json:
        print_json([_plain(trial) for trial in trials])
    else:
        _print(trials, limit_ms)
    if lost := sum(trial.lost for trial in trials):
        raise BackendError(f"{target}: {lost} requests were never answered")


def _print(trials: list[Trial], limit_ms: float | None) -> None:
    last = trials[-1]
    table = Table(
        "scenario", "offered/s", "answered/s", *(f"{name} ms" for name in _PERCENTILES), "errors", box=SIMPLE_HEAD
    )
    for column in table.columns[1:-1]:
        column.justify = "right"
    for trial in trials:
        table.add_row(
            trial.scenario,
            "none" if trial.offered is None else f"{trial.offered:.1f}",
            f"{trial.rate:.1f}",
            *(f"{trial.percentiles[name]:.1f}" if name in trial.percentiles else "few" for name in _PERCENTILES),
            ", ".join(f"{count} {status}" for status, count in trial.errors.items()) or "none",
        )
    print_wide(table)
    if last.stages:
        stages = ", ".join(f"{name.removesuffix('_ms')} {value:.2f}" for name, value in last.stages.items())
        out.print(f"medians of the stages, ms: {shown(stages)}")
    if last.batches:
        out.print("images in a run: " + ", ".join(f"{size} for {count}" for size, count in last.batches.items()))
    if last.refusal_p99 is not None:
        out.print(f"refused: half within {last.refusal_p50:.1f} ms, 99 of 100 within {last.refusal_p99:.1f} ms")
    if limit_ms is not None:
        out.print(f"largest rate with 99 of 100 answers within {limit_ms:g} ms: {last.offered:.1f} a second")
    if not all(trial.valid for trial in trials):
        out.print("not valid: the generator itself was late; give it more of the machine")


def _plain(trial: Trial) -> dict[str, Any]:
    return {**asdict(trial), "valid": trial.valid}


def _save(trials: list[Trial], path: Path) -> None:
    """CSV has a column for each percentile; what is a table itself is JSON in it."""
    from agln_fast.files import replacing
    from agln_fast.machine import machine

    text = io.StringIO()
    if path.suffix == ".json":
        packages = "agln-fast", "mlserver", "tritonclient", "openvino", "onnxruntime"
        document = {"machine": machine(packages=packages), "trials": [_plain(trial) for trial in trials]}
        text.write(json_module.dumps(document, indent=2) + "\n")
    else:
        rows = []
        for trial in trials:
            row = _plain(trial)
            percentiles = row.pop("percentiles")
            row |= {name: percentiles.get(name) for name in _PERCENTILES}
            rows.append(
                {key: json_module.dumps(value) if isinstance(value, dict) else value for key, value in row.items()}
            )
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    with replacing(path, ConfigError) as part:
        part.write_text(text.getvalue(), encoding="utf-8")


def _draw(trials: list[Trial], path: Path, target: str, limit_ms: float | None) -> None:
    from agln_fast.figures.load import draw_load
    from agln_fast.figures.saving import save_figure

    points = [(trial.offered, trial.percentiles) for trial in trials if trial.offered is not None]
    chosen = trials[-1].offered if limit_ms is not None else None
    save_figure(draw_load(points, title=target, limit_ms=limit_ms, chosen=chosen), path)
