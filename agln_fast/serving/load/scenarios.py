"""Requests one by one, at a rate, or as many as go: the scenarios of MLPerf Inference, and the search of a rate.

A request of the Server scenario has the time that its arrival was drawn for, and its latency counts from there: a
server that stalls is charged for all that would have come meanwhile (no "coordinated omission").
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import numpy.typing as npt

from agln_fast.errors import BackendError, ConfigError
from agln_fast.serving.load.targets import Answer, Target

__all__ = ["Trial", "offline", "search", "server", "single_stream"]

_PRECISE = 0.05  # of the rate that is searched
_MOST_TRIALS = 30
_LATE = 0.2  # of the 99th percentile, which may be the generator's own lateness


@dataclass(frozen=True)
class Trial:
    """What came of a run; times are milliseconds, rates requests a second.

    offered: the rate of the Server scenario. rate: of those that were answered well. percentiles: of their latency, by
    name; a percentile is there where ten requests or more lie above it. errors: by status. refusal_p50, refusal_p99:
    how long these had to wait. lost: no answer came. late_p99: how late the generator itself was. batches: requests by
    the images in the engine's run. stages: medians of what the server says.
    """

    scenario: str
    target: str
    requests: int
    seconds: float
    rate: float
    mean: float | None
    percentiles: dict[str, float]
    offered: float | None = None
    errors: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    refusal_p50: float | None = None
    refusal_p99: float | None = None
    late_p99: float | None = None
    batches: dict[int, int] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def valid(self) -> bool:
        """Whether the generator kept up: most of the latency is the server's."""
        slowest = self.percentiles.get("p99", self.percentiles.get("max"))
        return self.late_p99 is None or slowest is None or self.late_p99 <= _LATE * slowest

    def holds(self, limit_ms: float) -> bool:
        """Whether all were answered well, 99 of 100 within `limit_ms`."""
        return not self.errors and not self.lost and self.percentiles.get("p99", np.inf) <= limit_ms


@dataclass(frozen=True)
class _Sample:
    answer: Answer
    latency: float
    late: float = 0.0


async def single_stream(target: Target, requests: int) -> Trial:
    """Each request when the one before it was answered."""
    began = _now()
    samples = [await _ask(target, number) for number in range(requests)]
    return _trial("SingleStream", target, samples, _now() - began)


async def offline(target: Target, requests: int, in_flight: int) -> Trial:
    """As fast as they are answered, `in_flight` at once."""
    if in_flight < 1:
        raise ConfigError(f"in flight {in_flight}: must be at least 1")
    began, samples, numbers = _now(), list[_Sample](), iter(range(requests))

    async def go_on() -> None:
        for number in numbers:
            samples.append(await _ask(target, number))

    await asyncio.gather(*(go_on() for _ in range(in_flight)))
    return _trial("Offline", target, samples, _now() - began)


async def server(target: Target, rate: float, requests: int, seed: int = 0) -> Trial:
    """Poisson arrivals, `rate` a second: nobody waits for answers before sending."""
    if not rate > 0:
        raise ConfigError(f"rate {rate:g}: must be above 0, requests a second")
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, requests))
    began, samples, flying = _now(), list[_Sample](), set[asyncio.Task[None]]()

    async def one(number: int, due: float) -> None:
        late = _now() - due
        answer = await target.ask(number)
        samples.append(_Sample(answer, _now() - due, late))

    for number, arrival in enumerate(arrivals):
        due = began + float(arrival)
        if (wait := due - _now()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one(number, due))
        flying.add(task)
        task.add_done_callback(flying.discard)
    await asyncio.gather(*flying)
    return _trial("Server", target, samples, _now() - began, rate)


async def search(target: Target, limit_ms: float, requests: int) -> AsyncIterator[Trial]:
    """The largest rate of the Server scenario at which 99 of 100 requests are answered within `limit_ms`, and all well.

    Doubled from half of what one client gets, then halved between a rate that holds and one that does not, until they
    are 5 % apart. The rate is confirmed by other arrivals, or lowered by 5 % until it is. The last trial is that one.

    Raises:
        ConfigError: fewer requests than a 99th percentile needs.
        BackendError: no rate holds.
    """
    if requests < 1000:
        raise ConfigError(f"{requests} requests a trial: a 99th percentile needs 1000, of which ten lie above it")
    alone = await single_stream(target, min(requests, 200))
    yield alone
    if alone.errors or alone.percentiles["p50"] > limit_ms:
        raise BackendError(f"{target.name}: one client alone waits longer than {limit_ms:g} ms, or gets errors")
    rate, seeds = 0.5 * alone.rate, count(1)
    holds, fails = 0.0, np.inf
    while not np.isfinite(fails) or fails - holds > _PRECISE * holds:
        yield (trial := await server(target, rate, requests, next(seeds)))
        if trial.holds(limit_ms):
            holds = rate
        else:
            fails = rate
        rate = 2 * holds if not np.isfinite(fails) else (holds + fails) / 2
        if fails < 0.01 * alone.rate:
            raise BackendError(f"{target.name}: no rate holds {limit_ms:g} ms: 99 of 100 requests are slower at any")
    rate = holds
    while next(seeds) < _MOST_TRIALS:
        yield (trial := await server(target, rate, requests, next(seeds) + 1000))
        if trial.holds(limit_ms):
            return
        rate *= 1 - _PRECISE
    raise BackendError(f"{target.name}: no rate was confirmed: this machine does other work, too")


def _now() -> float:
    return asyncio.get_running_loop().time()


async def _ask(target: Target, number: int) -> _Sample:
    began = _now()
    answer = await target.ask(number)
    return _Sample(answer, _now() - began)


def _trial(
    scenario: str, target: Target, samples: list[_Sample], seconds: float, offered: float | None = None
) -> Trial:
    good = [sample for sample in samples if sample.answer.status == "ok"]
    bad = [sample for sample in samples if sample.answer.status not in ("ok", "lost")]
    latencies, refusals = _milliseconds(good), _milliseconds(bad)
    stages: dict[str, list[float]] = {}
    for sample in good:
        for name, value in sample.answer.stages.items():
            stages.setdefault(name, []).append(value)
    late = np.array([1e3 * sample.late for sample in samples])
    return Trial(
        scenario,
        target.name,
        len(samples),
        seconds,
        len(good) / seconds,
        float(latencies.mean()) if good else None,
        _percentiles(latencies),
        offered,
        dict(sorted(Counter(sample.answer.status for sample in bad).items())),
        len(samples) - len(good) - len(bad),
        float(np.percentile(refusals, 50)) if bad else None,
        float(np.percentile(refusals, 99)) if bad else None,
        float(np.percentile(late, 99)) if offered else None,
        dict(sorted(Counter(sample.answer.batch for sample in good if sample.answer.batch is not None).items())),
        {name: float(np.median(values)) for name, values in stages.items()},
    )


def _milliseconds(samples: list[_Sample]) -> npt.NDArray[np.float64]:
    return np.array([1e3 * sample.latency for sample in samples])


def _percentiles(latencies: npt.NDArray[np.float64]) -> dict[str, float]:
    found = {}
    for name, percent in (("p50", 50.0), ("p90", 90.0), ("p99", 99.0), ("p99.9", 99.9)):
        if round(len(latencies) * (100 - percent)) >= 1000 or (percent == 50 and len(latencies)):
            found[name] = float(np.percentile(latencies, percent))
    if len(latencies):
        found["max"] = float(latencies.max())
    return found
