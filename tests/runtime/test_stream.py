"""`Segmenter.stream`: as a call gives them, in order, with a bound on what is in flight, and no thread left behind."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import pytest
from fake_engine import colours, fake_segmenter
from PIL import Image

from agln_fast.errors import BackendError, ConfigError, ImageError

_LONG = 60  # seconds, for what takes none


def _pixels(seed: int, height: int = 64, width: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def _threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("agln-fast")]


def _until(condition: Callable[[], bool]) -> None:
    ends = time.monotonic() + _LONG
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.001)


class _Source:
    """Pictures without an end; taken: how many were asked for. `error` comes in the place of the picture `at`."""

    def __init__(self, at: int | None = None, error: object = None) -> None:
        self.taken, self._at, self._error = 0, at, error

    def __iter__(self) -> Iterator[object]:
        for number in count():
            self.taken += 1
            if number == self._at:
                if isinstance(self._error, BaseException):
                    raise self._error
                yield self._error
            yield _pixels(number)


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    assert _threads() == []


@pytest.mark.parametrize("resize", ["stretch", "pad", "slide"])
@pytest.mark.parametrize(("smallest", "largest"), [(1, 1), (1, 4), (3, 3)])
def test_results_are_those_of_calls(smallest, largest, resize, tmp_path):
    segment = fake_segmenter(min_batch=smallest, max_batch=largest, resize=resize)
    Image.fromarray(_pixels(9, 20, 30)).save(tmp_path / "x.png")
    images = [_pixels(0), tmp_path / "x.png", Image.fromarray(_pixels(1, 70, 40)), *(_pixels(i) for i in range(2, 9))]
    expected = [segment(image, margin=True) for image in images]
    found = list(segment.stream(iter(images), margin=True))
    assert len(found) == len(images)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.image, other.image)
        assert np.array_equal(one.margin, other.margin)


def test_test_time_augmentation_is_that_of_calls():
    segment = fake_segmenter()
    (found,) = segment.stream([_pixels(0)], tta=True)
    assert np.array_equal(found.labels, segment(_pixels(0), tta=True).labels)


def test_nothing_gives_nothing():
    assert list(fake_segmenter().stream([])) == []


@pytest.mark.parametrize(("in_flight", "largest", "bound"), [(1, 1, 1), (5, 2, 5), (None, 1, 4), (None, 4, 13)])
def test_no_more_is_taken_than_may_be_in_flight(in_flight, largest, bound):
    """An endless source, and a caller that rests until nothing moves any more: then the bound is reached, too."""
    segment, source = fake_segmenter(max_batch=largest), _Source()
    stream = segment.stream(source, in_flight=in_flight)
    for done, result in enumerate(stream):
        assert np.array_equal(result.labels, _pixels(done).argmax(2))
        _until(lambda done=done: source.taken == done + bound)
        time.sleep(0.01)
        assert source.taken == done + bound
        if done == 5:
            break
    stream.close()


def test_the_next_is_taken_while_the_engine_runs():
    inside, go = threading.Event(), threading.Event()

    def held(frame):
        inside.set()
        assert go.wait(_LONG)
        return colours(frame)

    source, results = _Source(), []
    stream = fake_segmenter(held).stream(source)
    first = threading.Thread(target=lambda: results.append(next(stream)))
    first.start()
    assert inside.wait(_LONG)
    _until(lambda: source.taken == 4)
    go.set()
    first.join()
    assert len(results) == 1
    stream.close()


def test_batches_are_filled_with_what_is_ready():
    """The engine rests in its first run until the source has given all."""
    given = threading.Event()

    def images():
        for number in range(9):
            yield _pixels(number)
        given.set()

    def held(frame):
        assert given.wait(_LONG)
        return colours(frame)

    segment = fake_segmenter(held, max_batch=4)
    sizes = segment._backend.batches
    assert len(list(segment.stream(images(), in_flight=10))) == 9
    assert sum(sizes) == 9
    assert sizes[1] == 4


def test_a_source_that_waits_for_results_gets_them():
    """As a camera does: nothing waits for a batch to be full."""
    arrived = threading.Semaphore(1)

    def images():
        for number in range(6):
            assert arrived.acquire(timeout=_LONG)
            yield _pixels(number)

    segment = fake_segmenter(max_batch=4)
    for _ in segment.stream(images()):
        arrived.release()
    assert segment._backend.batches == [1] * 6


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        pytest.param(KeyError("x"), KeyError, id="source"),
        pytest.param(np.zeros((0, 5, 3), np.uint8), ImageError, id="image"),
    ],
)
@pytest.mark.parametrize("resize", ["stretch", "slide"])
def test_what_goes_wrong_is_raised_behind_the_results_before_it(resize, error, raised):
    stream = fake_segmenter(max_batch=2, resize=resize).stream(_Source(5, error))
    for number in range(5):
        assert np.array_equal(next(stream).labels, _pixels(number).argmax(2))
    with pytest.raises(raised) as info:
        next(stream)
    assert raised is not KeyError or info.value is error
    assert list(stream) == []


def test_an_error_of_the_engine_is_raised_in_its_place():
    def third_fails(frame):
        if np.array_equal(frame, _pixels(2)):
            raise BackendError("out of memory")
        return colours(frame)

    stream = fake_segmenter(third_fails).stream(_Source())
    assert np.array_equal(next(stream).labels, _pixels(0).argmax(2))
    assert np.array_equal(next(stream).labels, _pixels(1).argmax(2))
    with pytest.raises(BackendError, match="out of memory"):
        next(stream)


@pytest.mark.parametrize("way", ["close", "forget"])
def test_an_early_end_stops_the_threads(way):
    source = _Source()
    stream = fake_segmenter().stream(source)
    next(stream)
    assert len(_threads()) == 2
    if way == "close":
        stream.close()
    del stream
    gc.collect()
    assert _threads() == []
    taken = source.taken
    time.sleep(0.01)
    assert source.taken == taken


def test_a_stream_that_nobody_asks_starts_nothing():
    source = _Source()
    stream = fake_segmenter().stream(source)
    assert _threads() == []
    stream.close()
    assert source.taken == 0


def test_a_segmenter_that_is_closed_meanwhile_says_so():
    segment = fake_segmenter()
    stream = segment.stream(_Source(), in_flight=1)
    next(stream)
    segment.close()
    with pytest.raises(BackendError, match="this segmenter is closed"):
        list(stream)
    with pytest.raises(BackendError, match="this segmenter is closed"):
        segment.stream([])


def test_what_makes_no_sense_is_told_at_once():
    with pytest.raises(ConfigError, match="in_flight 0: must be at least 1"):
        fake_segmenter().stream([], in_flight=0)
    with pytest.raises(ConfigError, match="bit depth 17"):
        fake_segmenter().stream([], bit_depth=17)
    with pytest.raises(ConfigError, match="build the bundle with --output logits"):
        fake_segmenter(output="labels").stream([], tta=True)
    with pytest.raises(TypeError, match="not iterable"):
        fake_segmenter().stream(5)


def test_two_streams_share_a_segmenter():
    segment = fake_segmenter(max_batch=2)
    both = segment.stream([_pixels(i) for i in range(8)]), segment.stream([_pixels(i) for i in range(8, 16)])
    for number, (one, other) in enumerate(zip(*both, strict=True)):
        assert np.array_equal(one.labels, _pixels(number).argmax(2))
        assert np.array_equal(other.labels, _pixels(8 + number).argmax(2))
