"""A wrong call is refused before PyTorch is imported, which takes seconds: the interpreter of these has none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from agln_fast.bundle import Bundle

# Each: arguments, exit code, words of the message. {bundle}, {weights}, {image}, {text} (no image) and {there} (a
# folder that is not empty), {own} (an image and its mask, two classes) exist; {new} does not. The bundle has
# the engines of a CPU build in fp32, labels out, five classes.
BUILD = "build {weights} -o {new}.agln"
RUN = "run {bundle} {image} -o {new}"
EVAL = "eval {bundle}"
TRAIN = "train -o {new}"
SHOW = "visualize {weights} {image} -o {new}.png"
SCENES = "scenes --write {new}"
CASES = [
    ("build nothing.pth -o {new}", 3, "nothing.pth: no such file"),
    ("build agln_nan -o {new}", 3, "did you mean 'agln_nano'"),
    ("build {there} -o {new}", 3, "not a file"),
    ("build {weights} -o {bundle}", 2, "exists already"),
    ("build {weights} -o {bundle} --size 5", 2, "size '5'"),
    ("build {weights} -o {there}/nowhere/x.agln", 2, "there is no folder"),
    ("build {weights} -o {text}/x.agln", 2, "there is no folder"),
    ("build {weights} -o {there}.agln --force", 2, "is no bundle"),
    (f"{BUILD} --size 8x8", 2, "each side must be from 32"),
    (f"{BUILD} --size 512", 2, "give height x width"),
    (f"{BUILD} --precision fp8", 2, "unknown precision 'fp8'"),
    (f"{BUILD} --target gpu", 2, "unknown target 'gpu'"),
    (f"{BUILD} --target tensort", 2, "did you mean 'tensorrt'"),
    (f"{BUILD} --precision int8 --target cuda", 2, "'int8' is for target cpu, tensorrt, tensorrt-rtx, not for cuda"),
    (f"{BUILD} --precision int8 --target tensorrt-rtx --kernels only", 2, "int8 engines have none of ours"),
    (f"{BUILD} --max-miou-loss nan", 2, "max_miou_loss nan: must be 0 or more percentage points"),
    (f"{BUILD} --max-miou-loss inf", 2, "max_miou_loss inf: must be 0 or more percentage points, and end"),
    (f"{BUILD} --max-miou-loss -0.1", 2, "max_miou_loss -0.1: must be 0 or more percentage points"),
    (f"{BUILD} --max-miou-loss much", 2, "Invalid value for '--max-miou-loss'"),
    (f"{BUILD} --precision int8 --calibration 0", 2, "calibration on 0 images: must be a whole number of at least 1"),
    (f"{BUILD} --precision int8 --calibration -7", 2, "calibration on -7 images: must be a whole number of at least 1"),
    (f"{BUILD} --precision int8 --calibration nan", 2, "Invalid value for '--calibration'"),
    (f"{BUILD} --precision int8 --calibration 2001", 2, "calibration on 2001 images: there are 2000"),
    (f"{BUILD} --precision int8 --data scenes --calibration 250", 2, "there are 250, and one at least must be left"),
    (f"{BUILD} --precision fp32 --calibration 5", 2, "only int8 engines are calibrated"),
    (f"{BUILD} --data {{new}}.png", 4, "no such file"),
    (f"{BUILD} --data {{there}}", 4, "none of its"),
    (f"{BUILD} --data pascal_voc", 2, "give its folder with --data-root"),
    (f"{BUILD} --data pascal_voc --data-root {{there}}", 9, "holds no complete split 'val'"),
    (f"{BUILD} --data scenes --split vla", 2, "did you mean 'val'"),
    (f"{BUILD} --data-root {{there}}", 2, "data_root is the folder of a dataset: name that with data, too"),
    (f"{BUILD} --tune inf", 2, "seconds to choose plans in"),
    (f"{BUILD} --plan auot", 2, "did you mean 'auto'"),
    (f"{BUILD} --plan {{text}}", 2, "not a plan"),
    (f"{BUILD} --batch many", 2, "batch 'many'"),
    (f"{BUILD} --batch 4..2", 2, "needs 1 <= smallest <= largest"),
    (f"{BUILD} --output label", 2, "output 'label'"),
    (f"{BUILD} --layout nchw", 2, "layout 'nchw'"),
    (f"{BUILD} --resize crop", 2, "resize 'crop'"),
    (f"{BUILD} --resize slide", 2, "needs output 'logits'"),
    (f"{BUILD} --classes ade2k", 2, "did you mean 'ade20k'"),
    (f"{BUILD} --config {{new}}.json", 2, "cannot be read"),
    (f"{BUILD} --config {{text}}", 2, "model config"),
    (f"{BUILD} --mean 1,2", 2, "mean '1,2': give three numbers"),
    (f"{BUILD} --std 0,0,0", 2, "std needs three numbers from 0.0001"),
    (f"{BUILD} --sm sm86", 2, "are for target tensorrt-rtx"),
    (f"{BUILD} --target tensorrt-rtx --sm sm1", 2, "compute capability 'sm1'"),
    (f"{BUILD} --workspace 0", 2, "workspace"),
    (f"{BUILD} --timing-cache x", 2, "only target tensorrt has one"),
    (f"{BUILD} --samples {{new}}.png", 4, "no such file"),
    (f"{BUILD} --samples {{there}}", 4, "none of its"),
    (f"{BUILD} --data scene", 2, "did you mean 'scenes'"),
    (f"{BUILD} --data {{own}} --split val", 2, "not divided into splits"),
    (f"{BUILD} --data {{own}} --data-root x", 2, "leave --data-root"),
    (f"{BUILD} --min-agreement 2", 2, "must be from 0 to 1"),
    (f"{BUILD} --threads 0", 2, "threads 0"),
    ("rebuild nothing.agln", 5, "no such bundle"),
    ("rebuild {there}", 5, "not a bundle"),
    ("rebuild {bundle} -o {bundle}", 2, "exists already"),
    ("rebuild {bundle} -o {new}/x.agln", 2, "there is no folder"),
    ("rebuild {bundle} --samples {new}", 4, "no such file"),
    ("rebuild {bundle} --min-agreement 2", 2, "must be from 0 to 1"),
    ("rebuild {bundle} --threads 0", 2, "threads 0"),
    ("run nothing.agln {image} -o {new}", 5, "no such bundle"),
    ("run {there} {image} -o {new}", 5, "not a bundle"),
    ("run {bundle} {new}.png -o {new}", 4, "no such file"),
    ("run {bundle} {image} -o {text}", 4, "choose another folder"),
    ("run {bundle} {image} -o {text}/below", 4, "choose another folder"),
    (f"{RUN} --backend openvno", 2, "did you mean 'openvino'"),
    (f"{RUN} --backend tensorrt", 5, "no tensorrt engine"),
    (f"{RUN} --precision fp17", 2, "did you mean 'fp16'"),
    (f"{RUN} --precision bf16 --backend torch", 5, "no torch engine in bf16"),
    (f"{RUN} --device gpu", 2, "unknown device 'gpu'"),
    (f"{RUN} --device cuda:x", 2, "did you mean 'cuda'"),
    (f"{RUN} --device cuda:1", 6, "device 'cuda:1': this machine has no driver"),
    (f"{RUN} --threads 100000", 2, "threads 100000"),
    ("verify nothing.agln", 5, "no such bundle"),
    ("verify {bundle} --samples {new}", 4, "no such file"),
    ("verify {bundle} --data {own}", 2, "has 5 classes, dataset own has 2"),
    ("verify {bundle} --data {own} --samples {image}", 2, "give one of them"),
    ("verify {bundle} --min-agreement -1", 2, "must be from 0 to 1"),
    ("verify {bundle} --device warp", 2, "unknown device 'warp'"),
    ("verify {bundle} --threads 0", 2, "threads 0"),
    ("eval nothing.agln", 3, "no such file"),
    ("eval agln_nan", 3, "did you mean 'agln_nano'"),
    ("eval {weights} --backend openvino", 2, "build a bundle from it first"),
    ("eval {weights} --precision int8", 2, "int8 needs a bundle"),
    (f"{EVAL} --backend openvno", 2, "did you mean 'openvino'"),
    (f"{EVAL} --backend tensorrt", 5, "no tensorrt engine"),
    (f"{EVAL} --precision fp8", 2, "unknown precision 'fp8'"),
    (f"{EVAL} --device gpu", 2, "unknown device 'gpu'"),
    (f"{EVAL} --threads 0", 2, "threads 0"),
    (f"{EVAL} --weights ema", 2, "only checkpoints hold several"),
    (f"{EVAL} --compare {{bundle}} --compare-weights ema", 2, "only checkpoints hold several"),
    (f"{EVAL} --data scene", 2, "did you mean 'scenes'"),
    (f"{EVAL} --data ade20k", 2, "give its folder with --data-root"),
    (f"{EVAL} --data ade20k --data-root {{new}}", 9, "holds no complete split"),
    (f"{EVAL} --data {{own}}", 2, "has 5 classes, dataset own has 2"),
    (f"{EVAL} --data {{new}}/x", 9, "no such folder"),
    (f"{EVAL} --data-root x", 2, "leave --data-root"),
    (f"{EVAL} --split tset", 2, "did you mean 'test'"),
    (f"{EVAL} --size 64", 2, "give height x width"),
    (f"{EVAL} --size 8x8", 2, "each side must be from 32"),
    (f"{EVAL} --scales 1", 2, "add it"),
    (f"{EVAL} --tta --scales a", 2, "give numbers"),
    (f"{EVAL} --tta --base-size 0", 2, "base size 0"),
    (f"{EVAL} --compare nothing.pth", 3, "no such file"),
    (f"{EVAL} --compare {{bundle}} --compare-backend onx", 2, "unknown backend 'onx'"),
    (f"{EVAL} --compare {{bundle}} --compare-precision fp8", 2, "unknown precision 'fp8'"),
    (f"{EVAL} --confusion x.gif", 4, "suffix '.gif'"),
    (f"{EVAL} --confusion {{new}}/x.png", 4, "there is no folder"),
    (f"{EVAL} --flips x.png", 2, "--compare"),
    ("train -o {text}", 10, "choose another folder"),
    (f"{TRAIN} --config {{new}}.yaml", 2, "cannot be read"),
    (f"{TRAIN} --model agln_nan", 2, "did you mean 'agln_nano'"),
    (f"{TRAIN} --data scene", 2, "did you mean 'scenes'"),
    (f"{TRAIN} --data ade20k", 2, "give its folder with --data-root"),
    (f"{TRAIN} --data {{own}}", 2, "not divided into splits"),
    (f"{TRAIN} --data {{there}}", 9, "has no classes.txt"),
    ("data {own} --split val", 2, "not divided into splits"),
    ("data {own} -o x.gif", 4, "suffix '.gif'"),
    ("data {there}", 9, "has no classes.txt"),
    ("data {new}", 9, "no such folder"),
    ("data scene", 2, "did you mean 'scenes'"),
    (f"{TRAIN} --train-split trian", 2, "did you mean 'train'"),
    (f"{TRAIN} --val-split vla", 2, "did you mean 'val'"),
    (f"{TRAIN} --train-samples 0", 2, "must be at least 1"),
    (f"{TRAIN} --encoder-weights {{new}}.pth", 3, "no such file"),
    (f"{TRAIN} --initial-weights {{new}}.pth", 3, "no such file"),
    (f"{TRAIN} --from {{new}}.pth", 3, "no such file"),
    (f"{TRAIN} --from {{weights}} --resume", 2, "give one of them"),
    (f"{TRAIN} --from {{weights}} --encoder-weights {{weights}}", 2, "leave one of them out"),
    (f"{TRAIN} --fresh-classifier", 2, "name it with --from"),
    (f"{TRAIN} --loaded-rate -1", 2, "loaded_rate -1.0"),
    (f"{TRAIN} --precision fp8", 2, "precision 'fp8'"),
    (f"{TRAIN} --precision fp16 --accelerator cpu", 2, "CPUs train in fp32 or bf16"),
    (f"{TRAIN} --accelerator cdua", 2, "did you mean 'cuda'"),
    (f"{TRAIN} --crop 8", 2, "crop 8"),
    (f"{TRAIN} --devices 3", 2, "cannot be divided"),
    ("scenes --write {text}", 9, "choose another folder"),
    (f"{SCENES} --size 8x8", 2, "each side must be from 32"),
    (f"{SCENES} --split vla", 2, "did you mean 'val'"),
    (f"{SCENES} -n 0", 2, "at least 1"),
    ("visualize nothing.pth {image} -o {new}.png", 3, "no such file"),
    ("visualize {weights} {new}.png -o {new}.svg", 4, "no such file"),
    ("visualize {weights} {text} -o {new}.svg", 4, "is not an image"),
    ("visualize {weights} {image} -o x.jpg", 4, "suffix '.jpg'"),
    ("visualize {weights} {image} -o {new}/x.png", 4, "there is no folder"),
    (f"{SHOW} --labels {{new}}.png", 4, "is no readable PNG"),
    (f"{SHOW} --classes ade2k", 2, "did you mean 'ade20k'"),
    (f"{SHOW} --level 3", 2, "level 3"),
    (f"{SHOW} --descriptors 0", 2, "descriptors 0"),
    (f"{SHOW} --channels 99", 2, "channels 99"),
    (f"{SHOW} --size big", 2, "size 'big'"),
    ("inspect agln_resnet5", 2, "did you mean 'agln_resnet50'"),
    ("inspect nothing.pth", 3, "no such file"),
    ("inspect {bundle} --weights ema", 2, "only checkpoints hold several"),
    ("inspect agln_resnet50 --weights ema", 2, "only checkpoints hold several"),
    ("inspect {there}", 5, "not a bundle"),
    ("inspect agln_resnet50 --size 5", 2, "size '5'"),
    ("inspect agln_resnet50 --num-classes 0", 2, "num_classes 0"),
    ("bench agln_resnet5", 2, "did you mean 'agln_resnet50'"),
    ("bench --size 5", 2, "size '5'"),
    ("bench --num-classes 0", 2, "num_classes 0"),
    ("bench --data {own} --num-classes 5", 2, "each network has 5 classes, dataset own has 2"),
    ("bench --data {new}/x", 9, "no such folder"),
    ("bench --batch 0", 2, "batch 0"),
    ("bench --precision fp8", 2, "unknown precision 'fp8'"),
    ("bench --target gpu", 2, "unknown target 'gpu'"),
    ("bench --target cpu --target cuda", 2, "one after the other"),
    ("bench --device warp", 2, "unknown device 'warp'"),
    ("bench --target cuda", 6, "device 'cuda': this machine has no driver"),
    ("bench --plan nothing.json", 2, "plan nothing.json: cannot be read"),
    ("bench --iters 0", 2, "iters 0"),
    ("bench --threads 0", 2, "threads 0"),
    ("bench --target cuda --ladder", 2, "leave --ladder out"),
    ("bench --csv {new}/x.csv", 2, "there is no folder"),
    ("bench --save {there}", 2, "is a folder"),
    ("bench --figures {text}", 2, "choose another folder"),
    ("bench --compare {text}", 2, "is damaged"),
    ("doctor --no-such-option", 2, "No such option"),
    ("buld", 2, "No such command 'buld'"),
]

# Runs in an interpreter of its own, all calls one after the other.
CALLER = """
import contextlib, importlib.abc, io, json, pathlib, platform, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise RuntimeError("torch was imported")

sys.meta_path.insert(0, Block())
from agln_fast.engines import driver
driver._LIBRARIES = {platform.system(): "no_such_library"}
driver._ROCM = pathlib.Path("no such file")
from agln_fast.cli import app, console

answers = []
for arguments in json.load(sys.stdin):
    sys.argv = ["agln-fast", *arguments]
    text, code = io.StringIO(), 0
    with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
        try:
            app.main()
        except SystemExit as stop:
            code = stop.code
    answers.append([code, text.getvalue()])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(
    bundle: Bundle, small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str]]:
    """Case -> exit code and standard error."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "there").mkdir()
    (folder / "there" / "notes.txt").write_text("no image")
    (folder / "there.agln").mkdir()
    Image.new("RGB", (64, 48)).save(folder / "image.png")
    (folder / "text").write_text("not what you take it for")
    for part, mode in (("images", "RGB"), ("masks", "L")):
        (folder / "own" / part).mkdir(parents=True)
        Image.new(mode, (64, 48)).save(folder / "own" / part / "x.png")
    (folder / "own" / "classes.txt").write_text("a\nb\n")
    places = {name: folder / name for name in ("there", "text", "new", "own")}
    places |= {"bundle": bundle.path, "weights": small_checkpoint, "image": folder / "image.png"}
    calls = [[word.format(**places) for word in case.split()] for case, _, _ in CASES]
    found = subprocess.run(
        [sys.executable, "-c", CALLER],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "COLUMNS": "4000"},
        timeout=120,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    made = {path.name for path in folder.iterdir()} - {"there", "there.agln", "image.png", "text", "own"}
    assert not made, "a refused call leaves nothing behind"
    return {case: tuple(answer) for (case, _, _), answer in zip(CASES, json.loads(found.stdout), strict=True)}


@pytest.mark.parametrize(("case", "code", "message"), CASES, ids=[case for case, _, _ in CASES])
def test_it_is_told_without_pytorch(answers: dict[str, tuple[int, str]], case: str, code: int, message: str) -> None:
    found, text = answers[case]
    assert message in " ".join(text.split())
    assert found == code
