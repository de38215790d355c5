"""Where the time of the fused engine goes on a GPU, kernel by kernel, as PyTorch's profiler sees its replays.

    python -m agln_fast.bench.kernels.profile [--network NAME] [--runs 20] [--save profile.json]

The network has random weights and 59 classes; on a GPU it takes 512x512 pixels in fp16, as in `launches`, which counts
without one. Without a GPU it is the operators on the CPU, in fp32 at 64x64: that shows that it works, and nothing else.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from agln_fast.bench.race.weights import random_network
from agln_fast.contract import IOContract
from agln_fast.engines.fused_network import FusedEngine
from agln_fast.errors import ConfigError
from agln_fast.files import replacing
from agln_fast.machine import machine
from agln_fast.plan.convolution import FusedConv2d
from agln_fast.precision import Precision

__all__ = ["Share", "profiled", "to_text", "ways"]

_NAMES = 90  # characters of a kernel's name; Triton's and cuDNN's differ in the first ones
_ROWS = 40


@dataclass
class Share:
    """A kernel (on the CPU an operator), how often a run launches it, and its microseconds of a run."""

    kernel: str
    launches: float
    microseconds: float


def profiled(engine: FusedEngine, runs: int) -> list[Share]:
    """The kernels of a run, the one that takes longest first; means of `runs` runs, behind one that prepares."""
    contract = engine._network.contract
    image = np.zeros((contract.max_batch, contract.height, contract.width, 3), np.uint8)
    on_gpu = engine._device.type == "cuda"
    engine.run(image)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for _ in range(runs):
            engine.run(image)
    rows = [event for event in found.key_averages() if event.device_type.name == ("CUDA" if on_gpu else "CPU")]
    times = [row.self_device_time_total if on_gpu else row.self_cpu_time_total for row in rows]
    shares = [Share(row.key, row.count / runs, time / runs) for row, time in zip(rows, times, strict=True)]
    return sorted(shares, key=lambda share: -share.microseconds)


def ways(engine: FusedEngine) -> dict[str, int]:
    """How many convolutions run in which of `WAYS`; on the CPU there is nothing to choose."""
    layers = (layer for layer in engine._network.modules() if isinstance(layer, FusedConv2d))
    return dict(Counter(layer.way for layer in layers))


def to_text(shares: Sequence[Share]) -> str:
    """A line for each kernel, its name cut, and the sum."""
    lines = [f"{'µs':>9} {'launches':>9}  kernel"]
    lines += [f"{row.microseconds:9.1f} {row.launches:9.1f}  {row.kernel[:_NAMES]}" for row in shares[:_ROWS]]
    if rest := shares[_ROWS:]:
        lines.append(f"{_time(rest):9.1f} {_launches(rest):9.1f}  {len(rest)} more")
    return "\n".join([*lines, f"{_time(shares):9.1f} {_launches(shares):9.1f}  all of them"])


def _time(shares: Sequence[Share]) -> float:
    return sum(share.microseconds for share in shares)


def _launches(shares: Sequence[Share]) -> float:
    return sum(share.launches for share in shares)


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile, print, and perhaps write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", default="agln_release_resnet50")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--save", type=Path, help="JSON file of all rows")
    options = parser.parse_args(arguments)
    if options.runs < 1:
        parser.error("--runs: at least 1")
    on_gpu = torch.cuda.is_available()
    size = 512 if on_gpu else 64
    precision: Precision = "fp16" if on_gpu else "fp32"
    network, contract = random_network(options.network, 59), IOContract(size, size)
    with FusedEngine(network, contract, precision=precision, device="cuda" if on_gpu else "cpu") as engine:
        shares, chosen = profiled(engine, options.runs), ways(engine)
    print(to_text(shares))
    print("convolutions:", ", ".join(f"{count} {way}" for way, count in chosen.items()))
    if options.save:
        facts = {"machine": machine(), "network": options.network, "size": size, "precision": precision, "ways": chosen}
        with replacing(options.save, ConfigError) as part:
            part.write_text(json.dumps({**facts, "rows": [asdict(row) for row in shares]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
