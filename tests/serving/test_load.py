"""The scenarios on a target whose service is known, and `agln-fast load` on a server and on a bundle."""

from __future__ import annotations

import asyncio
import csv
import json

import numpy as np
import pytest

from agln_fast.errors import BackendError, ConfigError
from agln_fast.figures.load import draw_load
from agln_fast.serving.load.scenarios import offline, search, server, single_stream
from agln_fast.serving.load.targets import Answer

SERVICE_S = 0.004


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time passes at once where nothing is to be done: results do not depend on the machine."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0]._when)
        super()._run_once()


def clock() -> Clock:
    return asyncio.get_running_loop()


class Station:
    """One request at a time, each `SERVICE_S` after the one before it; above `most` in flight it refuses."""

    name = "station"

    def __init__(self, most: float = np.inf, *, stall: int | None = None, lose: int | None = None) -> None:
        self.most, self.flying, self.free = most, 0, 0.0
        self.stall, self.lose = stall, lose
        self.asked: list[tuple[int, float]] = []

    async def ask(self, number: int) -> Answer:
        now = clock().time()
        self.asked.append((number, now))
        if number == self.lose:
            return Answer("lost")
        if self.flying >= self.most:
            return Answer("UNAVAILABLE")
        self.flying += 1
        self.free = max(self.free, now) + (0.5 if number == self.stall else SERVICE_S)
        await asyncio.sleep(self.free - now)
        self.flying -= 1
        return Answer(batch=1, stages={"engine_ms": 1e3 * SERVICE_S})

    async def close(self) -> None:
        pass


def run(coroutine):
    with asyncio.Runner(loop_factory=Clock) as runner:
        return runner.run(coroutine)


async def collect(generator):
    return [each async for each in generator]


def test_one_by_one():
    trial = run(single_stream(station := Station(), 100))
    assert [number for number, _ in station.asked] == list(range(100))
    assert (trial.scenario, trial.requests, trial.errors, trial.lost) == ("SingleStream", 100, {}, 0)
    assert trial.percentiles["p50"] == pytest.approx(1e3 * SERVICE_S)
    assert set(trial.percentiles) == {"p50", "p90", "max"}  # nothing is known of the slowest of 1000
    assert trial.rate == pytest.approx(100 / trial.seconds)
    assert trial.batches == {1: 100}
    assert trial.stages == {"engine_ms": pytest.approx(1e3 * SERVICE_S)}
    assert trial.offered is None


def test_as_many_as_go():
    class Wide(Station):
        highest = 0

        async def ask(self, number):
            self.flying += 1
            self.highest = max(self.highest, self.flying)
            await asyncio.sleep(SERVICE_S)
            self.flying -= 1
            return Answer()

    trial = run(offline(station := Wide(), 64, 8))
    assert station.highest == 8
    assert trial.requests == 64
    assert trial.rate == pytest.approx(8 / SERVICE_S)


def test_arrivals_are_drawn_from_the_exponential_distribution():
    trial = run(server(station := Station(), 500, 1000, seed=3))
    times = np.array([when for _, when in station.asked])
    drawn = np.cumsum(np.random.default_rng(3).exponential(1 / 500, 1000))
    assert times[-1] - times[0] == pytest.approx(drawn[-1] - drawn[0], abs=1e-6)
    assert (trial.offered, trial.requests) == (500, 1000)
    assert sorted(number for number, _ in station.asked) == list(range(1000))


def test_a_stall_is_charged_for_all_that_come_meanwhile():
    """A tenth of all arrivals falls into half a second of five: a generator that waits would see one slow request."""
    trial = run(server(Station(stall=100), 100, 500))
    assert trial.percentiles["p90"] > 50
    assert trial.percentiles["max"] >= 500


def test_what_is_refused_is_counted_apart():
    trial = run(server(Station(most=4), 1.5 / SERVICE_S, 1500))
    assert trial.lost == 0
    assert set(trial.errors) == {"UNAVAILABLE"}
    assert 0.15 < trial.errors["UNAVAILABLE"] / 1500 < 0.6
    assert trial.refusal_p99 is not None
    assert trial.refusal_p50 < trial.percentiles["p50"]
    assert trial.requests == 1500
    assert not trial.holds(1e6)


def test_what_is_lost_is_counted_apart():
    trial = run(server(Station(lose=7), 200, 50))
    assert (trial.lost, trial.errors) == (1, {})
    assert not trial.holds(1e6)


def test_a_generator_that_is_late_is_not_valid():
    class Blocking(Station):
        async def ask(self, number):
            clock().now += SERVICE_S  # as a client that keeps its own machine busy
            return Answer()

    assert run(server(Station(), 100, 100)).valid
    assert not run(server(Blocking(), 2 / SERVICE_S, 300)).valid


def test_the_rate_that_is_searched():
    """One server with a fixed time of service, M/D/1: at a load of 0.8 a 99th percentile is some ten services."""
    limit = 10e3 * SERVICE_S
    trials = run(collect(search(Station(), limit, 1000)))
    alone, *rest = trials
    chosen = trials[-1]
    assert alone.scenario == "SingleStream"
    assert all(trial.scenario == "Server" for trial in rest)
    assert chosen.holds(limit)
    assert 0.3 / SERVICE_S < chosen.offered < 1 / SERVICE_S
    failing = [trial.offered for trial in rest if not trial.holds(limit)]
    assert failing
    assert chosen.offered < max(failing)


def test_a_search_that_can_find_nothing():
    with pytest.raises(BackendError, match="one client alone waits longer than 1 ms"):
        run(collect(search(Station(), 1.0, 1000)))
    with pytest.raises(ConfigError, match="a 99th percentile needs 1000"):
        run(collect(search(Station(), 50.0, 100)))


def test_settings_that_make_no_sense():
    with pytest.raises(ConfigError, match="rate 0"):
        run(server(Station(), 0, 10))
    with pytest.raises(ConfigError, match="in flight 0"):
        run(offline(Station(), 10, 0))


@pytest.mark.parametrize("scheme", ["grpc", "http"])
@pytest.mark.parametrize("kind", ["pixels", "image"])
def test_load_on_a_server(server, cli, scheme, kind, tmp_path):
    address = f"grpc://{server.grpc}" if scheme == "grpc" else server.http
    file = tmp_path / "trials.json"
    code, out, _ = cli(
        "load", address, "-n", 20, "--input", kind, "--outputs", "shares,labels", "--json", "--save", file
    )
    [trial] = json.loads(out)
    assert code == 0
    assert (trial["requests"], trial["errors"], trial["lost"], trial["batches"]) == (20, {}, 0, {"1": 20})
    assert set(trial["stages"]) == {"queue_ms", "decode_ms", "engine_ms", "encode_ms"}
    assert sum(trial["stages"].values()) < trial["percentiles"]["max"]
    saved = json.loads(file.read_text())
    assert saved["trials"] == [trial]
    assert saved["machine"]["agln-fast"]


def test_load_at_a_rate_with_a_figure(server, cli, tmp_path):
    figure, table = tmp_path / "load.png", tmp_path / "load.csv"
    code, out, _ = cli(
        "load",
        f"grpc://{server.grpc}",
        "--scenario",
        "server",
        "--rate",
        50,
        "-n",
        30,
        "--figure",
        figure,
        "--save",
        table,
    )
    assert code == 0
    assert "50.0" in out
    assert figure.read_bytes().startswith(b"\x89PNG")
    [row] = csv.DictReader(table.open())
    assert (float(row["offered"]), int(row["requests"]), row["p99"]) == (50, 30, "")


def test_load_on_a_bundle(bundle, cli):
    code, out, _ = cli("load", bundle.path, "-n", 10, "--backend", "onnxruntime", "--threads", 1, "--json")
    [trial] = json.loads(out)
    assert (code, trial["requests"], trial["errors"]) == (0, 10, {})
    assert trial["stages"]["engine_ms"] > 0


def test_a_server_tells_what_it_thinks_of_a_request(server, cli):
    code, out, _ = cli("load", f"grpc://{server.grpc}", "-n", 5, "--outputs", "masks", "--json")
    assert (code, json.loads(out)[0]["errors"]) == (0, {"INVALID_ARGUMENT": 5})
    code, out, _ = cli("load", server.http, "-n", 5, "--timeout-ms", 0.001, "--json")
    assert (code, json.loads(out)[0]["errors"]) == (0, {"504": 5})


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["grpc://127.0.0.1:9"], 6, "no server of the protocol answers"),
        (["http://127.0.0.1:9"], 6, "no server of the protocol answers"),
        (["ftp://127.0.0.1"], 2, "give grpc://HOST:PORT"),
        (["no.agln"], 5, "no.agln"),
        (["no.agln", "--scenario", "stress"], 2, "unknown scenario 'stress'"),
        (["no.agln", "--input", "picture"], 2, "unknown input 'picture'"),
        (["no.agln", "--rate", "5"], 2, "--rate belongs to --scenario server"),
        (["no.agln", "--scenario", "server"], 2, "--rate belongs to --scenario server"),
        (["no.agln", "--scenario", "search"], 2, "--limit-ms belongs to --scenario search"),
        (["no.agln", "--figure", "x.png"], 2, "--figure shows latency against rate"),
        (["no.agln", "--save", "x.txt"], 2, "give a file .json or .csv"),
    ],
)
def test_what_cannot_be(cli, arguments, code, message):
    found, _, err = cli("load", *arguments)
    assert (found, err.count("\n")) == (code, 1)
    assert message in err


def test_an_unknown_model(server, cli):
    code, _, err = cli("load", f"grpc://{server.grpc}", "--model", "other")
    assert code == 6
    assert "other" in err


def test_a_figure_of_nothing():
    with pytest.raises(ConfigError, match="one at least"):
        draw_load([], title="x")
