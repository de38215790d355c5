"""The library of our layers for TensorRT and TensorRT-RTX: compiled where it is first needed, then kept in the cache.

Its source is `plugin.cpp`. It needs a C++ compiler, TensorRT's headers, and CUDA's, which Triton brings along. What it
gives links against nothing of NVIDIA's, and serves TensorRT 10 and 11 and TensorRT-RTX 1 alike.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from agln_fast import environment
from agln_fast.artefact import LAYERS_FILE
from agln_fast.errors import BuildError
from agln_fast.files import replacing

__all__ = ["compiler", "headers", "library", "obstacle"]

_COMPILERS = "c++", "g++", "clang++"
_FLAGS = "-std=c++17", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-w", "-static-libgcc", "-static-libstdc++"
_SYSTEM = (
    "/usr/include",
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/local/tensorrt/include",
)
_CUDA = "/usr/local/cuda/include", "/usr/include"
_VERSION = re.compile(r"^#define (?:NV_TENSORRT|TRT)_(MAJOR|MINOR)(?:_ENTERPRISE)? (\d+)", re.MULTILINE)
_LONGEST_S = 300


def library() -> Path:
    """The compiled library, which must not be changed; compiled now if it never was.

    Raises:
        BuildError: there is no compiler, or are no headers, or the compiler refuses; the message says what to do.
    """
    from agln_fast.export.nodes import operators  # which loads PyTorch

    source = resources.files("agln_fast.export.plugins").joinpath("plugin.cpp").read_text(encoding="utf-8")
    folders = headers()
    names = ",".join(f'"{name}"' for name in operators())
    command = [compiler(), *_FLAGS, f"-DAGLN_LAYERS={names}", *(f"-I{folder}" for folder in folders)]
    facts = "\n".join([source, *command, str(_tensorrt_version(folders[0]))])
    name = hashlib.sha256(facts.encode()).hexdigest()[:32]
    file = environment.cache_folder() / "layers" / name / LAYERS_FILE
    if not file.is_file() and environment.obstacle_to_writing(file.parent):
        file = _own_folder() / LAYERS_FILE
    if file.is_file():
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file, BuildError) as part:
        _compile([*command, "-xc++", "-", "-o", str(part), "-ldl"], source)
    return file


@cache
def _own_folder() -> Path:
    """For as long as the process lives, where the cache cannot be written."""
    folder = tempfile.mkdtemp(prefix="agln-fast-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _compile(command: list[str], source: str) -> None:
    try:
        done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=_LONGEST_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"our layers cannot be compiled: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError(f"our layers cannot be compiled by {command[0]}: {lines[0] if lines else done.returncode}")


def obstacle() -> str | None:
    """Why our layers cannot be compiled here, and what to do about it, or None."""
    if find_spec("triton") is None:
        return 'our kernels need Triton: pip install "agln-fast[build]" (Linux only)'
    try:
        compiler()
        headers()
    except BuildError as error:
        return str(error)
    return None


def compiler() -> str:
    """The C++ compiler: that of CXX, or the system's.

    Raises:
        BuildError: there is none.
    """
    for name in filter(None, (os.environ.get("CXX"), *_COMPILERS)):
        if found := shutil.which(name):
            return found
    raise BuildError("our layers need a C++ compiler: install g++ or clang++, or set CXX")


def headers() -> tuple[Path, Path]:
    """The folders of TensorRT's headers and of CUDA's.

    TensorRT's: `AGLN_FAST_TENSORRT_INCLUDE`, the system's, or those of the package kernel-lens.

    Raises:
        BuildError: there are none.
    """
    given = environment.tensorrt_headers()
    tensorrt = _with(
        "NvInfer.h", [given] if given else [*map(Path, _SYSTEM), *_of_package("kernel_lens", "include/tensorrt")]
    )
    if tensorrt is None:
        where = f"{given} has no NvInfer.h of 10 or later" if given else "NvInfer.h of 10 or later is not there"
        raise BuildError(
            f"our layers need TensorRT's headers, and {where}: pip install kernel-lens, which carries them, install "
            "libnvinfer-headers-dev, or set AGLN_FAST_TENSORRT_INCLUDE to their folder"
        )
    cuda = _with("cuda_runtime_api.h", [*_of_package("triton", "backends/nvidia/include"), *map(Path, _CUDA)])
    if cuda is None:
        raise BuildError('our layers need CUDA\'s headers, which Triton has: pip install "agln-fast[build]"')
    return tensorrt, cuda


def _with(name: str, folders: list[Path]) -> Path | None:
    return next((folder for folder in folders if (folder / name).is_file() and _is_new(folder)), None)


def _is_new(folder: Path) -> bool:
    """Not headers of a TensorRT that has no layers of this kind; true of all other folders."""
    version = _tensorrt_version(folder) if (folder / "NvInferVersion.h").is_file() else ()
    return not version or version >= (10,)


def _of_package(package: str, inside: str) -> Iterator[Path]:
    """A folder in a package, which is not imported."""
    spec = find_spec(package)
    if spec is not None and spec.origin is not None:
        yield Path(spec.origin).parent / inside


def _tensorrt_version(folder: Path) -> tuple[int, ...]:
    """Of the headers, e.g. (10, 14)."""
    found = dict(_VERSION.findall((folder / "NvInferVersion.h").read_text(encoding="utf-8", errors="replace")))
    return tuple(int(found.get(part, 0)) for part in ("MAJOR", "MINOR"))
