"""`agln-fast serve`: bundles behind HTTP and gRPC."""

from __future__ import annotations

import json as json_module
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from agln_fast.cli.console import Json, out, print_json, shown
from agln_fast.errors import BackendError, ConfigError, MissingPackageError

if TYPE_CHECKING:
    from agln_fast.serving.server import Addresses

__all__ = ["named_bundle", "named_bundles", "serve"]

_ADDRESSES, _LIMITS, _END = "Addresses", "Limits", "The end"

_Port = Annotated[int, typer.Option(help="0 for a free one.", min=0, max=65535, rich_help_panel=_ADDRESSES)]


def serve(
    bundles: Annotated[
        list[str] | None, typer.Argument(help="Bundles: PATH, NAME=PATH or NAME:VERSION=PATH.", show_default=False)
    ] = None,
    backend: Annotated[str, typer.Option(help="auto, or a backend: openvino, onnxruntime, torch, fused, ...")] = "auto",
    precision: Annotated[str | None, typer.Option(help="fp32, fp16, bf16 or int8; default any.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default the engine's own.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of each process.")] = None,
    workers: Annotated[int, typer.Option(help="Processes for each bundle, each with its engine.", min=1)] = 1,
    batch_wait_ms: Annotated[
        float, typer.Option(help="Wait so long for a batch to fill; 0 takes what is there.", min=0)
    ] = 0.0,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all.", rich_help_panel=_ADDRESSES)
    ] = "127.0.0.1",
    http_port: _Port = 8080,
    grpc_port: _Port = 8081,
    metrics_port: _Port = 8082,
    queue: Annotated[
        int, typer.Option(help="Requests in flight for each bundle; more get 503.", min=1, rich_help_panel=_LIMITS)
    ] = 64,
    timeout_s: Annotated[
        float, typer.Option(help="A request without an answer by then gets 504.", min=0.001, rich_help_panel=_LIMITS)
    ] = 30.0,
    max_body_mib: Annotated[
        int, typer.Option(help="Largest request; a larger one gets 413.", min=1, max=2047, rich_help_panel=_LIMITS)
    ] = 32,
    canary_s: Annotated[
        float, typer.Option(help="Not ready when an engine answers nothing so long.", min=0.1, rich_help_panel=_LIMITS)
    ] = 5.0,
    linger_s: Annotated[
        float, typer.Option(help="When asked to end, serve on so long, not ready.", min=0, rich_help_panel=_END)
    ] = 0.0,
    drain_s: Annotated[
        float, typer.Option(help="Then wait so long for requests in flight.", min=0, rich_help_panel=_END)
    ] = 30.0,
    model_control: Annotated[
        bool, typer.Option("--model-control", help="Let clients load and unload these bundles.")
    ] = False,
    check: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask a running server what a load balancer would, and end.")
    ] = None,
    json: Json = False,
) -> None:
    """Serve bundles by the Open Inference Protocol (KServe v2), with a page to try them at /.

    SIGTERM or Ctrl-C lets it finish what it has begun; a second one ends it at once. AGLN_FAST_MAX_PIXELS limits what
    is decoded. With --check the exit code is 6 if an answer was bad.

    Example: agln-fast serve street.agln, then open http://127.0.0.1:8080
    """
    if check is not None:
        if bundles:
            raise ConfigError("--check asks a server that runs: give no bundle with it")
        _check(check, json)
        return
    if not bundles:
        raise ConfigError("no bundle: give one to serve, or --check URL")
    from agln_fast.cli.request import open_matching

    served = named_bundles(bundles)
    for _, _, path in served:
        open_matching(path, backend, precision, device, threads)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it would print is raised, too
    try:
        import uvloop

        from agln_fast.serving.model import Limits
        from agln_fast.serving.server import Options, Served
        from agln_fast.serving.server import serve as run
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or "mlserver", "serve", "for Python 3.11 and 3.12") from None

    engine = {
        "backend": backend,
        "precision": precision,
        "device": device,
        "threads": threads,
        "wait_ms": batch_wait_ms,
    }
    models = [Served(str(path.absolute()), name, version, engine) for name, version, path in served]
    options = Options(
        host=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        limits=Limits(workers, queue, timeout_s, canary_s),
        body_bytes=max_body_mib << 20,
        drain_s=drain_s,
        linger_s=linger_s,
        control=model_control,
    )

    def announce(at: Addresses) -> None:
        if json:
            typer.echo(json_module.dumps({**asdict(at), "models": [name for name, _, _ in served]}))  # one line
        else:
            out.print(f"{', '.join(shown(name) for name, _, _ in served)} at {at.http} (page and KServe v2)")
            out.print(f"gRPC {at.grpc}, Prometheus {at.metrics}; Ctrl-C ends it")
        out.file.flush()

    uvloop.run(run(models, options, announce))  # half a millisecond less over HTTP than asyncio's own loop


def named_bundle(argument: str) -> tuple[str, str | None, Path]:
    """Name, version and path of PATH, NAME=PATH or NAME:VERSION=PATH; the name is the folder's without them.

    Raises:
        ConfigError: a name is none that an address can hold.
    """
    match = re.fullmatch(r"([^=/\\]+)=(.+)", argument)
    path = Path(match[2] if match else argument)
    name, _, version = match[1].partition(":") if match else (path.absolute().name.removesuffix(".agln"), "", "")
    for part in (name, version):
        if part and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", part):
            raise ConfigError(f"{part!r}: names and versions are letters, digits, '.', '_', '-'; use NAME=PATH")
    return name, version or None, path


def named_bundles(arguments: list[str]) -> list[tuple[str, str | None, Path]]:
    """As `named_bundle`, of each.

    Raises:
        ConfigError: as there, or two have one name and version.
    """
    found = [named_bundle(argument) for argument in arguments]
    versions: dict[str, list[str | None]] = {}
    for name, version, _ in found:
        versions.setdefault(name, []).append(version)
    for name, listed in versions.items():
        if len(set(listed)) < len(listed):
            raise ConfigError(f"several bundles are called {name}: use NAME=PATH, NAME:VERSION=PATH")
        if None in listed and len(listed) > 1:
            raise ConfigError(f"{name} comes with versions and without: give each one, NAME:VERSION=PATH")
    return found


def _check(url: str, json: bool) -> None:
    from agln_fast.serving.check import ask_all

    rows: list[dict[str, Any]] = []
    table = Table("asked", "answer", "ms", box=SIMPLE_HEAD)
    table.columns[2].justify = "right"
    for each in ask_all(url):
        rows.append(asdict(each))
        colour = "green" if each.good else "red"
        table.add_row(shown(each.question), f"[{colour}]{shown(each.answer)}[/{colour}]", f"{each.milliseconds:.1f}")
    if json:
        print_json(rows)
    else:
        out.print(table)
    bad = [row["question"] for row in rows if not row["good"]]
    if bad:
        raise BackendError(f"{url}: no good answer to: {', '.join(bad)}")
