"""How long a function takes on its device: CUDA events around the replay of a graph, with a cold L2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

__all__ = ["Times", "device_times"]

_Result = TypeVar("_Result")

_WARM_UP = 3
_L2_SIZES = 4  # what is read before each repeat, so that no input is still in the cache


@dataclass(frozen=True)
class Times:
    """Microseconds of each repeat, and how they were taken.

    how: "graph", a CUDA graph's replay between CUDA events, the L2 flushed before; "calls", plain calls in its place,
        because no graph could be captured: the gaps between launches count; "host", by the clock of a CPU.
    """

    microseconds: tuple[float, ...]
    how: Literal["graph", "calls", "host"]

    @property
    def median(self) -> float:
        return statistics.median(self.microseconds)


def device_times(function: Callable[[], Any], device: torch.device, *, repeats: int = 100) -> Times:
    """Warm `function` up and time it `repeats` times on `device`, where it does all its work."""
    for _ in range(_WARM_UP):
        function()
    if device.type != "cuda":
        return Times(tuple(_host_microseconds(function) for _ in range(repeats)), "host")
    how: Literal["graph", "calls"] = "graph"
    run = function
    torch.cuda.synchronize(device)
    try:
        run = _capture(function)
    except RuntimeError:
        # An error of the device itself, rather than of the capture, comes again here.
        torch.cuda.synchronize(device)
        how = "calls"
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    scratch = torch.zeros(_L2_SIZES * l2_bytes // 4, device=device)
    pairs = []
    for _ in range(repeats):
        # It is read, because writing would leave the cache full of lines that `run` had to write back. Meanwhile the
        # CPU prepares the launch, which therefore does not count.
        scratch.amax()
        pairs.append(_between_events(run))
    torch.cuda.synchronize(device)
    return Times(tuple(1e3 * start.elapsed_time(end) for start, end in pairs), how)


def _capture(function: Callable[[], _Result]) -> Callable[[], _Result]:
    """`function` as a CUDA graph: each call replays it and returns the same tensors, with new values.

    `function` must have run before: whatever it compiles or chooses at its first call is no part of a graph.

    Raises:
        RuntimeError: it does what no graph can hold, such as waiting for the device.
    """
    graph = torch.cuda.CUDAGraph()
    # The outer context: a capture that fails leaves its own stream the current one.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = function()

    def replay() -> _Result:
        graph.replay()
        return result

    return replay


def _between_events(function: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    function()
    end.record()
    return start, end


def _host_microseconds(function: Callable[[], Any]) -> float:
    before = time.perf_counter()
    function()
    return 1e6 * (time.perf_counter() - before)
