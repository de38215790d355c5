"""Processes that are forked after an engine was used: right labels or a clear error, within seconds, and an end."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

_SCRIPT = """
import os, sys, threading, warnings
import numpy as np
import agln_fast
from agln_fast.errors import BackendError

bundle, what, parent, *children = sys.argv[1:]
warnings.simplefilter("ignore", DeprecationWarning)  # Python's own, of any fork beside threads
pixels = np.random.default_rng(0).integers(0, 256, (300, 200, 3), np.uint8)
opened = [agln_fast.load(bundle, name, threads=2) for name in parent.split("+")]
labels = [segment(pixels).labels for segment in opened][0]
if what == "closed":
    for segment in opened:
        segment.close()
elif what == "held":  # by threads that are not in the child
    go = threading.Event()

    def hold(segment, inside):
        with segment._gate.turn(), segment._backend._gate.turn():
            inside.set()
            go.wait()

    for segment in opened:
        inside = threading.Event()
        threading.Thread(target=hold, args=(segment, inside), daemon=True).start()
        inside.wait()


def use(name):
    if what == "held":
        opened[int(name)](pixels)
    name, _, threads = name.partition(" ")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        segment = agln_fast.load(bundle, name, threads=int(threads) if threads else None)
        agreement = (segment(pixels).labels == labels).mean()
        print("agreement", agreement > 0.999, *[w.message for w in caught if w.category is RuntimeWarning])


for name in children:
    child = os.fork()
    if child == 0:
        try:
            use(name)
        except BackendError as error:
            print("error", error)
        for segment in opened:
            segment.close()
        sys.exit()  # an ordinary end, that of a worker of gunicorn: destructors run
    status = os.waitpid(child, 0)[1]
    if status:
        sys.exit(f"{name}: the child ended with {status}")
os._exit(0)
"""


def _said(*command: str) -> list[str]:
    # A thread of ONNX Runtime's telemetry would be waited for at the end of a child.
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", *command], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


_WITH_ONE_THREAD = (
    "agreement True PyTorch computes with one thread in this forked process; for more, load in a process "
    r"started with spawn or forkserver \(docs/concurrency\.md\)$"
)
_AFTER_OPENVINO = r"error .*forked from one that had opened an OpenVINO engine.*spawn or forkserver"


@pytest.mark.openvino
def test_engines_of_the_parent_are_refused_at_once(bundle):
    """Also where a thread that is not in the child is in the midst of each."""
    engines = "torch+fused+onnxruntime+openvino"
    said = _said(_SCRIPT, str(bundle.path), "held", engines, "0", "1", "2", "3")
    assert len(said) == 4
    for line in said:
        assert line.startswith("error this segmenter was opened before this process was forked")
        assert "spawn or forkserver" in line


@pytest.mark.openvino
@pytest.mark.parametrize(
    ("what", "parent", "children"),
    [
        (
            "open",
            "torch",
            {
                "torch": _WITH_ONE_THREAD,
                "fused": _WITH_ONE_THREAD,
                "torch 2": "error .*: threads 2: after a fork PyTorch computes with one thread; take threads=1",
                "onnxruntime": "agreement True$",
                "openvino": "agreement True$",
            },
        ),
        ("open", "onnxruntime", {"onnxruntime": "agreement True$", "openvino": "agreement True$"}),
        ("open", "openvino", {"onnxruntime": "agreement True$", "openvino": _AFTER_OPENVINO}),
        ("closed", "onnxruntime", {"onnxruntime": "agreement True$"}),
        ("closed", "openvino", {"openvino": _AFTER_OPENVINO}),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value,
)
def test_engines_are_loaded_after_a_fork_or_say_why_not(what, parent, children, bundle):
    """Each in a child of its own, with the labels of the parent."""
    said = _said(_SCRIPT, str(bundle.path), what, parent, *children)
    assert len(said) == len(children)
    for line, expected in zip(said, children.values(), strict=True):
        assert re.match(expected, line), line


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


def _told(script: str, bundle, folder) -> list[str]:
    return _said(_BEGIN + script, str(bundle.path), str(bundle.path / "weights.safetensors"), str(folder))


_USES = [
    'told("load", bundle, "torch")',
    'told("load", bundle, "fused")',
    'told("load_checkpoint", weights)',
]
_USES_OF_A_NETWORK = [
    'told("load_backbone", network, folder + "/encoder.pth")',
    'told("fuse", network)',
    'told("tune", network, "onnxruntime", (64, 64), budget_s=0)',
]
_NETWORK = """
import agln_fast, torch
network = agln_fast.load_checkpoint(weights)
torch.save(network.encoder.state_dict(), folder + "/encoder.pth")
"""
_BUILDS = [
    'told("build", weights, folder + "/again.agln", size=(64, 64), precision="fp32", targets="cuda", overwrite=True)',
    'told("build", network, folder + "/again.agln", size=(64, 64), precision="fp32", targets="cuda", overwrite=True)',
    'told("rebuild", bundle, folder + "/more.agln")',
]


@pytest.mark.parametrize(
    ("begin", "uses"),
    [
        pytest.param("", _USES, id="PyTorch alone"),
        pytest.param(_NETWORK, _USES + _USES_OF_A_NETWORK, id="agln_fast, too"),
        pytest.param(_NETWORK, _BUILDS, marks=pytest.mark.slow, id="builds"),
    ],
)
def test_whatever_a_child_does_first_it_does_with_one_thread(begin, uses, bundle, tmp_path):
    """Without a thread of the pool, and with agln_fast imported by the parent, or not before the child does."""
    script = "\n".join(["work()", begin, *(f"forked(lambda: {use})" for use in uses)])
    assert _told(script, bundle, tmp_path) == ["1 1", "status 0"] * len(uses)


def test_another_thread_of_the_child_loads_than_the_one_that_had_the_pool(bundle, tmp_path):
    said = _told(
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
    assert _told(script, bundle, tmp_path) == expected


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
    assert _told(script, bundle, tmp_path) == ["1 1"]
