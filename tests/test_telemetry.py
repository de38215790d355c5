"""Nothing is sent and nothing is kept that nobody asked for: every verb, in a network whose name server takes notes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image
from quiet_network import Watched, needs_namespaces, watch

from agln_fast.bundle import Bundle
from agln_fast.cli.app import app
from agln_fast.data.scenes import Scenes

_VERB = ("-c", "from agln_fast.cli import main; main()")
_SERVING = (
    "-c",
    "import os, signal, threading\n"
    "threading.Timer(20, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
    "from agln_fast.cli import main; main()",
)
_LINES = [
    "run {bundle} {photo} -o {folder}/out --backend torch",
    "run {bundle} {photo} -o {folder}/out --backend fused",
    "run {bundle} {photo} -o {folder}/out.mp4 --mask {folder}/labels.mkv --backend onnxruntime",
    "serve {bundle} --http-port 0 --grpc-port 0 --metrics-port 0",
    "export-repository {bundle} --for triton -o {folder}/models",
    "load {bundle} -n 5 --save {folder}/load.json",
    "verify {bundle}",
    "build agln_nano -o {folder}/new --size 64x64 --precision fp32 --precision int8",
    "rebuild {bundle} -o {folder}/again",
    "bench agln_nano --size 64x64 --num-classes 5 --precision fp32,int8 --budget 60 --figures {folder}/figures",
    "eval agln_nano --size 64x64 -n 2 --confusion {folder}/confusion.png --compare fpn_nano",
    "train --model agln_nano --epochs 1 --train-samples 4 --val-samples 2 --crop 64 --batch-size 2 -o {folder}/run",
    "visualize agln_nano {photo} -o {folder}/features.png",
    "inspect {bundle}",
    "doctor",
    "plugins -o {folder}/layers.so",
    "scenes --write {folder}/scenes -n 2",
    "data scenes -n 2 -o {folder}/scenes.png",
]
_HOLDING = """
import sys, time, agln_fast
segment = agln_fast.load(sys.argv[1], backend="onnxruntime")
ends = time.monotonic() + 75
while time.monotonic() < ends:
    segment(sys.argv[2])
    time.sleep(1)
"""


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(Scenes("test", size=(64, 96))[0].image).save(path)
    return path


def look(arguments: Sequence[str | Path], folder: Path, **environment: str) -> Watched:
    """What a verb, or Python with `-c`, does."""
    first = {"-c": (), "serve": _SERVING}.get(str(arguments[0]), _VERB)
    command = [sys.executable, *first, *map(str, arguments)]
    watched = watch(command, folder, AGLN_FAST_TUNE_SECONDS="0", **environment)
    assert watched.code == 0, watched.stderr
    return watched


def verb_of(line: str) -> str:
    return line.split()[0]


def test_the_lines_are_of_every_verb() -> None:
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert set(map(verb_of, _LINES)) == verbs


def is_ours(path: str) -> bool:
    return path.startswith("home/.cache/agln-fast/")


def assert_quiet(watched: Watched) -> None:
    assert watched.asked == ()
    assert [path for path in watched.left if not is_ours(path)] == []


@needs_namespaces
@pytest.mark.openvino
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_run_is_quiet(bundle: Bundle, photo: Path, backend: str, tmp_path: Path) -> None:
    assert_quiet(look(["run", bundle.path, photo, "-o", tmp_path / "out", "--backend", backend], tmp_path / "watched"))


@needs_namespaces
@pytest.mark.openvino
def test_libraries_report_where_that_is_allowed(bundle: Bundle, photo: Path, tmp_path: Path) -> None:
    """So the name server hears what there is to hear, and the switch is one."""
    command = ["run", bundle.path, photo, "-o", tmp_path / "out", "--backend", "openvino"]
    watched = look(command, tmp_path / "watched", AGLN_FAST_ALLOW_TELEMETRY="1")
    assert watched.asked != ()
    assert [path for path in watched.left if not is_ours(path)] != []


@needs_namespaces
@pytest.mark.slow
@pytest.mark.openvino
@pytest.mark.parametrize("line", _LINES, ids=verb_of)
def test_every_verb_is_quiet(line: str, bundle: Bundle, photo: Path, tmp_path: Path) -> None:
    arguments = line.format(bundle=bundle.path, photo=photo, folder=tmp_path).split()
    assert_quiet(look(arguments, tmp_path / "watched"))


@needs_namespaces
@pytest.mark.slow
def test_a_process_that_lives_for_a_minute_is_quiet(bundle: Bundle, photo: Path, tmp_path: Path) -> None:
    """ONNX Runtime sends what it has collected every now and then."""
    assert_quiet(look(["-c", _HOLDING, bundle.path, photo], tmp_path / "watched"))


_NO_USER = """
mount --bind /dev/null /etc/passwd && mount --bind "$0" /etc/nsswitch.conf || exit 3
exec env -u HOME -u USER -u LOGNAME -u AGLN_FAST_CACHE "$@"
"""


def without_a_user(arguments: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a verb as somebody who has no home and is no known user, not even to services beside the list of users."""
    services = folder / "nsswitch.conf"
    services.write_text("passwd: files\n")
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", _NO_USER, services, sys.executable, *_VERB]
    filled = [*map(str, command), *map(str, arguments)]
    return subprocess.run(filled, capture_output=True, text=True, timeout=600, check=False)


@needs_namespaces
@pytest.mark.openvino
def test_a_user_without_a_home_can_run(bundle: Bundle, photo: Path, tmp_path: Path) -> None:
    done = without_a_user(["run", bundle.path, photo, "-o", tmp_path / "out", "--backend", "openvino"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@needs_namespaces
@pytest.mark.slow
@pytest.mark.openvino
@pytest.mark.parametrize(
    "line",
    [
        "build agln_nano -o {folder}/new --size 64x64 --precision fp32 --precision int8",
        "visualize agln_nano {photo} -o {folder}/features.png",
        "eval agln_nano --size 64x64 -n 2 --confusion {folder}/confusion.png",
        "verify {bundle}",
        "inspect {bundle}",
        "doctor",
        "scenes --write {folder}/scenes -n 2",
    ],
    ids=verb_of,
)
def test_a_user_without_a_home_can_do_all(line: str, bundle: Bundle, photo: Path, tmp_path: Path) -> None:
    done = without_a_user(line.format(bundle=bundle.path, photo=photo, folder=tmp_path).split(), tmp_path)
    steps = re.compile(r"\[\d+/\d+\] ")  # of a build
    assert (done.returncode, [told for told in done.stderr.splitlines() if not steps.match(told)]) == (0, [])


_AS_IT_WAS = """
import os, sys
from types import ModuleType
from agln_fast.telemetry import import_quietly

{before}
import_quietly("onnxruntime"), import_quietly("openvino")
print(os.environ.get("ORT_DISABLE_TELEMETRY"), type(sys.modules.get("openvino_telemetry")).__name__)
"""


@pytest.mark.openvino
@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("", "1 NoneType"),
        ('os.environ["ORT_DISABLE_TELEMETRY"] = "0"', "0 NoneType"),
        ('os.environ["AGLN_FAST_ALLOW_TELEMETRY"] = "1"', "None module"),
        ('sys.modules["openvino_telemetry"] = ModuleType("theirs")', "1 module"),
    ],
    ids=["switched off", "the user's own switch stays", "allowed", "the reporter of the program itself stays"],
)
def test_what_an_import_leaves_behind(before: str, expected: str, tmp_path: Path) -> None:
    """In an automatic build, as the libraries see it: there they report nothing, whatever is allowed."""
    command = [sys.executable, "-c", _AS_IT_WAS.format(before=before)]
    environment = {"HOME": str(tmp_path), "CI": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == expected
