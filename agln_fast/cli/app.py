"""The typer application, and how errors leave it."""

from __future__ import annotations

import errno
import signal
import sys
from typing import Annotated

import typer

from agln_fast import __version__, environment, interruption
from agln_fast.cli.bench import bench
from agln_fast.cli.build import build
from agln_fast.cli.console import err, shown
from agln_fast.cli.data import data
from agln_fast.cli.doctor import doctor
from agln_fast.cli.eval import evaluate
from agln_fast.cli.inspect import inspect
from agln_fast.cli.load import load
from agln_fast.cli.plugins import plugins
from agln_fast.cli.rebuild import rebuild
from agln_fast.cli.repository import export_repository
from agln_fast.cli.run import run
from agln_fast.cli.scenes import scenes
from agln_fast.cli.serve import serve
from agln_fast.cli.streams import open_streams
from agln_fast.cli.train import train
from agln_fast.cli.verify import verify
from agln_fast.cli.visualize import visualize
from agln_fast.errors import AglnError, missing_half

__all__ = ["app", "main"]

app = typer.Typer(
    name="agln-fast",
    help="Verified, low-latency inference engines for AGLN-family semantic segmentation networks.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
for verb in (
    build,
    rebuild,
    run,
    serve,
    load,
    export_repository,
    bench,
    verify,
    evaluate,
    train,
    data,
    scenes,
    visualize,
    inspect,
    plugins,
    doctor,
):
    app.command({evaluate: "eval", export_repository: "export-repository"}.get(verb))(verb)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"agln-fast {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors; works behind any verb.")] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the command line.

    Exit codes are those of `agln_fast.errors`; 128 plus its number after a signal, that of a closed pipe included; 1
    where standard output cannot be written.
    """
    out = open_streams()
    try:
        with interruption.listening():
            code = _run_verb()
            interruption.check()  # wherever a signal's exception went; until the end of the block others may come
    except interruption.Interrupted as signalled:
        err.print(str(signalled))
        code = signalled.exit_code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.stdout.flush()
    if out.failure is not None and code == 0:
        code = _explain(out.failure)
    sys.exit(code)


def _run_verb() -> int:
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    try:
        environment.keep_caches_together()
        app(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except Exception as error:
        if debug:
            raise
        known = missing_half(error) if isinstance(error, ModuleNotFoundError) else error
        if isinstance(known, AglnError):
            err.print(f"[bold red]error:[/] {shown(known)}", highlight=False)
            return known.exit_code
        what = shown(f"{type(error).__name__}: {error}")
        err.print(f"[bold red]unexpected error:[/] {what}; run again with --debug and report it", highlight=False)
        return 1
    return 0


def _explain(failure: OSError) -> int:
    """A reader that has enough, such as `head`, is no error worth a message, but the status tells."""
    if failure.errno == errno.EPIPE:
        return 128 + signal.SIGPIPE
    err.print(f"[bold red]error:[/] standard output cannot be written ({failure.strerror}); all else was done")
    return 1
