"""The picture of blocks shows the errors that it is given."""

from __future__ import annotations

import math

import pytest

from agln_fast.errors import ConfigError
from agln_fast.figures.blocks import draw_blocks
from agln_fast.figures.saving import save_figure
from agln_fast.models.config import preset
from agln_fast.plan.blocks import blocks_of
from agln_fast.runtime.blocks import BlockError, EngineBlocks

BLOCKS = blocks_of(preset("fpn_resnet18", 5))


def engine(name: str, precision: str, bound: float, errors: dict[str, float | None], model: str = "") -> EngineBlocks:
    """All other errors are 1e-6."""
    blocks = blocks_of(preset(model, 5)) if model else BLOCKS
    values = [errors.get(block.name, 1e-6) for block in blocks]
    rows = (BlockError(block, value, value, None) for block, value in zip(blocks, values, strict=True))
    return EngineBlocks(name, precision, bound, tuple(rows))  # type: ignore[arg-type]


def lines(figure) -> dict[str, tuple[list[float], list[float]]]:
    drawn = figure.axes[0].get_lines()
    return {line.get_label(): tuple(map(list, line.get_data())) for line in drawn if line.get_label()[0] != "_"}


def rings(figure) -> list[tuple[float, float]]:
    found = [line for line in figure.axes[0].get_lines() if line.get_markersize() == 8]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in found if len(line.get_xdata())]


def test_each_engine_has_a_line_of_its_errors_and_a_ring_at_the_first_above_its_bound():
    a = engine("a-fp32", "fp32", 0.001, {"head": None, "encoder.stage2": 2e-4})
    b = engine("b-bf16", "bf16", 0.01, {"decoder.reduce": 0.02, "head": 0.5})
    figure = draw_blocks([a, b], title="network")
    row = {block.name: number for number, block in enumerate(BLOCKS)}
    drawn = lines(figure)
    x, y = drawn["a-fp32"]
    assert y == list(range(len(BLOCKS)))
    assert x[row["encoder.stage2"]] == 2e-4
    assert math.isnan(x[row["head"]])
    assert sum(map(math.isnan, x)) == 1
    assert drawn["b-bf16"][0][row["head"]] == 0.5
    assert rings(figure) == [(0.02, row["decoder.reduce"])]
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ticks == [block.title for block in BLOCKS]
    words = {text.get_text() for text in figure.axes[0].texts}
    assert {"0.001\nfp32", "0.01\nbf16", "encoder", "1/16", "1/8", "1/4", "head"} <= words


def test_what_is_not_finite_stands_at_the_edge_and_zero_can_be_drawn():
    figure = draw_blocks([engine("a", "fp16", 0.01, {"head": math.inf, "encoder.stem": 0.0})], title="")
    (x, _), edge = lines(figure)["a"], figure.axes[0].get_xlim()[1]
    assert x[[block.name for block in BLOCKS].index("head")] == edge
    assert 0 < x[0] < 1e-6


def test_equal_errors_give_equal_files(tmp_path):
    for name in ("a.svg", "b.svg"):
        save_figure(draw_blocks([engine("a", "fp32", 0.001, {})], title="network"), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_engines_of_different_networks_are_refused():
    other = engine("b", "fp32", 0.001, {}, model="agln_resnet18")
    for engines in ([], [engine("a", "fp32", 0.001, {}), other]):
        with pytest.raises(ConfigError, match="one network"):
            draw_blocks(engines, title="")
