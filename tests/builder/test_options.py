"""What a build is asked for, in one form."""

from __future__ import annotations

from pathlib import Path

import pytest

from agln_fast.builder.options import BuildOptions
from agln_fast.contract import parse_batch
from agln_fast.errors import ConfigError


def test_one_precision_is_for_every_target(tmp_path: Path) -> None:
    options = BuildOptions(
        "x.pth", tmp_path / "x", targets=("cpu", "cuda"), precision="fp16", size="64x96", batch="1..4"
    )
    assert options.precisions == {"cpu": ("fp16",), "cuda": ("fp16",)}
    assert (options.contract.height, options.contract.width) == (64, 96)
    assert (options.contract.min_batch, options.contract.max_batch) == (1, 4)
    assert options.destination == tmp_path / "x.agln"


def test_a_mapping_gives_each_target_its_own(tmp_path: Path) -> None:
    precision = {"cuda": ["fp16"], "cpu": ["fp32", "int8"]}
    options = BuildOptions("x.pth", tmp_path / "x", targets=("cpu", "cuda"), precision=precision)
    assert options.precisions == {"cpu": ("fp32", "int8"), "cuda": ("fp16",)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": {"cuda": ["fp16"]}}, "precision names the targets cuda, targets cpu"),
        ({"precision": {"cpu": []}}, "give at least one precision"),
        ({"precision": []}, "give at least one precision"),
        ({"targets": []}, "give at least one precision, and one target of cpu, cuda"),
        ({"batch": (1, 2, 3)}, "give a number of images, or the smallest and the largest"),
        ({"batch": 2.0}, "give a number of images, or the smallest and the largest"),
        ({"batch": "9" * 5000}, "give a number, or a range"),
    ],
    ids=["other targets", "none for a target", "no precision", "no target", "three ends", "float", "5000 digits"],
)
def test_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildOptions("x.pth", tmp_path / "x", **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("batch", "ends"),
    [(3, (3, 3)), ((1, 8), (1, 8)), ("3", (3, 3)), (" 1..8 ", (1, 8))],
    ids=["number", "pair", "digits", "range"],
)
def test_batches(batch: int | tuple[int, int] | str, ends: tuple[int, int]) -> None:
    assert parse_batch(batch) == ends
