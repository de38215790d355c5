"""Figures show the numbers of the rows, and nothing lies outside of the page or on top of something else."""

from __future__ import annotations

import json
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from synthetic_rows import results, row

from agln_fast.bench.pages import plots
from agln_fast.bench.pages.plots import OURS, draw_ladder, draw_latency, draw_pareto, draw_scaling
from agln_fast.errors import ConfigError, MissingPackageError

DRAW = {
    "latency": lambda: draw_latency(results().rows),
    "ladder": lambda: draw_ladder(results().ladder),
    "pareto": lambda: draw_pareto(results().rows),
    "scaling": lambda: draw_scaling(results().scaling),
}
LONG = "planned onnxruntime with a name that is longer than any"
CROWDED = {
    "many contestants": lambda: draw_latency([row(10.0 * i + 9, contestant=f"peer {i}") for i in range(14)]),
    "long names": lambda: draw_latency([row(ours=True, contestant=LONG), row(12345.6, contestant=LONG[:-1])]),
    "one panel": lambda: draw_latency([row(), row(0.0123, contestant="fast", batch=2)]),
    "two ladders": lambda: draw_ladder([*results().ladder, *(row(m, network="fpn_resnet50") for m in (9.0, 8.0))]),
    "a ladder of long rungs": lambda: draw_ladder([row(12345.6), row(123.4, contestant=LONG)]),
    "one point": lambda: draw_pareto([row(network="unknown_net", precision="int4")]),
    "two networks": lambda: draw_scaling(
        [row(100.0 * b, batch=b, network=n, contestant=LONG[:30]) for b in (1, 2, 4) for n in "ab"]
    ),
    "two wide panels": lambda: draw_scaling(
        [
            row(10.0 * s * b, size=f"{s}x{s}", batch=b, contestant=LONG[:30], network=n)
            for s in (256, 512, 1024)
            for b in (1, 2, 4)
            for n in ("agln_resnet50", "b")
        ]
    ),
    "sizes alone": lambda: draw_scaling([row(), row(400.0, size="1024x1024")]),
}


def _texts(figure):
    return [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]


def _labels(figure):
    return [text.get_text() for text in _texts(figure)]


def _inside(figure):
    """Texts with their boxes in pixels. Ticks beyond the limits have texts that nobody draws."""
    figure.canvas.draw()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                for label in (tick.label1, tick.label2):
                    label.set_visible(label.get_visible() and low <= tick.get_loc() <= high)
    return [(text.get_text(), text.get_window_extent()) for text in _texts(figure)]


@pytest.mark.parametrize("name", [*DRAW, *CROWDED])
def test_no_text_leaves_the_page_or_lies_on_another(name):
    figure = (DRAW | CROWDED)[name]()
    texts = _inside(figure)
    assert texts
    width, height = figure.canvas.get_width_height()
    for words, box in texts:
        assert box.x0 >= 0, words
        assert box.y0 >= 0, words
        assert box.x1 <= width, words
        assert box.y1 <= height, words
    for (one, a), (other, b) in combinations(texts, 2):
        # A pixel of 100 dpi is less than the blank around a letter.
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or down <= 1, (one, other)


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_fonts_are_eight_or_nine_points_and_legends_outside(draw):
    figure = draw()
    assert {text.get_fontsize() for text in _texts(figure)} <= {8.0, 9.0}
    figure.canvas.draw()
    for legend in (*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())):
        box = legend.get_window_extent()
        assert not [axes for axes in figure.axes if axes.get_window_extent().overlaps(box)]


def test_latency_bars_are_the_medians_fastest_on_top():
    figure = DRAW["latency"]()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["fp32", "reduced precision"]
    for axes, full in zip(figure.axes, (True, False), strict=True):
        expected = []
        for network in ("fpn_resnet50", "agln_resnet50", "agln_lite_resnet50"):
            members = [r for r in results().rows if (r.precision == "fp32") == full and r.network == network]
            expected += sorted(members, key=lambda r: r.median_ms)
        assert [bar.get_width() for bar in axes.patches] == [r.median_ms for r in expected]
        assert [to_hex(bar.get_facecolor()).upper() == OURS for bar in axes.patches] == [r.ours for r in expected]
        suffix = "" if full else " bf16"
        assert [text.get_text() for text in axes.get_yticklabels()] == [f"{r.contestant}{suffix}" for r in expected]
        assert [list(line.get_xdata()) for line in axes.lines] == [[r.median_ms, r.p95_ms] for r in expected]
        assert axes.get_xlim()[0] == 0
        assert axes.yaxis_inverted()
    assert {"256", "400", "440", "680", "cpu, 512x512, batch 1, 59 classes"} <= set(_labels(figure))
    # A case stands at one level on both sides.
    left, right = ([text.get_position()[1] for text in axes.texts if "net" in text.get_text()] for axes in figure.axes)
    assert left == right


def test_each_peer_has_one_grey():
    figure = draw_latency([row(10.0 + i, contestant=f"peer {i}", network=n) for n in "ab" for i in range(5)])
    greys = [to_hex(bar.get_facecolor()) for bar in figure.axes[0].patches]
    assert greys[:5] == greys[5:]
    assert len(set(greys)) == 5
    assert all(grey[1:3] == grey[3:5] == grey[5:7] for grey in greys)


def test_ladder_goes_down_from_the_peer():
    axes = DRAW["ladder"]().axes[0]
    assert [bar.get_width() for bar in axes.patches] == [706, 353, 70.6]
    assert [bar.get_y() for bar in axes.patches] == sorted(bar.get_y() for bar in axes.patches)
    assert axes.yaxis_inverted()
    assert [to_hex(bar.get_facecolor()).upper() == OURS for bar in axes.patches] == [False, True, True]
    words = [text.get_text() for text in axes.texts]
    assert words == ["706", "×1.00", "×1.00", "353", "×2.00", "×2.00", "70.6", "×5.00", "×10.00", "step", "total"]


def test_pareto_shows_every_row_with_miou():
    axes = DRAW["pareto"]().axes[0]
    front, *points = axes.lines
    measured = [r for r in results().rows if r.miou is not None]
    assert sorted((p.get_xdata()[0], p.get_ydata()[0]) for p in points) == sorted(
        (r.median_ms, r.miou) for r in measured
    )
    for point in points:
        (found,) = [r for r in measured if r.median_ms == point.get_xdata()[0]]
        marker = {"fpn": "o", "agln_lite": "^", "agln": "s"}[found.network.removesuffix("_resnet50")]
        assert point.get_marker() == marker
        assert (point.get_markerfacecolor() == "white") != found.ours
        assert point.get_color() == {"fp32": "#0072B2", "bf16": "#D55E00"}[found.precision]
    assert axes.get_xscale() == "log"
    # All have one mIoU: the fastest is the whole front.
    assert front.get_xdata().tolist() == [min(r.median_ms for r in measured)]


def test_front_holds_what_nothing_beats():
    points = [(3.0, 50.0), (1.0, 40.0), (2.0, 39.0), (3.0, 45.0), (4.0, 50.0), (5.0, 60.0)]
    assert plots._front(points) == [(1.0, 40.0), (3.0, 50.0), (5.0, 60.0)]


def test_unknown_families_and_precisions_are_named():
    networks = "unet_small", "fcn_resnet50"  # the latter is not the paper's FCN-8s
    labels = _labels(draw_pareto([row(network=network, precision="int4") for network in networks]))
    assert {*networks, "int4", "FCN-8s"} <= set(labels)


def test_table_viii_is_drawn_whole():
    table = json.loads(Path(plots.__file__).with_name("table_viii.json").read_text())
    assert "Table VIII" in table["source"]
    axes = DRAW["pareto"]().axes[1:]
    assert len(axes) == 6
    for i, dataset in enumerate(("PASCAL Context", "ADE20K", "PASCAL VOC 2012")):
        for j, quantity in enumerate(("gflops", "parameters_m")):
            drawn = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes[2 * i + j].lines}
            assert drawn == {(r[quantity], r[dataset]) for r in table["rows"]}
            assert len(drawn) == 4


def test_scaling_draws_points_lines_of_slope_one_and_fits():
    sizes, batches = DRAW["scaling"]().axes
    for axes, count, exponent in ((sizes, 7, "1.00"), (batches, 5, "0.50")):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        data, bound = axes.lines[:2]
        assert len(data.get_xdata()) == count
        assert data.get_markerfacecolor() == data.get_color() == OURS
        assert axes.lines[2].get_markerfacecolor() == "white"
        x, y = np.log(bound.get_xdata()), np.log(bound.get_ydata())
        assert np.diff(y) == pytest.approx(np.diff(x))
        assert y.mean() == pytest.approx(np.log(data.get_ydata()).mean()), "through the points"
        words = [text.get_text() for text in axes.get_legend().get_texts()]
        assert words[0] == f"planned openvino bf16: exponent {exponent}, R² 1.000"
        assert words[-1] == "exponent 1 through the points"
    shown = [text.get_text() for text in sizes.get_xticklabels() if text.get_text()]
    assert shown == ["256²", "512²", "1024²", "2048²"]
    assert len(sizes.get_xticks()) == 7


def test_scaling_without_a_fit_has_names_alone():
    (axes,) = CROWDED["sizes alone"]().axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "openvino fp32",
        "exponent 1 through the points",
    ]
    assert len(axes.lines) == 2


def test_a_wide_entry_is_broken():
    rows = [
        row(100.0 * side / 256, size=f"{side}x{side}", batch=batch, contestant=LONG[:30], network=network)
        for side in (256, 512, 1024)
        for batch in (1, 2, 4)
        for network in ("agln_resnet50", "b")
    ]
    left, right = draw_scaling(rows).axes
    words = [text.get_text() for text in left.get_legend().get_texts()]
    assert words[0] == f"{LONG[:30]} fp32, agln_resnet50\nexponent 0.50, R² 1.000"
    assert right.get_legend().get_texts()[0].get_text() == words[0].replace("0.50", "0.00")


def test_labels_of_ticks_keep_apart():
    shown = plots._apart([1, 2, 3, 4, 8, 16], 2.8)
    assert shown == [16, 8, 4, 2, 1]
    assert all(a > b for a, b in pairwise(shown))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (draw_latency, "at least one row"),
        (draw_ladder, "at least one row"),
        (draw_pareto, "rows with mIoU"),
        (draw_scaling, "at two sizes or batches"),
    ],
    ids=["latency", "ladder", "pareto", "scaling"],
)
def test_nothing_to_draw(draw, message):
    with pytest.raises(ConfigError, match=message):
        draw([])


def test_without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for draw in DRAW.values():
        with pytest.raises(MissingPackageError, match=r"agln-fast\[eval\]"):
            draw()
