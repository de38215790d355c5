"""`agln-fast verify --blocks`, as a user calls it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image

import agln_fast
from agln_fast.bundle import seal
from agln_fast.engines import REFERENCE
from agln_fast.plan.blocks import blocks_of


def test_errors_of_every_engine_as_json_and_as_a_picture(cli, bundle, tmp_path):
    picture = tmp_path / "blocks.png"
    code, out, _ = cli("verify", bundle.path, "--blocks", "--json", "-o", picture)
    assert code == 0
    result = json.loads(out)
    assert set(result["engines"]) == {engine.name for engine in bundle.manifest.engines}
    assert result["not_compared"] == {}
    for name, engine in result["engines"].items():
        assert [each["block"] for each in engine["blocks"]] == [each.name for each in blocks_of(bundle.manifest.model)]
        assert engine["first_above"] is None
        assert {each["status"] for each in engine["blocks"]} <= {"compared", "inside a rewrite"}
        hidden = [each for each in engine["blocks"] if each["status"] == "inside a rewrite"]
        assert bool(hidden) == (not name.startswith(REFERENCE))
        assert all(each["error"] is None for each in hidden)
    assert Image.open(picture).size[1] > 1000


def test_a_table_for_readers_marks_the_first_block_above_the_bound(cli, bundle, tmp_path):
    samples = tmp_path / "image.png"
    Image.new("RGB", (40, 30), (90, 120, 30)).save(samples)
    code, out, _ = cli("verify", bundle.path, "--blocks", "--min-agreement", 1, "--samples", samples)
    assert code == 0
    assert "CFB 1/16 no. 1: semantic distribution M" in out
    assert "> " in next(line for line in out.splitlines() if "encoder: stem" in line)
    assert "torch-fp32: the first block above 0.00% is encoder: stem (encoder.stem)" in out
    assert "inside a rewrite" in out


@pytest.fixture
def without_weights(bundle, tmp_path):
    """A bundle from which someone took the reference."""
    folder = tmp_path / "bare.agln"
    shutil.copytree(bundle.path, folder)
    for name in ("weights.safetensors", "manifest.json", "SHA256SUMS"):
        (folder / name).unlink()
    kept = tuple(each for each in bundle.manifest.engines if each.file != "weights.safetensors")
    seal(folder, replace(bundle.manifest, engines=kept))
    return folder


def test_a_bundle_without_weights_takes_a_checkpoint(cli, without_weights, small_checkpoint):
    code, _, error = cli("verify", without_weights, "--blocks")
    assert code != 0
    assert "--checkpoint FILE" in error
    code, out, _ = cli("verify", without_weights, "--blocks", "--checkpoint", small_checkpoint)
    assert code == 0
    assert "every block is within 0.10%" in out
    assert "first block above" not in out


def test_a_checkpoint_of_another_network_is_refused(cli, without_weights, small_network, tmp_path):
    other = tmp_path / "other.safetensors"
    agln_fast.save_checkpoint(small_network("fpn_resnet18"), other)
    code, _, error = cli("verify", without_weights, "--blocks", "--checkpoint", other)
    assert code != 0
    assert str(other) in error


@pytest.mark.parametrize("option", [("-o", "blocks.png"), ("--checkpoint", "weights.safetensors")])
def test_options_of_blocks_need_blocks(option, cli, bundle):
    code, _, error = cli("verify", bundle.path, *option)
    assert code == 2
    assert "add --blocks" in error


def test_a_picture_that_cannot_be_written_is_told_before_the_work(cli, tmp_path):
    code, _, error = cli("verify", tmp_path / "none.agln", "--blocks", "-o", tmp_path / "blocks.jpg")
    assert code != 0
    assert "'.jpg' is none for figures" in error
