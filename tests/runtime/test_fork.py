"""Processes that are forked after an engine was used: right labels or a clear error, within seconds, and an end."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

_SCRIPT = """
import os, sys, threading, warnings
import numpy as np
import agln_fast
from agln_fast.errors import BackendError

bundle, first, second, what = sys.argv[1:]
warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of any fork beside threads
pixels = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
expected = agln_fast.load(bundle, second if what == "closed" else first, threads=2)
labels = expected(pixels).labels
segment = expected
if what == "closed":
    segment = agln_fast.load(bundle, first, threads=2)
    segment(pixels)
    segment.close()
    if first == second:
        expected.close()
elif what == "held":  # by a thread that is not in the child
    inside, go = threading.Event(), threading.Event()

    def hold():
        with segment._gate.turn(), segment._backend._gate.turn():
            inside.set()
            go.wait()

    threading.Thread(target=hold, daemon=True).start()
    inside.wait()
child = os.fork()
if child == 0:
    try:
        if what == "held":
            segment(pixels)
        elif what == "two":
            agln_fast.load(bundle, second, threads=2)
        else:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", RuntimeWarning)
                opened = agln_fast.load(bundle, second)
                agreement = (opened(pixels).labels == labels).mean()
                print("agreement", agreement > 0.999, *[w.message for w in caught if w.category is RuntimeWarning])
    except BackendError as error:
        print("error", error)
    segment.close()
    sys.exit()  # an ordinary end, that of a worker of gunicorn: destructors run
print("status", os.waitpid(child, 0)[1])
sys.stdout.flush()
os._exit(0)
"""

_ENGINES = ["torch", "fused", "onnxruntime", pytest.param("openvino", marks=pytest.mark.openvino)]


def _forked(bundle, first: str, second: str, what: str) -> list[str]:
    """What the child said, and the status that it ended with."""
    command = [sys.executable, "-c", _SCRIPT, str(bundle.path), first, second, what]
    # A thread of ONNX Runtime's telemetry would be waited for at the end of the child.
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "status 0", done.stdout + done.stderr
    return lines[:-1]


@pytest.mark.parametrize("name", _ENGINES)
def test_an_engine_of_the_parent_is_refused_at_once(name, bundle):
    """Also where a thread that is not in the child was in the midst of it."""
    (said,) = _forked(bundle, name, name, "held")
    assert said.startswith("error this segmenter was opened before this process was forked")
    assert "spawn or forkserver" in said


@pytest.mark.parametrize("name", ["torch", "fused"])
def test_pytorch_computes_with_one_thread_after_a_fork(name, bundle):
    """Its pool has no threads there. It says so, and the labels are those of the parent."""
    (said,) = _forked(bundle, "torch", name, "new")
    assert said.startswith("agreement True")
    if os.cpu_count() != 1:
        assert said.endswith(
            "PyTorch computes with one thread in this forked process; for more, load in a process "
            "started with spawn or forkserver (docs/concurrency.md)"
        )


def test_more_threads_of_pytorch_are_refused_after_a_fork(bundle):
    (said,) = _forked(bundle, "torch", "torch", "two")
    assert "threads 2: after a fork PyTorch computes with one thread; take threads=1, or load in a process" in said


@pytest.mark.parametrize(
    ("first", "what"),
    [
        ("torch", "new"),
        ("onnxruntime", "new"),
        ("onnxruntime", "closed"),
        pytest.param("openvino", "new", marks=pytest.mark.openvino),
    ],
)
def test_onnxruntime_is_loaded_after_a_fork(first, what, bundle):
    assert _forked(bundle, first, "onnxruntime", what) == ["agreement True"]


@pytest.mark.openvino
@pytest.mark.parametrize("first", ["torch", "onnxruntime"])
def test_openvino_is_loaded_after_a_fork(first, bundle):
    assert _forked(bundle, first, "openvino", "new") == ["agreement True"]


@pytest.mark.openvino
@pytest.mark.parametrize("what", ["new", "closed"])
def test_openvino_is_refused_after_a_fork_from_a_process_that_had_opened_it(what, bundle):
    (said,) = _forked(bundle, "openvino", "openvino", what)
    assert "forked from one that had opened an OpenVINO engine" in said
    assert "spawn or forkserver" in said
