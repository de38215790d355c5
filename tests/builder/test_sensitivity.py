"""Which blocks stay in floating point: by a kind of engine whose losses are written down."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from agln_fast.builder import sensitivity
from agln_fast.builder.sensitivity import choose_floating
from agln_fast.errors import VerificationError
from agln_fast.manifest import Accuracy
from agln_fast.plan.plan import NO_PLAN

EIGHT = Counter(dict.fromkeys("abcdefgh", 1))


class Kind:
    """int8 engines that are nothing but the blocks that they leave in floating point."""

    name = "kind"

    def __init__(self, obstacle=None):
        self.made = []
        self._obstacle = obstacle

    def graph_type(self, precision):
        return "fp32"

    def obstacle(self, precision):
        return self._obstacle

    def make(self, bench, precision, plan, floating):
        self.made.append(frozenset(floating))
        return SimpleNamespace(floating=frozenset(floating), made=True)

    def trial(self, bench, plan, floating):
        return SimpleNamespace(floating=frozenset(floating), made=False)


@pytest.fixture
def discarded():
    return []


@pytest.fixture
def choose(monkeypatch, discarded):
    def call(costs, limit, blocks=EIGHT, kind=None, shown=True):
        """The choice, where each block costs so many points."""
        monkeypatch.setattr(sensitivity, "convolution_blocks", lambda _: dict(enumerate(blocks.elements())))
        monkeypatch.setattr(sensitivity, "obstacle_to", lambda _: None)

        def accuracy(artefact):
            loss = sum(cost for block, cost in costs.items() if block not in artefact.floating)
            return Accuracy("mIoU", "x", "val", 9, 0.5, 0.5 - loss / 100, loss, loss, loss, "kind")

        def few(artefact):
            """A trial costs as much as the engine, unless it is told not to."""
            return accuracy(artefact if artefact.made or shown else SimpleNamespace(floating=set(costs)))

        bench = SimpleNamespace(graph=lambda *_: None, discard=lambda artefact: discarded.append(artefact.floating))
        return choose_floating(kind or Kind(), bench, NO_PLAN, accuracy, few, limit)

    return call


def test_where_all_of_it_is_good_enough_nothing_is_tried(choose):
    kind = Kind()
    found = choose({"a": 0.2, "b": 0.3}, 0.5, kind=kind)
    assert (found.floating, found.loss, found.accuracy.loss) == ((), {}, 0.5)
    assert kind.made.count(frozenset()) == len(kind.made)


def test_each_trial_is_gone_once_it_is_measured(choose, discarded):
    choose({"a": 0.2, "b": 3}, 0.5)
    assert discarded == [{block} for block in "abcdefgh"]


def test_the_one_that_costs_is_left_out_alone(choose):
    found = choose({"c": 9.0, "f": 0.2}, 0.5)
    assert found.floating == ("c",)
    assert found.accuracy.loss == pytest.approx(0.2)
    assert found.loss == pytest.approx({**dict.fromkeys("abdegh", 9.2), "c": 0.2, "f": 9.0})


@pytest.mark.parametrize(
    ("limit", "left_out"),
    [(5.0, "d"), (2.0, "db"), (1.0, "dbh")],
    ids=["one", "two", "three, found between two and all"],
)
def test_as_few_as_it_takes_the_worst_first(choose, limit, left_out):
    assert choose({"d": 8.0, "b": 3.0, "h": 1.0, "a": 0.9}, limit).floating == tuple(left_out)


def test_few_of_many_are_found_by_halving(choose):
    sixteen, kind = Counter(dict.fromkeys("abcdefghijklmnop", 1)), Kind()
    assert choose({"p": 8.0, "b": 4.0, "h": 2.0, "a": 1.0}, 1.0, sixteen, kind).floating == tuple("pbh")
    assert max(map(len, kind.made)) == 4


def test_blocks_are_ranked_by_trials_where_those_show_what_is_lost(choose):
    """They are quicker; where they show nothing, the engines themselves are made."""
    for shown in (True, False):
        kind = Kind()
        assert choose({"c": 9.0}, 0.5, kind=kind, shown=shown).floating == ("c",)
        assert {frozenset(block) for block in EIGHT} <= set(kind.made) or shown
        assert len(set(kind.made)) == (2 if shown else 9)


def test_more_than_half_of_the_convolutions_stay_in_int8(choose):
    with pytest.raises(VerificationError, match=r"loses 6\.00 points of mIoU, and with 3 of 8 blocks .* still 3\.00"):
        choose(dict.fromkeys("abcdef", 1.0), 0.5)


def test_a_block_that_is_most_of_the_network_is_not_left_out(choose):
    blocks = Counter({"a": 6, "b": 2, "c": 2})
    with pytest.raises(VerificationError, match="with 2 of 3 blocks"):
        choose({"a": 5.0}, 0.5, blocks)
    with pytest.raises(VerificationError, match=r"with 0 of 1 blocks"):
        choose({"a": 5.0}, 0.5, Counter({"a": 3}))


def test_a_loss_that_is_just_allowed(choose):
    assert choose({"a": 0.5}, 0.5).floating == ()
    assert choose({"a": 0.5}, 0.49).floating == ("a",)
    assert choose({}, 0.0).floating == ()


def test_what_does_not_run_here_is_measured_by_its_trial(choose):
    kind = Kind("no GPU")
    assert choose({"c": 9.0}, 0.5, kind=kind).floating == ("c",)
    assert not kind.made


def test_where_not_even_that_runs_nothing_is_known(choose, monkeypatch):
    kind = Kind("no GPU")
    graph = SimpleNamespace(graph=lambda *_: None)
    monkeypatch.setattr(sensitivity, "obstacle_to", lambda _: "no OpenVINO")
    found = choose_floating(kind, graph, NO_PLAN, pytest.fail, pytest.fail, 0.5)
    assert (found.floating, found.accuracy) == ((), None)
