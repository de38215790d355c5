"""Ratios are those of the rounds, the budget is kept and nothing is lost silently, and the child's memory is real."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from agln_fast.bench.race import measure as module
from agln_fast.bench.race import memory
from agln_fast.bench.race.contestants import PYTORCH, Contestant
from agln_fast.bench.race.measure import FEWEST_ROUNDS, Case, Entry, Options, measure
from agln_fast.data.dataset import SomeSamples
from agln_fast.data.scenes import SCENE_SIZE, Scenes
from agln_fast.errors import BackendError, ConfigError
from agln_fast.metrics import SegmentationMetrics
from agln_fast.plan.plan import NO_PLAN, Plan
from agln_fast.runtime.networks import load_network

CASE = Case("agln_nano", (64, 64), 1, 12)
TIMES_ALONE = Options(threads=1, warmup=0, frames=0, memory=False, accuracy=False)
LOW = Plan(low_resolution_labels=True)
MEGABYTES = 200


@dataclass(frozen=True)
class Fake:
    """Sleeps, and gives the labels 0; takes `MEGABYTES` where it is asked to."""

    sleeps: tuple[float, ...]
    rewrites: Plan = NO_PLAN
    fails: bool = False
    heavy: bool = False
    settings: str = "fake"
    library: str = "json"
    files: list[Path] = field(default_factory=list)

    def open(self):
        if self.fails:
            raise BackendError("cannot be opened\nat all")
        return OpenedFake(self)


class OpenedFake:
    def __init__(self, recipe):
        self.recipe, self.calls = recipe, 0

    def run(self, image):
        # The first call is the one that opening makes.
        time.sleep(self.recipe.sleeps[max(0, self.calls - 1) % len(self.recipe.sleeps)])
        self.calls += 1
        if self.recipe.heavy:
            np.ones(MEGABYTES * 10**6, np.uint8).sum()
        return np.zeros(image.shape[:3], np.uint8)

    def engine(self, image):
        return time.sleep(0.001)

    def close(self):
        self.calls = -1


@pytest.fixture
def clock(monkeypatch):
    """One that stands still but for those who sleep: `clock()` is the time, seconds."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "sleep", sleep)
    for name in ("perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, lambda: now[0])
    return lambda: now[0]


@pytest.fixture
def fakes(clock, monkeypatch):
    monkeypatch.setattr(module, "_rate", lambda device, precision, threads: 1e12)

    def put(name, sleeps, *, ours=False, **kwargs):
        recipe = Fake(tuple(sleeps), **kwargs)
        entry = Contestant(name, ours, ("fp32", "bf16"), ("cpu",), "", lambda workshop, precision, plan: (recipe, 2.0))
        monkeypatch.setitem(PYTORCH, name, entry)

    return put


def test_the_best_peer_is_found_in_each_precision_class(fakes):
    fakes("slow", [0.02])
    fakes("fast", [0.01])
    fakes("ours", [0.005], ours=True)
    entries = [Entry("slow", "fp32"), Entry("fast", "fp32"), Entry("ours", "fp32"), Entry("slow", "bf16")]
    rows = measure([CASE], [*entries, Entry("ours", "bf16")], TIMES_ALONE).rows
    ratios = [row.ratio for row in rows]
    assert ratios == pytest.approx([0.5, 1, 2, 1, 4])
    assert [row.ours for row in rows] == [False, False, True, False, True]
    assert all(row.ratio_low <= row.ratio <= row.ratio_high for row in rows)
    (alone,) = measure([CASE], [Entry("ours", "fp32")], TIMES_ALONE).rows
    assert alone.ratio is alone.ratio_low is None


def test_columns(fakes):
    fakes("peer", [0.01, 0.01, 0.03, 0.01, 0.01])
    fakes("ours", [0.02], ours=True, rewrites=LOW)
    peer, ours = measure([replace(CASE, batch=2)], [Entry("peer", "fp32"), Entry("ours", "fp32")], TIMES_ALONE).rows
    assert peer.median_ms == pytest.approx(10)
    # Linear between the two largest of five: 0.8 and 0.96 of the way from 10 to 30 ms.
    assert (peer.p95_ms, peer.p99_ms) == pytest.approx((26, 29.2))
    assert peer.ratio == 1
    assert ours.ratio == pytest.approx(0.5)
    # The 90th percentile, 0.6 of the way from 0.5 to the 1.5 of the round in which the peer was slow.
    assert ours.ratio_high == pytest.approx(1.1)
    assert peer.images_per_second == pytest.approx(200)
    assert peer.engine_ms == peer.median_ms
    assert ours.engine_ms == pytest.approx(1)
    assert (peer.plan, ours.plan) == ("", "low_resolution_labels")
    assert peer.build_s == pytest.approx(2 + 0.01)
    # Two operations for each multiply-add, two images in 10 ms, of 1e12 operations a second.
    assert peer.peak_fraction == pytest.approx(2 * peer.gmacs * 1e9 * 2 / 0.01 / 1e12)
    assert (peer.network, peer.size, peer.batch, peer.num_classes) == ("agln_nano", "64x64", 2, 12)


def test_warm_up_does_not_count(fakes):
    fakes("cold", [0.1, 0.1, *[0.001] * 20])
    (row,) = measure([CASE], [Entry("cold", "fp32")], replace(TIMES_ALONE, warmup=2, iters=4)).rows
    assert row.p99_ms == pytest.approx(1)


def test_the_budget_lowers_rounds_and_tells(fakes, clock):
    fakes("slow", [0.1])
    options = replace(TIMES_ALONE, iters=100, budget_s=1.2)
    found = measure([CASE, replace(CASE, network="fpn_nano")], [Entry("slow", "fp32")], options)
    assert clock() <= 1.2
    assert len(found.rows) == 2
    rounds = [line for line in found.left_out if "rounds" in line]
    assert len(rounds) == 2
    assert all(int(line.split(": ")[1].split()[0]) <= 100 - FEWEST_ROUNDS for line in rounds)


def test_without_any_time_three_rounds_are_left_and_memory_and_accuracy_are_not(fakes):
    fakes("slow", [0.01])
    found = measure([replace(CASE, size=SCENE_SIZE)], [Entry("slow", "fp32")], Options(threads=1, iters=9, budget_s=0))
    assert len(found.rows) == 1
    told = "\n".join(found.left_out)
    assert "6 of 9 rounds" in told
    assert "memory of slow fp32" in told
    assert "mIoU of slow fp32" in told
    assert found.rows[0].peak_memory_mb is found.rows[0].miou is None


def test_what_cannot_run_is_left_out_and_the_others_go_on(fakes):
    fakes("broken", [0], fails=True)
    fakes("fine", [0.001])
    found = measure([CASE], [Entry("broken", "fp32"), Entry("fine", "fp32"), Entry("fine", "fp16")], TIMES_ALONE)
    assert [row.contestant for row in found.rows] == ["fine"]
    assert found.left_out == (
        "fine fp16: fine has no fp16: it runs in fp32, bf16",
        "agln_nano 64x64 batch 1, 12 classes: broken fp32: cannot be opened",
    )
    with pytest.raises(BackendError, match=r"nothing could be measured: .*cannot be opened"):
        measure([CASE], [Entry("broken", "fp32")], TIMES_ALONE)
    with pytest.raises(BackendError, match="no contestant can run here: fine fp16"):
        measure([CASE], [Entry("fine", "fp16")], TIMES_ALONE)


@pytest.mark.parametrize("counts", [{"warmup": -1}, {"iters": 0}])
def test_senseless_counts(counts):
    with pytest.raises(ConfigError, match="need at least 0 and 1"):
        measure([CASE], [Entry("torch", "fp32")], Options(**counts))


def test_a_whole_row(monkeypatch):
    """The accuracy is that of the trained network itself, counted here by itself."""
    scenes = Scenes("test")
    samples = [scenes[index] for index in range(12)]
    monkeypatch.setattr(module, "_scenes", lambda: SomeSamples(Scenes("test", length=12), 12))
    segment, metrics = load_network("agln_nano", size=SCENE_SIZE, resize="stretch", threads=1), SegmentationMetrics(12)
    for sample in samples:
        metrics.update(segment(sample.image).labels, sample.labels)
    shown = []

    class Show:
        def add_task(self, name, total):
            assert total == 1
            return 0

        def update(self, task, advance, description):
            shown.append(description)

    entry = Entry("onnxruntime", "fp32", title="rung")
    case = replace(CASE, size=SCENE_SIZE)
    (row,) = measure([case], [entry], Options(threads=1, iters=3, frames=1), Show()).rows
    assert shown == ["agln_nano 128x128 batch 1, 12 classes: rung fp32"]
    assert row.contestant == "rung"
    assert row.agreement >= 0.999
    assert row.miou == pytest.approx(100 * metrics.mean_iou, abs=0.01)
    assert 5 < row.peak_memory_mb < 300
    assert row.size_mb == pytest.approx(4 * row.parameters_m, rel=0.2)
    operations = 2 * row.gmacs * 1e9 / (row.median_ms / 1e3)
    assert row.peak_fraction == pytest.approx(operations / module._rate("cpu", "fp32", 1))


@pytest.mark.parametrize(
    "case", [replace(CASE, size=(64, 64)), replace(CASE, size=SCENE_SIZE, num_classes=5), replace(CASE, batch=2)]
)
def test_accuracy_is_of_a_trained_network_at_the_size_of_its_pictures(case, fakes):
    fakes("fine", [0.01])
    (row,) = measure([case], [Entry("fine", "fp32")], replace(TIMES_ALONE, accuracy=True)).rows
    assert row.miou is None


def test_accuracy_on_data_of_the_user_is_at_the_size_of_their_masks(fakes):
    """The fake gives class 0, sky, everywhere: its IoU is its share of the pixels, that of all others 0."""
    fakes("fine", [0.01])
    data = SomeSamples(Scenes("val", size=(32, 48), length=2), 2)
    options = replace(TIMES_ALONE, accuracy=True, data=data)
    (row,) = measure([CASE], [Entry("fine", "fp32")], options).rows
    truth = np.concatenate([sample.labels.ravel() for sample in data])
    assert row.miou == pytest.approx(100 * (truth == 0).mean() / len(np.unique(np.append(truth, 0))))
    found = measure([replace(CASE, network="fpn_resnet18")], [Entry("fine", "fp32")], options)
    assert found.rows[0].miou is None
    assert "mIoU of fine fp32 on scenes: weights are random" in found.left_out[0]


def test_int8_has_no_ceiling():
    assert module._rate("cpu", "int8", 1) is None


@pytest.mark.slow
def test_memory_is_that_of_the_child_not_of_this_process(tmp_path, monkeypatch):
    """The largest resident set of a child must not be that of its parent, which is far larger."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setattr(Fake, "__module__", "test_measure")
    monkeypatch.setitem(__import__("sys").modules, "test_measure", __import__("sys").modules[__name__])
    ballast = np.ones(600 * 10**6, np.uint8)
    heavy, light = (memory.peak_memory(Fake((0,), heavy=heavy), (1, 64, 64, 3), tmp_path) for heavy in (True, False))
    assert ballast.sum() == 600 * 10**6
    assert heavy == pytest.approx(MEGABYTES, rel=0.1)
    assert abs(light) < 20
    with pytest.raises(BackendError, match="failed: at all"):
        memory.peak_memory(Fake((0,), fails=True), (1, 64, 64, 3), tmp_path)


def test_the_child_in_this_process(tmp_path, capsys, monkeypatch):
    import pickle

    file = tmp_path / "recipe.pickle"
    monkeypatch.setattr(pickle, "loads", lambda data: (Fake((0,)), (1, 8, 8, 3)))
    file.write_bytes(b"")
    for flags in ([], ["--import-only"]):
        assert memory.main([str(file), *flags]) == 0
        assert int(capsys.readouterr().out) > 10**7


def test_without_proc_the_resource_module_tells(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda self: (_ for _ in ()).throw(OSError()))
    assert memory._largest_resident_set() > 10**7
