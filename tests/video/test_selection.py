"""Which frames are wanted, by index and by time."""

from __future__ import annotations

from fractions import Fraction

import pytest

from agln_fast.errors import ConfigError
from agln_fast.video.selection import Selection, parse_frames, parse_rate

THIRTY = [Fraction(index, 30) for index in range(60)]


def chosen(selection: Selection, times: list[Fraction] = THIRTY) -> list[int]:
    wanted, found = selection.chooser(), []
    for index, time in enumerate(times):
        take = wanted(index, time)
        if take is None:
            break
        if take:
            found.append(index)
    return found


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        pytest.param(Selection(), range(60), id="all"),
        pytest.param(Selection(10, 20), range(10, 20), id="frames"),
        pytest.param(Selection(10, 20, 3), range(10, 20, 3), id="every"),
        pytest.param(Selection(5, None, 10), range(5, 60, 10), id="every-from"),
        pytest.param(Selection(fps=Fraction(15)), range(0, 60, 2), id="half"),
        pytest.param(Selection(fps=Fraction(60)), range(60), id="nothing-is-repeated"),
        pytest.param(Selection(3, fps=Fraction(10)), range(3, 60, 3), id="third-from"),
        pytest.param(Selection(seconds=0.5), range(15), id="seconds"),
        pytest.param(Selection(30, seconds=0.5), range(30, 45), id="seconds-from"),
        pytest.param(Selection(100), [], id="beyond"),
    ],
)
def test_what_is_chosen(selection, expected):
    assert chosen(selection) == list(expected)
    if chosen(selection):
        assert selection.count(60, Fraction(30)) == len(expected)


def test_a_rate_that_does_not_divide_is_met_in_the_mean():
    times = [Fraction(index, 30) for index in range(600)]
    assert len(chosen(Selection(fps=Fraction(20)), times)) == 400
    assert len(chosen(Selection(fps=Fraction(7)), times)) == 140


def test_rounded_times_keep_every_second_frame():
    """Matroska has milliseconds: 133 ms for 4/30 s."""
    times = [Fraction(round(1000 * index / 30), 1000) for index in range(600)]
    assert chosen(Selection(fps=Fraction(15)), times) == list(range(0, 600, 2))


def test_a_count_that_nobody_knows():
    assert Selection().count(None, Fraction(25)) is None
    assert Selection(stop=7).count(None, None) == 7
    assert Selection(seconds=2).count(None, Fraction(25)) == 50


def test_frames_are_written_as_a_slice():
    assert [parse_frames(text) for text in (":", "3:", ":5", "3:5")] == [(0, None), (3, None), (0, 5), (3, 5)]


@pytest.mark.parametrize("text", ["", "5", "a:b", "-1:5", "1:2:3", "5:5", "6:5", "1.5:3"])
def test_frames_that_make_no_sense(text):
    with pytest.raises(ConfigError, match="frames"):
        parse_frames(text)


def test_rates():
    assert [parse_rate(text) for text in ("25", "29.97", "30000/1001")] == [
        25,
        Fraction(2997, 100),
        Fraction(30000, 1001),
    ]


@pytest.mark.parametrize("text", ["", "0", "-5", "1/0", "fast", "nan", "1e9"])
def test_rates_that_make_no_sense(text):
    with pytest.raises(ConfigError, match=r"frames a second from 0\.001 to 1000"):
        parse_rate(text)


@pytest.mark.parametrize("values", [{"every": 0}, {"seconds": 0}, {"seconds": float("nan")}, {"seconds": -1}])
def test_selections_that_make_no_sense(values):
    with pytest.raises(ConfigError):
        Selection(**values)
