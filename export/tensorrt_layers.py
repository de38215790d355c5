"""Engines with our kernels: ONNX nodes of our ops -> layers of the plugin library -> an engine, in a child process.

TensorRT-RTX's parser opens its own library by a name that only a search path set before the process starts can give,
and ends the process where it is not found. So the parser works in a child, which keeps any crash of it away from the
user's process; and Triton may be told there that it is not to interpret.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from agln_fast import interruption
from agln_fast.errors import AglnError, BuildError, ConfigError
from agln_fast.export.plugins import library
from agln_fast.export.tensorrt import TensorRTBuild, build_tensorrt_engine, resolve_capabilities
from agln_fast.kernels.devices import DEVICES
from agln_fast.precision import Precision
from agln_fast.tensorrt_library import Flavour, import_library, load_layers

__all__ = ["build_engine_with_layers"]

_ERRORS = {kind.__name__: kind for kind in (BuildError, ConfigError)}
_UNVERSIONED = {"tensorrt-rtx": "libtensorrt_rtx.so", "tensorrt": "libnvinfer.so"}


def build_engine_with_layers(
    onnx_path: Path,
    engine_path: Path,
    *,
    flavour: Flavour,
    precision: Precision,
    batch: tuple[int, int],
    compute_capabilities: Sequence[str] = (),
    workspace_bytes: int | None = None,
    timing_cache: Path | None = None,
) -> TensorRTBuild:
    """As `build_tensorrt_engine`, of a graph with nodes of domain `agln`.

    Args:
        batch: the smallest and the largest; kernels are made for each size.

    Raises:
        ConfigError, MissingPackageError: as there.
        BuildError: as there, or the layers cannot be compiled, or the library's parser ended its process.
    """
    capabilities = resolve_capabilities(flavour, compute_capabilities)
    if older := [name for name in capabilities if int(name[2:]) < min(int(known[2:]) for known in DEVICES)]:
        raise ConfigError(f"our kernels need {next(iter(DEVICES))} or newer, not {', '.join(older)}")
    request = {
        "onnx_path": str(onnx_path),
        "engine_path": str(engine_path),
        "library": str(library()),
        "flavour": flavour,
        "precision": precision,
        "batch": batch,
        "compute_capabilities": capabilities,
        "workspace_bytes": workspace_bytes,
        "timing_cache": timing_cache and str(timing_cache),
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        answer = _ask_child({**request, "folder": folder}, _environment(flavour, Path(folder)))
    if "error" in answer:
        raise _ERRORS.get(answer["error"], BuildError)(answer["message"])
    fields = answer["build"]
    lists = {name: tuple(fields[name]) for name in ("compute_capabilities", "warnings")}
    return TensorRTBuild(**{**fields, **lists, "engine_path": engine_path})


def _environment(flavour: Flavour, folder: Path) -> dict[str, str]:
    """Of the child: the library under its unversioned name, in `folder`, and Triton that compiles."""
    spec = find_spec(f"{flavour.replace('-', '_')}_libs")
    unversioned = _UNVERSIONED[flavour]
    for place in spec.submodule_search_locations or () if spec is not None else ():
        for file in sorted(Path(place).glob(f"{unversioned}.*"))[:1]:
            (folder / unversioned).symlink_to(file)
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    rest = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**rest, "LD_LIBRARY_PATH": os.pathsep.join(paths)}


def _ask_child(request: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "agln_fast.export.tensorrt_layers"]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    with child, interruption.deferred(child.terminate):
        output, errors = child.communicate(json.dumps(request))
    interruption.check()
    try:
        found: dict[str, Any] = json.loads(output.splitlines()[-1])
    except (IndexError, ValueError):
        last = next((line for line in reversed(errors.splitlines()) if line.strip()), "it said nothing")
        code = child.returncode
        how = signal.Signals(-code).name if code < 0 else f"status {code}"
        raise BuildError(f"{request['flavour']} ended its process ({how}): {last}") from None
    return found


def _build(request: dict[str, Any]) -> TensorRTBuild:
    import onnx_ir

    from agln_fast.export.layers import make_layers

    smallest, largest = request.pop("batch")
    capabilities = request["compute_capabilities"]
    known = [name for name in capabilities if name in DEVICES]
    flavour: Flavour = request["flavour"]
    plugins = Path(request.pop("library")).read_bytes()
    onnx_path, engine_path = Path(request.pop("onnx_path")), Path(request.pop("engine_path"))
    cache = request.pop("timing_cache")
    layered = Path(request.pop("folder")) / onnx_path.name
    model = onnx_ir.load(onnx_path)
    make_layers(model, range(smallest, largest + 1), known)
    onnx_ir.save(model, layered)
    load_layers(import_library(flavour), plugins)
    return build_tensorrt_engine(
        layered,
        engine_path,
        batch=None if smallest == largest else (smallest, largest, largest),
        timing_cache=cache and Path(cache),
        **request,
    )


def main() -> None:
    """The child: a request on standard input, and what came of it on the last line of standard output."""
    request = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        built = _build(request)
        answer = {"build": {**asdict(built), "engine_path": str(built.engine_path)}}
    except AglnError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
