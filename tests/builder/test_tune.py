"""Plans are chosen by timing or by the cost model, remembered, and give the labels of the reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import agln_fast
from agln_fast.builder import tune as module
from agln_fast.builder.tune import Candidate, Tuning, tune, tune_engine
from agln_fast.builder.workshop import Workshop
from agln_fast.contract import IOContract
from agln_fast.engines import KINDS, open_engine
from agln_fast.errors import ConfigError
from agln_fast.plan import winograd as winograd_module
from agln_fast.plan.cost import CostModel
from agln_fast.plan.plan import ALGEBRA, NO_PLAN, Plan
from agln_fast.plan.rates import Rates
from agln_fast.runtime.images import pack
from agln_fast.runtime.references import sample_frames

EVERYTHING = replace(
    ALGEBRA,
    distribute_before_upsample=True,
    energy_before_upsample=True,
    pixel_major_attention=True,
    mix_before_upsample=("full", "rows", "full"),
    winograd=4,
    low_resolution_labels=True,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGLN_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("AGLN_FAST_TUNE_SECONDS")
    return tmp_path / "cache" / "tuning"


@pytest.fixture
def workshop(small_network, tmp_path: Path) -> Workshop:
    return Workshop(small_network(), IOContract(64, 96), tmp_path)


class _Clock(module._Race):
    """A race in which plans take the milliseconds that `times` gives them, and 10 otherwise."""

    times: dict[str, float] = {}  # noqa: RUF012

    def prepare(self, plans):
        pass

    def fastest(self, plans):
        for plan in plans:
            cost = 10.0 + sum(cost for name, cost in self.times.items() if name in str(plan))
            self.candidates[plan] = Candidate(plan, cost)
        return min(plans, key=lambda plan: self.candidates[plan].milliseconds)


def test_what_is_faster_stays(workshop, cache, monkeypatch):
    monkeypatch.setattr(module, "_Race", _Clock)
    times = {"pool": -1.0, "pixel_major": -1.0, "low_resolution": 2.0, "full, none": -1.0, "(full, rows": -3.0}
    monkeypatch.setattr(_Clock, "times", times)
    tuning = tune_engine(workshop, KINDS["onnxruntime"], "fp32", budget_s=60)
    expected = replace(ALGEBRA, pixel_major_attention=True, mix_before_upsample=("full", "rows", "none"))
    assert tuning.plan == expected
    assert (tuning.chosen_by, tuning.complete) == ("timing", True)
    assert {NO_PLAN, expected} < {candidate.plan for candidate in tuning.candidates}


def test_no_plan_may_be_the_fastest(workshop, cache, monkeypatch):
    monkeypatch.setattr(module, "_Race", _Clock)
    monkeypatch.setattr(_Clock, "times", dict.fromkeys(("fold", "low", "pixel", "before", "mix"), 1.0))
    assert tune_engine(workshop, KINDS["onnxruntime"], "fp32", budget_s=60).plan == NO_PLAN


@pytest.mark.slow
def test_engines_are_really_timed(workshop, cache):
    tuning = tune_engine(workshop, KINDS["onnxruntime"], "fp32", budget_s=20, threads=1)
    assert tuning.chosen_by == "timing"
    best = {candidate.plan: candidate.milliseconds for candidate in tuning.candidates}
    assert all(0 < milliseconds < 20e3 for milliseconds in best.values())
    assert len(best) > 2


def test_a_race_is_won_by_a_clear_lead_only(workshop, monkeypatch):
    race = module._Race(workshop, KINDS["onnxruntime"], "fp32", 60.0, 1)
    ticks = iter(np.cumsum(np.tile([0.0, 1.0, 0.0, 0.995, 0.0, 0.9], 50)))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(race, "_open", lambda plan: _Idle())
    plans = [NO_PLAN, ALGEBRA, EVERYTHING]
    assert race.fastest(plans) == EVERYTHING
    ticks = iter(np.cumsum(np.tile([0.0, 1.0, 0.0, 0.995], 50)))
    assert race.fastest(plans[:2]) == NO_PLAN
    assert race.candidates[EVERYTHING].milliseconds == pytest.approx(900)


@pytest.mark.parametrize(("seconds", "winner"), [(0.95, NO_PLAN), (0.85, ALGEBRA)], ids=["a little", "by far"])
def test_one_round_shows_large_leads_only(seconds, winner, workshop, monkeypatch):
    """When the time is over after it."""
    race = module._Race(workshop, KINDS["onnxruntime"], "fp32", 0.0, 1)
    ticks = iter(np.cumsum([0.0, 1.0, 0.0, seconds]))
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(race, "_open", lambda plan: _Idle())
    assert race.fastest([NO_PLAN, ALGEBRA]) == winner
    assert race.exhausted


@pytest.mark.parametrize(
    ("times", "clear"),
    [
        ([[1.0, 1.1], [1.0, 1.2]], True),
        ([[1.0, 1.1], [1.0, 0.9]], False),
        ([[1.0, 0.9], [1.0, 0.8]], True),
        ([[1.0, 0.9, 0.8], [1.0, 0.9, 0.8]], False),
        ([[1.0, 0.9, 1.2], [1.0, 0.9, 1.2]], True),
        ([[1.0, 1.01], [1.0, 1.01]], False),
        ([[1.0, 1.1]], False),
        ([[1.0, 1.2]], True),
        ([[1.0, 1.05]] * 2, False),
        ([[1.0, 1.05]] * 3, True),
        ([[1.0]], True),
    ],
    ids=[
        "slower",
        "now slower, now faster",
        "faster",
        "two are faster",
        "one is faster",
        "alike",
        "one round, a little",
        "one round, by far",
        "two rounds, less than by far",
        "three rounds",
        "nobody else",
    ],
)
def test_when_a_race_may_end(times, clear):
    assert module._is_clear(times) == clear


def test_only_fp32_engines_on_cpus_take_winograd(tmp_path):
    """Its sums cost labels in bf16, and TensorRT has its own."""
    workshop = Workshop(agln_fast.create_model("fpn_resnet18", 5), IOContract(64, 64), tmp_path)
    found = [
        [change["winograd"] for decide in decisions for change in decide(ALGEBRA) if "winograd" in change]
        for decisions in (module._decisions(workshop, KINDS[backend], kind, timed=False) for backend, kind in _KINDS)
    ]
    assert found == [[1, 2, 3], [1, 2, 3], [], []]


@pytest.mark.parametrize(
    ("backend", "precision", "winograd", "low"),
    [
        ("openvino", "fp32", 4, True),
        ("openvino", "bf16", 0, True),
        ("openvino", "int8", 0, True),
        ("tensorrt-rtx", "fp32", 0, False),
    ],
)
def test_what_suits_an_engine(backend, precision, winograd, low):
    expected = replace(EVERYTHING, winograd=winograd, low_resolution_labels=low)
    assert KINDS[backend].suits(EVERYTHING, precision) == expected


_KINDS = ("openvino", "fp32"), ("onnxruntime", "fp32"), ("openvino", "bf16"), ("tensorrt", "fp32")


class _Idle:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def run(self, image):
        return image


def test_without_a_budget_the_few_best_of_the_model_are_raced(workshop, cache, monkeypatch):
    raced: list[list[Plan]] = []
    monkeypatch.setattr(module, "_Race", _noting(raced))
    monkeypatch.setattr(_Clock, "times", {})
    tuning = tune_engine(workshop, KINDS["onnxruntime"], "fp32")
    assert raced == [module._shortlist(workshop, KINDS["onnxruntime"], "fp32", None)]
    assert raced[0][0] == module._predict(workshop, KINDS["onnxruntime"], "fp32", None).plan
    assert (tuning.chosen_by, tuning.complete) == ("timing", False)
    assert {candidate.plan for candidate in tuning.candidates} == set(raced[0])


MIXED = replace(ALGEBRA, mix_before_upsample=("full", "full", "none"))
LIKE_MIXED = replace(MIXED, distribute_before_upsample=True)
PREDICTIONS = {
    "one with Winograd, one without": (
        "fp32",
        {replace(MIXED, winograd=2): 0.1, replace(MIXED, winograd=1): 0.11, MIXED: 0.2, NO_PLAN: 0.4},
        [replace(MIXED, winograd=2), MIXED],
    ),
    "other groups, where Winograd changes nothing": (
        "fp32",
        {MIXED: 0.1, replace(MIXED, winograd=1): 0.1, replace(MIXED, drop_dead_branches=False): 0.11, ALGEBRA: 0.2},
        [MIXED, ALGEBRA],
    ),
    "other groups, in bf16": (
        "bf16",
        {replace(ALGEBRA, mix_before_upsample=("full", "full", "rows")): 0.1, MIXED: 0.11, NO_PLAN: 0.3},
        [replace(ALGEBRA, mix_before_upsample=("full", "full", "rows")), MIXED],
    ),
    "the safe start, where all are of one kind": (
        "bf16",
        {NO_PLAN: 0.1, replace(NO_PLAN, drop_dead_branches=True): 0.2},
        [NO_PLAN, replace(ALGEBRA, pixel_major_attention=True)],
    ),
}


@pytest.mark.parametrize("case", PREDICTIONS)
def test_two_plans_of_different_kinds_are_raced(case, workshop, monkeypatch):
    precision, seconds, expected = PREDICTIONS[case]
    candidates = tuple(Candidate(plan, 1e3 * cost) for plan, cost in seconds.items())
    tuning = Tuning("openvino", precision, candidates[0].plan, "cost model", True, candidates)
    monkeypatch.setattr(module, "_predict", lambda *_: tuning)
    monkeypatch.setattr(type(workshop), "plans", lambda self, kind: [])
    assert module._shortlist(workshop, KINDS["openvino"], precision, None) == expected


EXPORTED = {
    "the best itself": ("fp32", 100, MIXED, [MIXED, ALGEBRA]),
    "of another kind": ("fp32", 100, replace(MIXED, winograd=1), [MIXED, replace(MIXED, winograd=1)]),
    "of the same kind": ("fp32", 100, LIKE_MIXED, [MIXED, ALGEBRA, LIKE_MIXED]),
    "no time": ("fp32", 900, LIKE_MIXED, [MIXED, ALGEBRA]),
    "does not suit": ("bf16", 100, replace(MIXED, winograd=1), [MIXED, ALGEBRA]),
}


@pytest.mark.parametrize("case", EXPORTED)
def test_what_is_exported_already_costs_no_more_than_its_runs(case, workshop, monkeypatch):
    precision, milliseconds, exported, expected = EXPORTED[case]
    candidates = Candidate(MIXED, milliseconds), Candidate(ALGEBRA, 2 * milliseconds)
    tuning = Tuning("openvino", precision, MIXED, "cost model", True, candidates)
    monkeypatch.setattr(module, "_predict", lambda *_: tuning)
    monkeypatch.setattr(type(workshop), "plans", lambda self, kind: [exported])
    assert module._shortlist(workshop, KINDS["openvino"], precision, None) == expected


def _noting(raced):
    class Noting(_Clock):
        def fastest(self, plans):
            raced.append(list(plans))
            return super().fastest(plans)

    return Noting


def test_more_time_goes_on_from_what_is_remembered(workshop, cache, monkeypatch):
    """What lost before is not run again."""
    raced: list[list[Plan]] = []
    monkeypatch.setattr(module, "_Race", _noting(raced))
    monkeypatch.setattr(_Clock, "times", {"(full, rows": -3.0})
    first = tune_engine(workshop, KINDS["onnxruntime"], "fp32")
    before = {candidate.plan for candidate in first.candidates}
    raced.clear()
    second = tune_engine(workshop, KINDS["onnxruntime"], "fp32", budget_s=60)
    assert second.complete
    assert second.plan.mix_before_upsample[:2] == ("full", "rows")
    assert raced[0][0] == first.plan
    assert not before & {plan for plans in raced for plan in plans[1:]}
    raced.clear()
    assert tune_engine(workshop, KINDS["onnxruntime"], "fp32", budget_s=60) == second
    assert not raced


def test_what_was_found_when_the_time_ended_is_remembered(workshop, cache, monkeypatch):
    class Short(_Clock):
        def fastest(self, plans):
            self.exhausted = len(self.candidates) > 4
            return super().fastest(plans)

    monkeypatch.setattr(module, "_Race", Short)
    monkeypatch.setattr(_Clock, "times", {"mix": -1.0})
    tuning = tune_engine(workshop, KINDS["onnxruntime"], "fp32", budget_s=60)
    assert not tuning.complete
    assert tune_engine(workshop, KINDS["onnxruntime"], "fp32") == tuning


def test_the_budget_ends_the_search(small_network, tmp_path, cache):
    """After one race."""
    workshop = Workshop(small_network("fpn_resnet18"), IOContract(64, 64), tmp_path)
    tuning = tune_engine(workshop, KINDS["onnxruntime"], "fp32", budget_s=1e-3, threads=1)
    assert not tuning.complete
    assert 2 <= len(tuning.candidates) <= 3


def test_what_was_measured_is_remembered(workshop, cache, monkeypatch, small_network):
    monkeypatch.setattr(module, "_Race", _Clock)
    monkeypatch.setattr(_Clock, "times", {"pixel_major": -1.0})
    first = tune_engine(workshop, KINDS["onnxruntime"], "fp32", budget_s=60)
    monkeypatch.setattr(module, "_Race", None)
    for budget_s in (60, 0, None):  # with 0 nothing is timed, but what is known is used
        assert tune_engine(workshop, KINDS["onnxruntime"], "fp32", budget_s=budget_s) == first
    assert Tuning.from_dict(json.loads(json.dumps(first.to_dict()))) == first
    monkeypatch.undo()
    keys = {
        module._memory(Workshop(network, contract, Path()), KINDS[backend], "fp32", threads)
        for network in (workshop.network, _without_gamma(small_network()))
        for contract in (workshop.contract, IOContract(64, 64))
        for backend in ("onnxruntime", "openvino")
        for threads in (1, 2)
    }
    assert len(keys) == 16


def _without_gamma(network):
    with torch.no_grad():
        for chain in network.decoder.cfb:
            for block in chain:
                block.gamma.zero_()
    return network


def _damaged(change):
    def damage(text: str) -> str:
        values = json.loads(text)
        change(values)
        return json.dumps(values)

    return damage


DAMAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[:-20],
    "a list": lambda text: "[]",
    "deep": lambda text: 100_000 * "[",
    "long": lambda text: text + 2**20 * " ",
    "not text": lambda text: "\ud800",
    "other names": _damaged(lambda v: v.update(plan={})),
    "one more name": _damaged(lambda v: v.update(more=1)),
    "unknown judge": _damaged(lambda v: v.update(chosen_by="timinf")),
    "not measured": _damaged(lambda v: v.update(chosen_by="cost model")),
    "another engine": _damaged(lambda v: v.update(backend="openvino")),
    "another precision": _damaged(lambda v: v.update(precision="bf16")),
    "complete is text": _damaged(lambda v: v.update(complete="no")),
    "no candidates": _damaged(lambda v: v.update(candidates=[])),
    "a million candidates": _damaged(lambda v: v.update(candidates=1001 * v["candidates"][:1])),
    "a candidate is a number": _damaged(lambda v: v["candidates"].append(3)),
    "NaN": _damaged(lambda v: v["candidates"][0].update(milliseconds=float("nan"))),
    "text for a number": _damaged(lambda v: v["candidates"][0].update(milliseconds="3")),
    "negative": _damaged(lambda v: v["candidates"][0].update(milliseconds=-3.0)),
    "nested forms": _damaged(lambda v: v["plan"].update(mix_before_upsample=[["full"], [1], {}])),
    "a plan that nobody raced": _damaged(lambda v: v["plan"].update(winograd=3)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_memory_is_ignored(damage, workshop, cache, monkeypatch):
    monkeypatch.setattr(module, "_Race", _Clock)
    monkeypatch.setattr(_Clock, "times", {})
    monkeypatch.setattr(module, "_shortlist", lambda *_: [ALGEBRA, MIXED])
    tuning = tune_engine(workshop, KINDS["onnxruntime"], "fp32")
    (file,) = cache.iterdir()
    file.write_text(DAMAGE[damage](file.read_text()), errors="surrogatepass")
    assert module._remembered(file, KINDS["onnxruntime"], "fp32") is None
    assert tune_engine(workshop, KINDS["onnxruntime"], "fp32") == tuning
    assert module._remembered(file, KINDS["onnxruntime"], "fp32") == tuning


def test_a_memory_that_cannot_be_written_is_no_error(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_Race", _Clock)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGLN_FAST_CACHE", str(tmp_path / "file"))
    assert tune_engine(workshop, KINDS["onnxruntime"], "fp32", budget_s=60).chosen_by == "timing"


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_what_cannot_run_goes_by_the_cost_model(backend, small_network):
    tuning = tune(small_network(), backend, (128, 128), "fp16", budget_s=60)
    assert tuning.chosen_by == "cost model"
    assert not tuning.plan.low_resolution_labels
    times = {candidate.plan: candidate.milliseconds for candidate in tuning.candidates}
    assert times[tuning.plan] <= min(times.values()) * 1.01**8
    assert times[tuning.plan] < times[NO_PLAN]


def test_the_cost_model_counts_by_hand(small_network):
    """Arithmetic alone: what mixing saves, in multiply-adds; traffic alone: bytes of what is read and written."""
    plain, mixed = (
        Plan(fold_batchnorm=True, mix_before_upsample=forms)
        for forms in (("none", "none", "none"), ("full", "none", "none"))
    )

    def seconds(plan, rates, batch=1, element_size=4, full_size=False):
        model = CostModel(small_network("fpn_resnet18"), (128, 128), batch)
        plan = replace(plan, low_resolution_labels=not full_size)
        return model.seconds(plan, rates, element_size=element_size)

    arithmetic, traffic = Rates(1.0, 1.0, 1e30), Rates(1e30, 1e30, 1.0)
    direct = 9 * 32 * 16 * 32**2
    convolved, products = 9 * 32 * 16 * 4**2, 32 * 12**2 * 32 + 32 * 12 * 32**2
    saved = 2 * (direct - convolved - products)
    assert seconds(plain, arithmetic) - seconds(mixed, arithmetic) == pytest.approx(saved)
    quick_products, saved = Rates(1.0, 2.0, 1e30), 2 * (direct - convolved - products / 2)
    assert seconds(plain, quick_products) - seconds(mixed, quick_products) == pytest.approx(saved)
    assert seconds(plain, traffic, element_size=2) == seconds(plain, traffic) / 2
    assert seconds(plain, arithmetic, batch=3) == pytest.approx(3 * seconds(plain, arithmetic))
    assert seconds(plain, traffic, full_size=True) - seconds(plain, traffic) == 4 * 5 * (32**2 + 128**2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gpu",), "unknown target 'gpu'"),
        (("cpu", (8, 8)), "each side must be"),
        (("onnxruntime", (64, 64), "fp8"), "precision 'fp8'"),
    ],
)
def test_bad_arguments(arguments, message, small_network):
    with pytest.raises(ConfigError, match=message):
        tune(small_network(), *arguments, budget_s=0)


def test_no_engine_for_a_precision(small_network, monkeypatch):
    for kind in KINDS.values():
        monkeypatch.setattr(kind, "obstacle", lambda *_: "the reason")
    with pytest.raises(ConfigError, match="no CPU engine runs in bf16 here: the reason"):
        tune(small_network(), "cpu", (64, 64), "bf16")


@pytest.mark.openvino
@pytest.mark.parametrize("quicker", ["openvino", "onnxruntime"])
def test_cpu_is_the_faster_of_two(quicker, small_network, cache, monkeypatch):
    class Biased(_Clock):
        def fastest(self, plans):
            self.times = {"": 0.0 if self.kind.name == quicker else 5.0}
            return super().fastest(plans)

    monkeypatch.setattr(module, "_Race", Biased)
    assert tune(small_network("fpn_resnet18"), "cpu", (64, 64), budget_s=60).backend == quicker


CPU_BACKENDS = ("onnxruntime", "openvino")


@pytest.mark.openvino
@pytest.mark.parametrize("layout", ["uint8_nhwc", pytest.param("float_nchw", marks=pytest.mark.slow)])
def test_planned_engines_give_the_labels_of_plain_ones(layout, tmp_path):
    """What a graph leaves at low resolution is made up for: shape, dtype, and 99.99 % of the labels."""
    outputs = {backend: [] for backend in CPU_BACKENDS}
    for plan in (Plan(fold_batchnorm=True), EVERYTHING):
        path = tmp_path / str(plan is EVERYTHING)
        built = agln_fast.build(
            "agln_nano", path, size=(77, 101), precision="fp32", plan=plan, layout=layout, batch=(1, 2)
        )
        batch = pack(sample_frames(None, built.manifest.contract)[:2], built.manifest.contract)
        for backend in CPU_BACKENDS:
            engine = built.engine(f"{backend}-fp32")
            assert (engine.plan, engine.plan_chosen_by) == (plan, "user")
            with open_engine(built.artefact(engine.name), threads=1) as opened:
                outputs[backend].append(opened.run(batch))
    for plain, planned in outputs.values():
        assert planned.shape == plain.shape == (2, 77, 101)
        assert planned.dtype == plain.dtype == np.uint8
        assert len(np.unique(plain)) > 2
        assert (planned == plain).mean() >= 0.9999


@pytest.mark.openvino
def test_engines_with_winograd_give_the_labels_of_plain_ones(small_network, tmp_path, monkeypatch):
    """128 channels in the decoder, in several strips, the last one shorter, tiles beyond the edge."""
    monkeypatch.setattr(winograd_module, "_STRIP", 24)
    workshop = Workshop(small_network("fpn_resnet18", channels=128), IOContract(104, 120), tmp_path)
    image = pack(sample_frames(None, workshop.contract)[:1], workshop.contract)
    for backend in CPU_BACKENDS:
        race = module._Race(workshop, KINDS[backend], "fp32", 60.0, 1)
        labels = []
        for plan in (NO_PLAN, replace(ALGEBRA, winograd=3)):
            with race._open(plan) as engine:
                labels.append(engine.run(image))
        assert len(np.unique(labels[0])) > 1
        assert (labels[0] == labels[1]).mean() >= 0.9999


def test_logits_stay_at_full_size(small_network, tmp_path):
    plan = Plan(fold_batchnorm=True, low_resolution_labels=True)
    network = small_network("fpn_resnet18")
    built = agln_fast.build(network, tmp_path / "m", size=(64, 96), precision="fp32", plan=plan, output="logits")
    assert {"onnxruntime-fp32", "torch-fp32"} < {engine.name for engine in built.manifest.engines}
    for engine in built.manifest.engines:
        assert engine.verification.max_logit_error < 1e-2


def test_each_plan_has_a_graph_of_its_own(small_network, tmp_path, monkeypatch):
    """The files of the race are those of the bundle: each is exported once."""
    from agln_fast.builder import workshop as workshop_module

    plans = {"onnxruntime": ALGEBRA, "openvino": EVERYTHING}

    def choose(workshop, kind, precision, **_):
        workshop.graph(precision, NO_PLAN)  # one that lost
        kind.make(workshop, precision, plans[kind.name])
        return Tuning(kind.name, precision, plans[kind.name], "timing", True, ())

    exports = []
    export = workshop_module.export_onnx
    monkeypatch.setattr(workshop_module, "export_onnx", lambda *given: exports.append(given[-1]) or export(*given))
    monkeypatch.setattr(module, "tune_engine", choose)
    built = agln_fast.build(small_network("fpn_resnet18"), tmp_path / "m", size=(64, 96), precision="fp32")
    files = {engine.backend: engine.file for engine in built.manifest.engines}
    assert files["openvino"] == "model.onnx"
    assert files["onnxruntime"] == "model.onnxruntime-fp32.onnx"
    assert files["torch"] == files["fused"] == "weights.safetensors"
    assert {engine.plan_chosen_by for engine in built.manifest.engines} == {"timing", "fixed"}
    assert set(built.manifest.files) == {*files.values(), "reference.npz", "report.md"}
    assert len(exports) == len(set(exports)) == 3
    assert "agln_fast.model" in {p.key for p in onnx.load(built.path / "model.onnx").metadata_props}


@pytest.mark.parametrize("plan", ["fast", 3])
def test_a_build_needs_a_plan(plan, small_network, tmp_path):
    with pytest.raises(ConfigError, match=r"give 'auto', 'none', or an agln_fast\.Plan"):
        agln_fast.build(small_network(), tmp_path / "m", plan=plan)
