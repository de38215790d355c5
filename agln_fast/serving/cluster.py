"""A Ray of this process' own for a while, or one that it joins: quiet, and within bounds."""

from __future__ import annotations

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from agln_fast import environment
from agln_fast.errors import BackendError, MissingPackageError, printable
from agln_fast.files import scratch_folder

__all__ = ["OWN", "cluster"]

OWN = "local"
"""The address that stands for a Ray of this process' own."""

_LONGEST_FOLDER = 43  # bytes: Ray's sockets lie 64 below, and the names of sockets have 107 at most
_ATTEMPTS = 3  # it gives itself half a minute, which a busy machine may not keep to
_STORE_BYTES = 128 << 20  # for names and answers


@contextmanager
def cluster(address: str = OWN, *, store_bytes: int = _STORE_BYTES) -> Iterator[None]:
    """Ray, for the block; where this process has joined one already, that.

    One of its own listens on the loopback interface alone, writes into a folder for temporary files, has no dashboard,
    and ends with the block.

    Args:
        address: `OWN`, or where a cluster is: "auto" for one on this machine, "HOST:6379".
        store_bytes: memory for objects, of one of its own; what does not fit lies on the disk.

    Raises:
        MissingPackageError: Ray is not installed.
        BackendError: it cannot be started or joined.
    """
    alone = address == OWN
    environment.keep_ray_in_bounds(alone=alone)
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or "ray", "ray") from None
    if ray.is_initialized():
        yield
        return
    with scratch_folder() if alone else nullcontext() as folder:
        options = {"address": address} if folder is None else {"address": OWN, **_bounds(folder, store_bytes)}
        _start(ray, options, address)
        _quiet()
        try:
            yield
        finally:
            ray.shutdown()


def _bounds(folder: Path, store_bytes: int) -> dict[str, Any]:
    length = len(os.fsencode(folder))
    if length > _LONGEST_FOLDER:
        raise BackendError(
            f"{folder}: too long a name for Ray's sockets, {length} bytes of at most {_LONGEST_FOLDER}; set TMPDIR=/tmp"
        )
    return {
        "num_cpus": len(os.sched_getaffinity(0)),
        "object_store_memory": store_bytes,
        "include_dashboard": False,
        "_temp_dir": str(folder),
    }


def _start(ray: Any, options: dict[str, Any], address: str) -> None:
    before = signal.getsignal(signal.SIGTERM)  # Ray puts a handler of its own there
    for attempt in range(_ATTEMPTS):
        try:
            with _mute(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL)
            return
        except BaseException as error:
            ray.shutdown()
            if not isinstance(error, Exception):
                raise
            if "timed out" not in str(error) or attempt == _ATTEMPTS - 1:
                raise BackendError(f"Ray {address}: cannot be reached or started ({printable(error)})") from None
        finally:
            if before is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)


@contextmanager
def _mute() -> Iterator[None]:
    """What Ray's core prints to descriptor 2 while it starts, that it will print nothing, goes nowhere."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _quiet() -> None:
    """Ray Data: no bars and no lines of its own on the terminal; its log file has them."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL + 1)
