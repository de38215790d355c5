"""How much memory a contestant takes.

    python -m agln_fast.bench.race.memory RECIPE [--import-only]

is the process whose memory counts: it opens a pickled recipe, runs it three times and prints its largest resident set
in bytes; with --import-only it stops before anything is loaded.
"""

from __future__ import annotations

import pickle
import resource
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from agln_fast.bench.race.workshop import Recipe
from agln_fast.errors import BackendError
from agln_fast.telemetry import import_quietly

__all__ = ["device_memory", "main", "peak_memory"]

_RUNS = 3
_TIMEOUT_S = 600
_imported: dict[str, int] = {}  # bytes of a process that has imported a library, and nothing else


def device_memory(recipe: Recipe, shape: tuple[int, ...]) -> float:
    """MB of device memory that one run takes, weights included, by what the driver reports as in use."""
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    opened = recipe.open()
    opened.run(np.zeros(shape, np.uint8))
    after = torch.cuda.mem_get_info()[0]
    opened.close()
    return (before - after) / 1e6


def peak_memory(recipe: Recipe, shape: tuple[int, ...], folder: Path) -> float:
    """MB of host memory that opening and running `recipe` takes, beyond that of its imported library.

    Args:
        shape: of the image, (B, H, W, 3).
        folder: for the pickle that the child reads.

    Raises:
        BackendError: the child failed.
    """
    file = folder / "recipe.pickle"
    file.write_bytes(pickle.dumps((recipe, shape)))
    if recipe.library not in _imported:
        _imported[recipe.library] = _child(file, "--import-only")
    return (_child(file) - _imported[recipe.library]) / 1e6


def _child(file: Path, *arguments: str) -> int:
    command = [sys.executable, "-m", "agln_fast.bench.race.memory", str(file), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = str(error.stderr or error).strip().splitlines()[-1]
        raise BackendError(f"the process that measures memory failed: {said}; run it by hand to see more") from None
    return int(done.stdout.split()[-1])


def _largest_resident_set() -> int:
    """Bytes, of this process since it began.

    `getrusage` counts what the parent had when it forked, which is more than all that runs here: Linux tells apart.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(arguments: Sequence[str] | None = None) -> int:
    """The child whose memory counts; returns the exit status."""
    file, *flags = sys.argv[1:] if arguments is None else arguments
    recipe, shape = pickle.loads(Path(file).read_bytes())
    import_quietly(recipe.library)
    if not flags:
        opened = recipe.open()
        for _ in range(_RUNS):
            opened.run(np.zeros(shape, np.uint8))
    print(_largest_resident_set())
    return 0


if __name__ == "__main__":
    sys.exit(main())
