"""A bundle runs where nothing is installed that builds one, and gives the labels that it gives elsewhere."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

import agln_fast
from agln_fast.data.scenes import Scenes

# What is None there cannot be imported, as if it were not installed.
BLOCKED = (
    "import sys\n"
    "for name in ('torch', 'triton', 'onnx', 'onnx_ir', 'onnxscript', 'safetensors'):\n"
    "    sys.modules[name] = None\n"
)
SEGMENT = (
    "import numpy, agln_fast\n"
    "path, backend, image, tta, out = sys.argv[1:]\n"
    "with agln_fast.load(path, backend, precision='fp32', threads=1) as segment:\n"
    "    result = segment(image, bool(int(tta)), margin=segment.contract.output == 'logits')\n"
    "    result.save(out + '.png')\n"
    "    numpy.save(out, result.labels)\n"
)
BACKENDS = ["onnxruntime", pytest.param("openvino", marks=pytest.mark.openvino)]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory, small_network):
    """One for each policy of resizing."""
    folder = tmp_path_factory.mktemp("bundles")
    return {
        resize: agln_fast.build(
            small_network(),
            folder / resize,
            size=(64, 64),
            precision="fp32",
            plan="none",
            output="logits",
            resize=resize,
        )
        for resize in ("stretch", "pad", "slide")
    }


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    from PIL import Image

    file = tmp_path_factory.mktemp("picture") / "scene.png"
    Image.fromarray(Scenes("val", size=(80, 112))[0].image).save(file)
    return file


def without(program, *arguments):
    command = [sys.executable, "-c", BLOCKED + program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("resize", "tta"), [("stretch", 0), ("pad", 0), ("slide", 0), ("stretch", 1)])
def test_labels_are_those_of_a_machine_with_pytorch(resize, tta, backend, bundles, picture, tmp_path):
    answer = without(SEGMENT, bundles[resize].path, backend, picture, tta, tmp_path / "labels.npy")
    assert answer.returncode == 0, answer.stderr
    with agln_fast.load(bundles[resize], backend, precision="fp32", threads=1) as segment:
        expected = segment(picture, bool(tta)).labels
    found = np.load(tmp_path / "labels.npy")
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


STREAM = (
    "import numpy, agln_fast\n"
    "path, backend, image, out = sys.argv[1:]\n"
    "with agln_fast.load(path, backend, precision='fp32', threads=1) as segment:\n"
    "    numpy.save(out, [result.labels for result in segment.stream(iter([image] * 3))])\n"
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_runs_without_pytorch(backend, bundles, picture, tmp_path):
    answer = without(STREAM, bundles["pad"].path, backend, picture, tmp_path / "labels.npy")
    assert answer.returncode == 0, answer.stderr
    with agln_fast.load(bundles["pad"], backend, precision="fp32", threads=1) as segment:
        expected = segment(picture).labels
    assert all(np.array_equal(labels, expected) for labels in np.load(tmp_path / "labels.npy"))


VERB = "from agln_fast.cli import main\nmain()\n"


def test_run_inspect_verify_and_doctor(bundles, picture, tmp_path):
    bundle = bundles["stretch"].path
    answer = without(VERB, "run", bundle, picture, "-o", tmp_path / "out", "--json")
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["engine"] in ("openvino-fp32", "onnxruntime-fp32")
    answer = without(VERB, "inspect", bundle, "--json")
    assert answer.returncode == 0, answer.stderr
    assert len(json.loads(answer.stdout)["engines"]) == len(bundles["stretch"].manifest.engines)
    answer = without(VERB, "verify", bundle, "--json")
    assert answer.returncode == 0, answer.stderr
    engines = json.loads(answer.stdout)["engines"]
    assert engines["onnxruntime-fp32"]["status"] == "passed"
    assert engines["torch-fp32"]["status"] == "not verified on this machine"
    answer = without(VERB, "doctor", "--json")
    assert answer.returncode == 0, answer.stderr
    (torch,) = [row for row in json.loads(answer.stdout) if row["what"] == "torch"]
    assert 'pip install "agln-fast[build]"' in torch["advice"]


@pytest.mark.parametrize(
    "arguments",
    [("build", "agln_nano", "-o", "x.agln"), ("eval", "agln_nano"), ("bench", "agln_nano"), ("inspect", "agln_nano")],
    ids=lambda arguments: arguments[0],
)
def test_what_needs_the_other_half_names_the_extra(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answer = without(VERB, *arguments)
    assert answer.returncode == 6, answer.stderr
    assert answer.stderr.strip().count("\n") == 0
    assert 'is not installed: pip install "agln-fast[build]"' in answer.stderr
    assert not list(tmp_path.iterdir())


def test_a_name_of_the_other_half_names_the_extra():
    answer = without(
        "import agln_fast\ntry:\n    agln_fast.build\nexcept agln_fast.AglnError as error:\n    print(error)"
    )
    assert re.fullmatch(r'package "(torch|onnx)" is not installed: pip install "agln-fast\[build\]"\n', answer.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cold_start_is_short_and_small(backend, tmp_path):
    """From the start of the process to a loaded segmenter. The goal is 1.0 s and 200 MB, this machine may be busy."""
    built = agln_fast.build("agln_nano", tmp_path / "nano", size=(128, 128), precision="fp32", plan="none")
    program = (
        "import agln_fast, sys\n"
        "segment = agln_fast.load(sys.argv[1], sys.argv[2], precision='fp32')\n"
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        answer = subprocess.run(
            [sys.executable, "-c", program, str(built.path), backend], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 2
    assert int(answer.stdout) < 250_000


def test_nothing_heavy_is_imported_with_the_package():
    program = (
        "import agln_fast, sys\n"
        "print([name for name in ('numpy', 'PIL', 'rich', 'torch', 'typer', 'jsonschema') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
