"""The command line as a person types it: output, exit codes, one-line errors."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from synthetic_rows import row as suite_row

import agln_fast
from agln_fast.bench.race import run
from agln_fast.bench.race.arguments import BUDGET_S
from agln_fast.bench.race.cases import choose_entries
from agln_fast.bench.race.measure import Measured
from agln_fast.cli import main
from agln_fast.cli.app import app
from agln_fast.export.plugins import obstacle
from agln_fast.plan.plan import Plan

FOLDED = Plan(fold_batchnorm=True)  # takes no time to choose


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate(((80, 100), (64, 64), (40, 120))):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i}.png")
    return folder


def test_every_verb_has_help(cli):
    code, out, _ = cli("--help")
    assert code == 0
    verbs = (
        "build",
        "rebuild",
        "run",
        "serve",
        "load",
        "export-repository",
        "bench",
        "verify",
        "data",
        "eval",
        "train",
        "scenes",
        "visualize",
        "inspect",
        "plugins",
        "doctor",
    )
    for verb in verbs:
        assert verb in out
        code, text, _ = cli(verb, "--help")
        assert code == 0
        assert "Usage" in text
    assert len(app.registered_commands) == len(verbs)


def test_help_needs_no_heavy_package():
    """`--help` must answer at once: nothing heavy is imported for it."""
    heavy = "{'torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt_rtx', 'triton', 'matplotlib'}"
    code = f"import sys, agln_fast.cli; sys.exit(str({heavy} & set(sys.modules) or ''))"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).stderr == b"\n"


def test_escape_sequences_in_names_do_not_reach_the_terminal(cli):
    code, out, err = cli("inspect", "\x1b[31mred\x07.pth")
    assert code == 3
    assert "\\x1b[31mred\\x07.pth" in err
    assert "\x1b" not in out + err


def test_version(cli):
    assert cli("--version")[1].startswith("agln-fast ")


@pytest.mark.openvino
def test_a_build_without_an_engine_that_disagrees_says_so(cli, small_network, tmp_path, monkeypatch):
    from agln_fast.engines.openvino import OpenVinoEngine

    real = OpenVinoEngine.run
    monkeypatch.setattr(OpenVinoEngine, "run", lambda self, image: (real(self, image) + 1) % 5)
    (tmp_path / "plan.json").write_text(FOLDED.to_json())
    agln_fast.save_checkpoint(small_network("fpn_resnet18"), tmp_path / "fpn.safetensors")
    build = (
        "build",
        tmp_path / "fpn.safetensors",
        "--size",
        "64x64",
        "--precision",
        "fp32",
        "--plan",
        tmp_path / "plan.json",
    )
    code, out, err = cli(*build, "-o", tmp_path / "x.agln")
    assert code == 8
    assert "onnxruntime-fp32" in out
    assert f"left out of {tmp_path / 'x.agln'}: openvino-fp32" in err
    assert "left out: openvino-fp32: agrees" in out
    assert "left out: openvino-fp32: agrees" in (tmp_path / "x.agln" / "report.md").read_text()
    assert "left out: openvino-fp32: agrees" in cli("inspect", tmp_path / "x.agln")[1]
    code, out, err = cli(*build, "-o", tmp_path / "y.agln", "--strict")
    assert (code, out) == (8, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fpn.safetensors", "plan.json", "x.agln"]


@pytest.mark.openvino
def test_a_rebuild_that_loses_an_engine_says_so(cli, small_network, tmp_path, monkeypatch):
    options = {"size": (64, 64), "precision": "fp32", "plan": FOLDED}
    bundle = agln_fast.build(small_network("fpn_resnet18"), tmp_path / "small", **options)
    from agln_fast.engines.openvino import OpenVinoEngine

    real = OpenVinoEngine.run
    monkeypatch.setattr(OpenVinoEngine, "run", lambda self, image: (real(self, image) + 1) % 5)
    code, out, err = cli("rebuild", bundle.path, "-o", tmp_path / "x.agln")
    assert code == 8
    assert "left out: openvino-fp32: agrees" in out
    assert f"left out of {tmp_path / 'x.agln'}: openvino-fp32" in err
    code, out, err = cli("rebuild", bundle.path, "-o", tmp_path / "y.agln", "--strict")
    assert (code, out) == (8, "")
    assert not (tmp_path / "y.agln").exists()


def test_build_run_verify_inspect(cli, small_checkpoint, images, tmp_path):
    bundle = tmp_path / "x.agln"
    (tmp_path / "plan.json").write_text(FOLDED.to_json())
    quick = ("--precision", "fp32", "--plan", tmp_path / "plan.json")
    code, out, _ = cli("build", small_checkpoint, "-o", bundle, "--size", "64x96", "--samples", images, *quick)
    assert code == 0
    assert "onnxruntime-fp32" in out
    assert str(bundle) in out.replace("\n", "")

    code, out, _ = cli("run", bundle, images, "-o", tmp_path / "out", "--backend", "onnxruntime", "--json")
    assert code == 0
    report = json.loads(out)
    assert (report["engine"], report["device"], report["precision"]) == ("onnxruntime-fp32", "cpu", "fp32")
    assert [row["image"] for row in report["images"]] == [str(images / f"{i}.png") for i in range(3)]
    for row in report["images"]:
        labels = Image.open(row["labels"])
        assert labels.size == (row["width"], row["height"])
        assert labels.mode == "P"
        assert np.asarray(labels).max() < 5
        assert Image.open(row["overlay"]).width > row["width"]  # the legend stands beside
        assert sum(row["shares"].values()) == pytest.approx(1, abs=1e-4)

    code, out, _ = cli("run", bundle, images / "0.png", "-o", tmp_path / "out")
    assert code == 0
    assert "100x80" in out

    code, out, _ = cli("verify", bundle, "--json")
    assert code == 0
    assert json.loads(out)["engines"]["torch-fp32"]["agreement"] == 1.0
    assert cli("verify", bundle)[0] == 0

    code, out, _ = cli("inspect", bundle, "--json")
    assert code == 0
    assert (json.loads(out)["height"], json.loads(out)["width"]) == (64, 96)
    assert "onnxruntime-fp32" in cli("inspect", bundle)[1]


def test_build_with_own_config_names_and_normalisation(cli, small_network, tmp_path):
    """What a state dict cannot tell comes from the command line."""
    network = small_network("agln_minus_cr_resnet18")
    torch.save(network.state_dict(), tmp_path / "plain.pth")
    (tmp_path / "config.json").write_text(network.config.to_json())
    (tmp_path / "names.txt").write_text("road\nsky\ncar\ntree\nperson\n")
    options = ("--size", "64x64", "--config", tmp_path / "config.json", "--classes", tmp_path / "names.txt")
    normalisation = ("--mean", "0.5,0.5,0.5", "--std", "1,1,1")
    quick = ("--target", "cuda", "--precision", "fp32")  # PyTorch's engines, which need no export
    code, out, _ = cli(
        "build", tmp_path / "plain.pth", "-o", tmp_path / "x", *options, *normalisation, *quick, "--json"
    )
    assert code == 0
    manifest = json.loads(out)
    assert not manifest["model"]["spatial_gating"]
    assert manifest["classes"] == ["road", "sky", "car", "tree", "person"]
    assert (manifest["contract"]["mean"], manifest["contract"]["std"]) == ([0.5] * 3, [1.0] * 3)


def test_one_bad_image_does_not_stop_the_rest(cli, bundle, images, tmp_path):
    (images / "1.png").write_bytes(b"not a picture")
    code, out, err = cli("run", bundle.path, images, tmp_path / "missing.jpg", "-o", tmp_path / "out", "--json")
    assert code == 1
    report = json.loads(out)
    assert [row["image"][-5:] for row in report["images"]] == ["0.png", "2.png"]
    assert set(report["failed"]) == {str(images / "1.png"), str(tmp_path / "missing.jpg")}
    assert err.count("failed:") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0.labels.png", "0.overlay.png", "2.labels.png", "2.overlay.png",
    ]  # fmt: skip


def test_names_with_brackets_are_shown_as_they_are(cli, bundle, images, tmp_path):
    (images / "0.png").rename(images / "a [red] [b].png")
    code, out, _ = cli("run", bundle.path, images / "a [red] [b].png", "-o", tmp_path / "out")
    assert code == 0
    assert "a [red] [b].overlay.png" in out


def test_an_unwritable_output_folder_is_told(cli, bundle, images, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = cli("run", bundle.path, images, "-o", tmp_path / "file")
    assert code == 4
    assert "choose another folder" in err.replace("\n", " ")


ERRORS = {
    "missing checkpoint": (("build", "nothing.pth", "-o", "x"), 3, "nothing.pth: no such file"),
    "bad mean": (("build", "nothing.pth", "-o", "x", "--mean", "0.5"), 2, "mean '0.5': give three numbers"),
    "no config": (("build", "nothing.pth", "-o", "x", "--config", "no.json"), 2, "no.json: cannot be read"),
    "bad batch": (("build", "nothing.pth", "-o", "x", "--batch", "many"), 2, "batch 'many'"),
    "missing bundle": (("run", "nothing.agln", "x.png", "-o", "out"), 5, "nothing.agln: no such bundle"),
    "unknown preset": (("inspect", "agln_resnet5"), 2, "did you mean 'agln_resnet50'"),
    "bad size": (("inspect", "agln_resnet50", "--size", "5"), 2, "size '5'"),
    "no rounds": (("bench", "--iters", "0"), 2, "iters 0"),
    "no plan": (("bench", "--plan", "nothing.json"), 2, "plan nothing.json: cannot be read"),
    "two devices": (("bench", "--target", "cpu", "--target", "cuda"), 2, "one after the other"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_with_their_exit_code(case, cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, expected, message = ERRORS[case]
    code, out, err = cli(*arguments)
    assert code == expected
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert not out
    assert not list(tmp_path.iterdir())


def test_usage_errors_have_exit_code_2_and_a_hint(cli):
    code, _, err = cli("buld")
    assert code == 2
    assert "build" in err


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["agln-fast", "inspect", "nonsense", "--debug"])
    with pytest.raises(Exception, match="unknown model 'nonsense'"):
        main()


def test_an_unexpected_error_is_told_without_a_traceback(cli, monkeypatch):
    monkeypatch.setattr("agln_fast.models.config.preset", lambda *_: 1 / 0)
    code, _, err = cli("inspect", "agln_resnet50")
    assert code == 1
    assert "unexpected error: ZeroDivisionError" in err


def test_interruption(cli, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("agln_fast.models.config.preset", interrupt)
    assert cli("inspect", "agln_resnet50")[0] == 130


def test_inspect_shows_table_viii(cli):
    code, out, _ = cli("inspect", "fpn_resnet101s", "--num-classes", "59", "--size", "480x480", "--json")
    assert code == 0
    total = json.loads(out)["parts"][-1]
    assert total["parameters"] == 54_324_219
    assert "classifier" in cli("inspect", "fpn_resnet18")[1]


def test_doctor_says_what_is_there_and_what_to_install(cli, monkeypatch):
    code, out, _ = cli("doctor", "--json")
    assert code == 0
    rows = {row["what"]: row for row in json.loads(out)}
    assert rows["onnxruntime"]["found"]
    assert platform.python_version() in rows["Python"]["found"]
    for name in ("openvino", "tensorrt", "tensorrt-rtx", "triton"):
        assert bool(rows[name]["found"]) != bool(rows[name]["advice"])
    assert "onnxruntime" in cli("doctor")[1]


@pytest.mark.slow
def test_bench_puts_contestants_and_networks_side_by_side(cli, tmp_path):
    arguments = ("bench", "fpn_nano", "agln_nano", "--size", "64x64", "--iters", "3", "--num-classes", "3")
    arguments += ("--precision", "fp32", "--threads", "1", "--budget", "0", "--plan", "none")
    files = ("--csv", tmp_path / "rows.csv", "--save", tmp_path / "old.json", "--figures", tmp_path / "figures")
    code, out, _ = cli(*arguments, *files, "--json")
    assert code == 0
    report = json.loads(out)
    assert report["machine"]["torch"]
    assert report["machine"]["threads"] == 1
    assert report["command"].startswith("agln-fast bench fpn_nano")
    assert {each["network"] for each in report["rows"]} == {"fpn_nano", "agln_nano"}
    assert {each["contestant"] for each in report["rows"]} >= {"torch", "onnxruntime", "planned onnxruntime"}
    for each in report["rows"]:
        assert each["median_ms"] > 0
        assert each["agreement"] >= 0.999
        assert each["ratio"] > 0
    assert any(line.startswith("torch.compile fp32") for line in report["left_out"])
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + len(report["rows"])
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"latency.svg", "latency.png"}

    code, out, _ = cli(*arguments, "--compare", tmp_path / "old.json")
    assert code == 0
    for words in ("▸ planned onnxruntime", "left out: ", "new/old", "G multiply-adds"):
        assert words in out


def test_bench_hands_its_options_on(cli, tmp_path, monkeypatch):
    (tmp_path / "plan.json").write_text(Plan(fold_batchnorm=True).to_json())
    seen = []
    part = Measured((suite_row(network="agln_nano"),), ("something: a reason",))
    later = Measured((suite_row(), suite_row(batch=2)), ())
    for name, found in (("measure", part), ("measure_ladder", later), ("measure_scaling", later)):
        monkeypatch.setattr(run, name, lambda *arguments, found=found: seen.append(arguments) or found)
    code, out, _ = cli(
        "bench", "agln_nano", "--plan", tmp_path / "plan.json", "--full", "--ladder", "--scaling", "--warmup", "2",
        "--figures", tmp_path,
    )  # fmt: skip
    assert code == 0
    cases, entries, options, _ = seen[0]
    assert [case.name for case in cases] == ["agln_nano 512x512 batch 1, 59 classes"]
    assert (options.plan, options.warmup, options.budget_s, options.tune_s) == (
        Plan(fold_batchnorm=True),
        2,
        None,
        None,
    )
    assert list(entries) == choose_entries(full=True)[0]
    assert all(arguments[:3] == (part.rows, cases, options) for arguments in seen[1:])
    assert "left out: something: a reason" in out
    for suffix in ("svg", "png"):
        found = sorted(path.stem for path in tmp_path.glob(f"*.{suffix}"))
        assert found == ["ladder", "latency", "pareto", "scaling"]
    cli("bench", "agln_nano")
    assert 0.9 * BUDGET_S < seen[-1][2].budget_s <= BUDGET_S
    assert (seen[-1][2].tune_s, seen[-1][2].plan) == (0, "auto")


@pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
def test_plugins_writes_the_library(cli, tmp_path, monkeypatch):
    file = tmp_path / "layers.so"
    code, out, _ = cli("plugins", "-o", file)
    assert (code, out) == (0, f"wrote {file}\n")
    assert file.read_bytes()[:4] == b"\x7fELF"
    monkeypatch.setenv("AGLN_FAST_TENSORRT_INCLUDE", str(tmp_path))
    code, out, error = cli("plugins", "-o", tmp_path / "other.so")
    assert code == 7
    assert "has no NvInfer.h of 10 or later: pip install kernel-lens" in " ".join(error.split())
    assert [each.name for each in tmp_path.iterdir()] == ["layers.so"]
