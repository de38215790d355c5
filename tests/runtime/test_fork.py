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


# The parent loads PyTorch and has its threads work; the child runs the words behind that.
_BEGIN = """
import os, sys, threading, warnings

def work():
    import torch
    torch.set_num_threads(2)
    torch.rand(4_000_000).mul(2)

def forked(child):
    number = os.fork()
    if number == 0:
        child()
        sys.stdout.flush()
        os._exit(0)
    print("status", os.waitpid(number, 0)[1])

def told(name, *arguments, **options):
    import agln_fast, numpy, torch
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        done = getattr(agln_fast, name)(*arguments, **options)
        if name == "load":
            done(numpy.zeros((300, 200, 3), numpy.uint8))
    warned = [w for w in caught if "with one thread in this forked process" in str(w.message)]
    print(torch.get_num_threads(), len(warned))

warnings.simplefilter("ignore", DeprecationWarning)
bundle, weights, folder = sys.argv[1:]
"""


def _said(script: str, bundle, folder) -> list[str]:
    weights = str(bundle.path / "weights.safetensors")
    command = [sys.executable, "-c", _BEGIN + script, str(bundle.path), weights, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


_USES = [
    'told("load", bundle, "torch")',
    'told("load", bundle, "fused")',
    'told("load_checkpoint", weights)',
    'told("load_backbone", network, folder + "/encoder.pth")',
    *(
        pytest.param(use, marks=pytest.mark.slow)
        for use in (
            'told("build", weights, folder + "/again.agln", size=(64, 64), precision="fp32", targets="cuda")',
            'told("build", network, folder + "/again.agln", size=(64, 64), precision="fp32", targets="cuda")',
            'told("rebuild", bundle, folder + "/again.agln")',
        )
    ),
    'told("fuse", network)',
    'told("tune", network, "onnxruntime", (64, 64), budget_s=0)',
]


@pytest.mark.parametrize("use", _USES)
@pytest.mark.parametrize("first", ["PyTorch alone", "agln_fast, too"])
def test_whatever_the_child_does_first_it_does_with_one_thread(first, use, bundle, tmp_path):
    """Without a thread of the pool, and with agln_fast imported by the parent, or not before the child does."""
    if "network" in use and first == "PyTorch alone":
        pytest.skip("the network is the parent's")
    begin = "work()\n"
    if first != "PyTorch alone":
        begin += (
            "import agln_fast, torch\nnetwork = agln_fast.load_checkpoint(weights)\n"
            'torch.save(network.encoder.state_dict(), folder + "/encoder.pth")\n'
        )
    assert _said(f"{begin}forked(lambda: {use})", bundle, tmp_path) == ["1 1", "status 0"]


def test_another_thread_of_the_child_loads_than_the_one_that_had_the_pool(bundle, tmp_path):
    said = _said(
        """
work()
import agln_fast, numpy

def load():
    global segment
    segment = agln_fast.load(bundle, "torch")

def child():
    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    print(segment(numpy.zeros((300, 200, 3), numpy.uint8)).labels.shape)

forked(child)
""",
        bundle,
        tmp_path,
    )
    assert said == ["(300, 200)", "status 0"]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('work()\ntold("load", bundle, "torch")', ["2 0"]),
        ('def child():\n    work()\n    told("load", bundle, "torch")\nforked(child)', ["2 0", "status 0"]),
        ('import agln_fast\nforked(lambda: (work(), told("load", bundle, "torch")))', ["2 0", "status 0"]),
    ],
    ids=["no fork", "a fork before both", "a fork before PyTorch"],
)
def test_a_process_that_loaded_pytorch_itself_keeps_its_threads(script, expected, bundle, tmp_path):
    assert _said(script, bundle, tmp_path) == expected


def test_a_child_whose_parent_has_gone_is_in_doubt_and_takes_one_thread(bundle, tmp_path):
    """As a daemon does it: nobody can be asked any more who loaded PyTorch."""
    script = """
work()
reader, writer = os.pipe()
if os.fork() == 0:
    if os.fork() == 0:
        os.close(writer)
        os.read(reader, 1)  # until the other ends are closed, too: those of the processes before this one
        told("load", bundle, "torch")
        sys.stdout.flush()
    os._exit(0)
"""
    assert _said(script, bundle, tmp_path) == ["1 1"]
