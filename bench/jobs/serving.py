"""What servers add to an engine: the same pictures through each of them in turns, and what `agln-fast serve` bears.

python -m agln_fast.bench.jobs.serving BUNDLE --save FILE [--limit-ms MS] [NAME=URL ...]

The segmenter itself and `agln-fast serve`, over gRPC and HTTP, are started here; others run already, and are given by
their URL, with `NAME/MODEL=URL` where the model there is not called as the bundle.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from agln_fast.machine import machine
from agln_fast.runtime.segmenter import load
from agln_fast.serving.load.scenarios import Trial, offline, search, server, single_stream
from agln_fast.serving.load.targets import Asking, Target, open_target

__all__ = ["Addresses", "measure", "running"]

_PACKAGES = "agln-fast", "mlserver", "ray", "tritonclient", "openvino", "onnxruntime"
_WARM, _OVERLOAD, _SOAK = 20, 1.5, 20_000  # requests, times the rate, requests
_IN_FLIGHT = 32


class Addresses:
    """Of a server that runs here: grpc, http; pids: its processes."""

    def __init__(self, text: str, pid: int) -> None:
        found = json.loads(text)
        self.grpc, self.http = f"grpc://{found['grpc']}", found["http"]
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()
        self.pids = [pid, *map(int, children)]


@contextlib.contextmanager
def running(bundle: Path, *options: str) -> Iterator[Addresses]:
    """`agln-fast serve` of a bundle on free ports."""
    ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
    command = [sys.executable, "-m", "agln_fast.cli", "serve", str(bundle), *ports, *options, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        if not (text := process.stdout.readline()):
            raise SystemExit(f"the server has ended with {process.wait()}")
        yield Addresses(text, process.pid)
    finally:
        process.terminate()
        process.wait()


async def measure(contestants: Sequence[tuple[str, Target]], rounds: int, requests: int) -> dict[str, list[Trial]]:
    """SingleStream on each in turns, so that a machine that slows down is as slow for all of them."""
    trials: dict[str, list[Trial]] = {name: [] for name, _ in contestants}
    for _, target in contestants:
        await single_stream(target, _WARM)
    for _ in range(rounds):
        for name, target in contestants:
            trials[name].append(await single_stream(target, requests))
            await asyncio.sleep(0.2)
    return trials


async def _bears(target: Target, limit_ms: float, requests: int) -> dict[str, Any]:
    """The largest rate within the limit; the largest at all; and what happens at one and a half times that."""
    found = [trial async for trial in search(target, limit_ms, requests)]
    most = await offline(target, requests, _IN_FLIGHT)
    over = await server(target, _OVERLOAD * most.rate, 2 * requests, seed=7)
    trials = {"search": [asdict(trial) for trial in found], "most": asdict(most), "overload": asdict(over)}
    return {"limit_ms": limit_ms, **trials}


async def _lasts(target: Target, pids: Sequence[int]) -> dict[str, Any]:
    """Memory of the server's processes after a twentieth of the requests, and after all, MB."""
    await single_stream(target, _SOAK // 20)
    before = sum(map(_memory, pids))
    trial = await single_stream(target, _SOAK - _SOAK // 20)
    return {"requests": _SOAK, "before_mb": before, "after_mb": sum(map(_memory, pids)), "errors": trial.errors}


def _memory(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


async def _all(arguments: argparse.Namespace, addresses: Addresses, name: str) -> dict[str, Any]:
    places = [("segment", str(arguments.bundle), None), ("serve, gRPC", addresses.grpc, name)]
    places.append(("serve, HTTP", addresses.http, name))
    for text in arguments.others:
        match = re.fullmatch(r"([^=/]+)(?:/([^=]+))?=(.+)", text)
        if match is None:
            raise SystemExit(f"{text}: give NAME=URL or NAME/MODEL=URL")
        places.append((match[1], match[3], match[2] or name))
    contestants = []
    for label, place, model in places:
        options: dict[str, Any] = {"threads": arguments.threads, "backend": arguments.backend}
        contestants.append((label, await open_target(place, Asking(model, arguments.kind, ("labels",)), **options)))
    try:
        results: dict[str, Any] = {}
        trials = await measure(contestants, arguments.rounds, arguments.requests)
        results["single_stream"] = {label: [asdict(trial) for trial in listed] for label, listed in trials.items()}
        _print(trials)
        grpc = contestants[1][1]
        if arguments.limit_ms is not None:
            results["bears"] = await _bears(grpc, arguments.limit_ms, 1000)
            bears = results["bears"]
            best, most, over = bears["search"][-1], bears["most"], bears["overload"]
            print(f"{best['offered']:.0f}/s within {arguments.limit_ms:g} ms, {most['rate']:.0f}/s at most; "
                  f"at {over['offered']:.0f}/s it answers {over['rate']:.0f}/s, refuses "
                  f"{sum(over['errors'].values())} of {over['requests']}, 99 of 100 of them within "
                  f"{over['refusal_p99'] or 0:.1f} ms, and forgets {over['lost']}")  # fmt: skip
        if arguments.soak:
            results["lasts"] = lasts = await _lasts(grpc, addresses.pids)
            print(f"{lasts['requests']} requests: {lasts['before_mb']:.0f} MB, then {lasts['after_mb']:.0f} MB")
        return results
    finally:
        for _, target in contestants:
            await target.close()


def _print(trials: dict[str, list[Trial]]) -> None:
    floor = median(trial.percentiles["p50"] for trial in next(iter(trials.values())))
    print("| contestant | p50, ms | over segment, ms | p90, ms |\n| --- | ---: | ---: | ---: |")
    for name, listed in trials.items():
        p50, p90 = (median(trial.percentiles[key] for trial in listed) for key in ("p50", "p90"))
        print(f"| {name} | {p50:.2f} | {p50 - floor:.2f} | {p90:.2f} |")


def main() -> None:
    """Entry point of the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("others", nargs="*", metavar="NAME=URL")
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--input", dest="kind", choices=("pixels", "image"), default="pixels")
    parser.add_argument("--limit-ms", type=float)
    parser.add_argument("--soak", action="store_true", help=f"{_SOAK} requests, and memory")
    arguments = parser.parse_intermixed_args()
    name = arguments.bundle.absolute().name.removesuffix(".agln")
    with load(arguments.bundle, arguments.backend, threads=arguments.threads) as segment:
        engine = {"engine": segment.engine.name, "size": [segment.contract.height, segment.contract.width]}
    with running(arguments.bundle, "--threads", str(arguments.threads), "--backend", arguments.backend) as addresses:
        results = asyncio.run(_all(arguments, addresses, name))
    command = "python -m agln_fast.bench.jobs.serving " + " ".join(sys.argv[1:])
    document = {"command": command, "machine": machine(arguments.threads, _PACKAGES), **engine, **results}
    arguments.save.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
