"""PyTorch in a process that was forked from one that had loaded it: one thread, because its pool stayed behind.

A fork copies the memory of the pool, and none of its threads: the first operation that has work for them would wait
for ever. This module is imported with the package, which costs nothing, so that it sees later forks. Of an earlier
one it asks the kernel.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from agln_fast.errors import BackendError

__all__ = ["use_threads"]

_FORKED_WITHOUT_EXEC = 0x40  # PF_FORKNOEXEC, of the flags in /proc/PID/stat
_FLAGS = 6  # their place behind the name of the command


def use_threads(threads: int | None = None) -> None:
    """Have PyTorch compute with so many threads, in the whole process; None for as many as it does now.

    In a process that was forked from one that had loaded PyTorch it is one thread. It warns where that is fewer than
    before. Whoever loads PyTorch's weights or computes with it calls this first, in the thread that does: PyTorch
    counts for each.

    Raises:
        BackendError: more than one there.
    """
    if not _forked:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        return
    import torch

    way_out = "load in a process started with spawn or forkserver (docs/concurrency.md)"
    if threads not in (None, 1):
        raise BackendError(
            f"threads {threads}: after a fork PyTorch computes with one thread; take threads=1, or {way_out}"
        )
    if torch.get_num_threads() > 1:
        if threads is None:
            message = f"PyTorch computes with one thread in this forked process; for more, {way_out}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        torch.set_num_threads(1)


def _came_with_a_fork() -> bool:
    """Whether PyTorch, if it is loaded now, may have been loaded by the process that this one was forked from.

    Only the parent can tell, as long as it is there. In doubt it was.
    """
    if "torch" not in sys.modules:
        return False
    try:
        flags = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[_FLAGS])
    except OSError:  # no Linux: the pools of other systems outlive a fork
        return False
    if not flags & _FORKED_WITHOUT_EXEC:
        return False
    try:
        ours, parents = (Path(f"/proc/{process}/maps").read_text() for process in ("self", os.getppid()))
    except OSError:
        return True
    # A program is laid out anew when it is started: only a fork has the same layout.
    is_parent = _kernels_page(ours) == _kernels_page(parents)
    return not is_parent or "libtorch" in parents


def _kernels_page(maps: str) -> list[str]:
    return [line for line in maps.splitlines() if line.endswith("[vdso]")]


def _after_fork() -> None:
    global _forked
    _forked = _forked or "torch" in sys.modules


_forked = _came_with_a_fork()
if hasattr(os, "register_at_fork"):  # there is no fork on Windows
    os.register_at_fork(after_in_child=_after_fork)
