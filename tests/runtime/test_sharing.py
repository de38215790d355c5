"""Threads that share a segmenter, and one that closes it meanwhile."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from fake_engine import colours, fake_segmenter
from PIL import Image

import agln_fast
from agln_fast.engines import open_engine
from agln_fast.errors import BackendError

_LONG = 60  # seconds, for what takes none

ENGINES = pytest.mark.parametrize(
    "name",
    ["onnxruntime-fp32", pytest.param("openvino-fp32", marks=pytest.mark.openvino), "torch-fp32", "fused-fp32"],
)


def _pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 96, 3), np.uint8)


class _Held:
    """A function of the frame that waits inside the engine until it is let go."""

    def __init__(self) -> None:
        self.inside, self.go = threading.Event(), threading.Event()

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        self.inside.set()
        assert self.go.wait(_LONG)
        return colours(frame)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.mark.parametrize("resize", ["stretch", "slide"])
def test_close_waits_for_the_run_that_goes_on_and_ends_those_behind_it(resize, pool):
    held = _Held()
    segment = fake_segmenter(held, resize=resize)
    running = pool.submit(segment, _pixels())
    assert held.inside.wait(_LONG)
    closing = pool.submit(segment.close)
    assert not segment._backend.closed
    held.go.set()
    closing.result(_LONG)
    assert segment._backend.closed
    assert np.array_equal(running.result(_LONG).labels, _pixels().argmax(2))
    with pytest.raises(BackendError, match="this segmenter is closed; load the bundle again"):
        segment(_pixels())


def test_closed_while_its_image_is_read(tmp_path, pool):
    """A pipe that nobody writes to blocks its own thread: neither the others nor `close`."""
    os.mkfifo(tmp_path / "pipe.png")
    segment = fake_segmenter()
    reading = pool.submit(segment, tmp_path / "pipe.png")
    with (tmp_path / "pipe.png").open("wb") as pipe:  # opens when somebody reads, and is there at least until then
        assert pool.submit(segment, _pixels()).result(_LONG).labels.shape == (64, 96)
        pool.submit(segment.close).result(_LONG)
        assert not reading.done()
        Image.fromarray(_pixels()).save(pipe, "PPM")
    with pytest.raises(BackendError, match="this segmenter is closed"):
        reading.result(_LONG)


def test_a_window_after_the_close_says_so(monkeypatch):
    """Sliding runs the engine more than once; here it is closed while the second window is made ready."""
    segment = fake_segmenter(resize="slide")
    pack = segment._batch

    def ready(frames):
        if segment._backend.batches:
            segment.close()
        return pack(frames)

    monkeypatch.setattr(segment, "_batch", ready)
    with pytest.raises(BackendError, match="this segmenter is closed"):
        segment(np.zeros((64, 500, 3), np.uint8))
    assert segment._backend.batches == [1]


def test_waiting_for_another_thread_is_nobodys_time(monkeypatch):
    """By a clock that only moves when the test says: 7 s before the engine is free, then 2 s in it."""
    now = [0.0]
    monkeypatch.setattr("agln_fast.runtime.segmenter.time.perf_counter", lambda: now[0])

    def engine(frame):
        now[0] += 2
        return colours(frame)

    for resize in ("stretch", "slide"):
        segment = fake_segmenter(engine, resize=resize)
        turn = segment._gate.turn

        def late(turn=turn):
            now[0] += 7
            return turn()

        segment._gate.turn = late
        timing = segment(_pixels()).timing
        assert (timing.preprocess, timing.engine, timing.postprocess) == (0, 2000, 0)


def test_results_keep_their_order(pool):
    segment = fake_segmenter(max_batch=3)
    images = [_pixels(seed) for seed in range(7)]
    for results in pool.map(segment, [images] * 8):
        assert all(np.array_equal(r.labels, image.argmax(2)) for r, image in zip(results, images, strict=True))


def _segment_for_ever(segment, expected) -> None:
    while True:
        assert np.array_equal(segment(_pixels()).labels, expected)


@ENGINES
def test_engines_are_closed_while_threads_run_them(name, bundle):
    """Every call ends with its labels or with the error that says why; nothing else comes out of any thread."""
    backend, _, _ = name.partition("-")
    with agln_fast.load(bundle, backend, threads=1) as segment:
        expected = segment(_pixels()).labels
    for _ in range(3):
        segment = agln_fast.load(bundle, backend, threads=1)
        together = threading.Barrier(5)

        def work(segment=segment, together=together) -> None:
            segment(_pixels())
            together.wait(_LONG)
            with pytest.raises(BackendError, match="this segmenter is closed"):
                _segment_for_ever(segment, expected)

        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(work) for _ in range(4)]
            together.wait(_LONG)
            segment.close()
            for call in calls:
                call.result(_LONG)


@ENGINES
def test_a_closed_backend_says_so(name, bundle):
    backend = open_engine(bundle.artefact(name), threads=1)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match=f"{name.partition('-')[0]}: this backend is closed; open it again"):
        backend.run(_pixels()[None])


@ENGINES
def test_threads_share_a_backend(name, bundle, pool):
    images = [_pixels(seed)[None] for seed in range(8)]
    with open_engine(bundle.artefact(name), threads=1) as backend:
        expected = [backend.run(image) for image in images]
        assert all(np.array_equal(a, b) for a, b in zip(pool.map(backend.run, images), expected, strict=True))
