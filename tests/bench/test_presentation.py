"""Tables say what the rows say, fits find exponents that are known, and a comparison tells noise from a regression."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console
from synthetic_rows import MACHINE, results, row

from agln_fast.bench.pages.presentation import (
    by_case,
    case_names,
    compare,
    comparison_table,
    differences,
    digits,
    ladder_steps,
    ladders,
    machine_line,
    markdown_ladder,
    markdown_overview,
    markdown_scaling,
    markdown_table,
    overview_table,
    power_law,
    row_table,
    scaling_series,
)
from agln_fast.bench.race.results import Results
from agln_fast.errors import ConfigError


def _lines(table):
    console = Console(width=120, color_system=None)
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().splitlines()
    assert "…" not in capture.get(), "nothing is cut off at 120 columns"
    return lines


def _cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("number", "words"),
    [(0.04617, "0.0462"), (4.617, "4.62"), (46.17, "46.2"), (461.7, "462"), (4617.0, "4617")],
)
def test_three_digits(number, words):
    assert digits(number) == words


def test_cases_share_what_is_equal_and_name_what_is_not():
    rows = [row(), row(batch=8), row(network="fpn_resnet50")]
    cases = by_case([*rows, row(contestant="torch")])
    assert [len(members) for members in cases.values()] == [2, 1, 1]
    shared, names = case_names(cases)
    assert shared == "cpu, 512x512, 59 classes"
    assert list(names.values()) == ["agln_resnet50, batch 1", "agln_resnet50, batch 8", "fpn_resnet50, batch 1"]
    assert case_names([]) == ("", {})


@pytest.mark.parametrize(
    ("ratio", "low", "high", "words"),
    [
        pytest.param(1.52, 1.48, 1.57, "1.52 (1.48–1.57)", id="faster"),
        pytest.param(0.5, 0.48, 0.52, "0.50 (0.48–0.52)", id="slower"),
        pytest.param(1.2, 0.99, 1.4, "≈ 1", id="the range holds 1"),
        pytest.param(1.02, 1.0, 1.04, "≈ 1", id="the range begins at 1"),
        pytest.param(0.98, 0.96, 1.0, "≈ 1", id="the range ends at 1"),
        pytest.param(1.0, 1.0, 1.0, "1", id="the best peer itself"),
        pytest.param(1.52, None, None, "1.52", id="no range"),
        pytest.param(None, None, None, "–", id="not measured"),
    ],
)
def test_ratio_with_its_range(ratio, low, high, words):
    table = markdown_table([row(ratio=ratio, ratio_low=low, ratio_high=high)])
    cells = dict(zip(*map(_cells, (table.splitlines()[-3], table.splitlines()[-1])), strict=True))
    assert cells.get("ratio", "–") == words, "what was not measured is no column"


def test_table_of_rows_fits_120_columns_and_marks_ours():
    lines = _lines(row_table(results().rows))
    assert lines[0].strip() == "cpu, 512x512, batch 1, 59 classes"
    networks = [line.split()[0] for line in lines if line.split() and "resnet" in line.split()[0]]
    assert networks == ["fpn_resnet50", "agln_resnet50", "agln_lite_resnet50"]
    assert sum("▸ planned openvino" in line for line in lines) == 6
    assert not [line for line in lines if "▸" in line and "planned" not in line]
    best = next(line for line in lines if "▸" in line)
    assert " ".join(best.split()) == "▸ planned openvino fp32 256 282 3.91 1.56 (1.50–1.60) 812 171 4 99.996% 59.46"


def test_markup_in_a_name_is_text():
    assert any("[bold]net" in line for line in _lines(row_table([row(contestant="[bold]net")])))


def test_overview_puts_networks_side_by_side():
    ours = row(20.0, contestant="planned", ours=True, ratio=5.0, ratio_low=4.9, ratio_high=5.1)
    rows = [row(100.0), row(50.0, network="fpn_resnet50"), ours]
    lines = markdown_overview(rows).splitlines()
    assert lines[0] == "cpu, 512x512, batch 1, 59 classes"
    assert _cells(lines[2]) == ["contestant", "precision", "agln_resnet50, ms", "ratio", "fpn_resnet50, ms", "ratio"]
    assert _cells(lines[4]) == ["openvino", "fp32", "100", "1", "50.0", "1"]
    assert len(lines) == 5, "what did not run on both networks is not between them"
    wide = _lines(overview_table(results().rows))
    assert sum(line.count("▸") for line in wide) == 2
    assert any(line.split()[:2] == ["onnxruntime", "fp32"] and line.count("0.91") == 3 for line in wide)


def test_markdown_has_a_table_for_each_network_without_empty_cells():
    shared, *parts = markdown_table(results().rows).split("\n\n")
    assert shared == "cpu, 512x512, batch 1, 59 classes"
    assert parts[::2] == ["fpn_resnet50:", "agln_resnet50:", "agln_lite_resnet50:"]
    for table in parts[1::2]:
        header, rule, *lines = map(_cells, table.splitlines())
        assert {"ratio", "mIoU"}.isdisjoint(header), "one of the six has none"
        assert rule.count("---:") == len(header) - 2
        assert len(lines) == 6
        assert all(len(line) == len(header) and all(cell not in ("", "–") for cell in line) for line in lines)
        assert lines[0][0] == "**planned openvino**"


def test_a_bar_in_a_name_does_not_end_the_cell():
    assert "| torch \\| compile |" in markdown_table([row(contestant="torch | compile")])


def test_machine_in_a_line():
    assert machine_line(MACHINE) == "Xeon, 2 threads; python 3.11.7, torch 2.13.0"
    assert machine_line({"gpu": "H100", "cpu": "Xeon", "threads": 1}) == "H100, Xeon, 1 thread"


def test_rungs_multiply_up():
    rungs = ladder_steps(results().ladder)
    assert [rung.name for rung in rungs] == ["openvino, best peer", "fold_batchnorm", "winograd(3)"]
    assert [rung.step for rung in rungs] == pytest.approx([1.0, 2.0, 5.0])
    assert [rung.total for rung in rungs] == pytest.approx([1.0, 2.0, 10.0])


def test_rungs_without_an_effect_are_one():
    """2 % is the least that counts; the last rung is the whole plan, whose time is that of the last row."""
    times = {"peer": 100.0, "a": 99.0, "b": 50.0, "c": 50.5, "d": 49.5}
    rungs = ladder_steps([row(ms, contestant=name) for name, ms in times.items()])
    assert [(rung.name, rung.row.median_ms) for rung in rungs] == [
        ("peer", 100.0),
        ("b", 50.0),
        ("no effect: a, c, d", 49.5),
    ]
    assert rungs[-1].total == pytest.approx(100 / 49.5)


def test_a_ladder_for_each_precision():
    rows = [row(10.0), row(20.0, precision="bf16"), row(5.0, contestant="x", precision="bf16")]
    assert {kind: [r.median_ms for r in members] for (_, kind), members in ladders(rows).items()} == {
        "fp32": [10.0],
        "bf16": [20.0, 5.0],
    }


def test_markdown_ladder():
    _, name, table = markdown_ladder(results().ladder).split("\n\n")
    quality = ["812", "171", "4", "99.996%", "59.46"]
    assert name == "agln_resnet50, fp32:"
    assert [_cells(line) for line in table.splitlines()[2:]] == [
        ["openvino, best peer", "706", "1.00", "1.00", *quality],
        ["**fold_batchnorm**", "353", "2.00", "2.00", *quality],
        ["**winograd(3)**", "70.6", "5.00", "10.00", *quality],
    ]


def test_power_law_is_found():
    x = [1, 2, 4, 8]
    fit = power_law(x, [3 * v**1.5 for v in x])
    assert fit[:3] == pytest.approx((3, 1.5, 1))
    # The line of slope 1 goes through the geometric mean: of 3·x^0.5, with x of mean 2^1.5.
    assert fit.linear == pytest.approx(3 * 2**0.75)
    assert str(fit) == "exponent 1.50, R² 1.000"


def test_r_squared_is_the_explained_share_of_the_variance():
    """u = -1, 0, 1 and v = 0, 1, 0 have no slope: nothing is explained. A constant is explained whole."""
    e = 2.718281828459045
    fit = power_law([1 / e, 1, e], [1, e, 1])
    assert fit.exponent == pytest.approx(0, abs=1e-12)
    assert fit.r_squared == pytest.approx(0, abs=1e-12)
    assert power_law([1, 2, 3], [1, 1, 1]).r_squared == 1


def test_series_over_sizes_are_at_the_smallest_batch_and_over_batches_at_the_size_with_most():
    rows = results().scaling
    sizes, batches = scaling_series(rows, "pixels"), scaling_series(rows, "batch")
    assert [line.name for line in sizes] == ["planned openvino bf16", "openvino fp32"]
    assert sizes[0].x == tuple(side**2 for side in (256, 384, 512, 768, 1024, 1536, 2048))
    assert sizes[0].fit.exponent == pytest.approx(1)
    assert sizes[1].ms[2] == 706
    assert batches[0].x == (1, 2, 4, 8, 16)
    assert batches[0].fit.exponent == pytest.approx(0.5)


def test_series_need_two_points_and_fits_three():
    rows = [row(), row(400.0, size="1024x1024"), row(contestant="torch"), row(network="fpn_resnet50", batch=2)]
    (line,) = scaling_series(rows, "pixels")
    assert (line.name, line.fit) == ("openvino fp32", None)
    assert scaling_series(rows, "batch") == []
    assert scaling_series([], "pixels") == scaling_series([], "batch") == []


def test_series_of_two_networks_are_named():
    rows = [row(batch=batch, network=network) for network in ("a", "b") for batch in (1, 2)]
    assert [line.name for line in scaling_series(rows, "batch")] == ["openvino fp32, a", "openvino fp32, b"]


def test_markdown_scaling():
    rows = [row(100.0 * (side / 256) ** 2, size=f"{side}x{side}") for side in (256, 512, 1024)]
    rows += [row(9.0, contestant="planned", ours=True), row(2.0, contestant="planned", ours=True, size="256x256")]
    lines = markdown_scaling(rows).splitlines()
    assert _cells(lines[0]) == ["ms, batch 1", "256x256", "512x512"]  # what one has not, nobody shows
    assert _cells(lines[2]) == ["openvino fp32", "100", "400"]
    assert _cells(lines[3]) == ["**planned fp32**", "2.00", "9.00"]
    assert len(lines) == 4
    alone = markdown_scaling(rows[:3]).splitlines()
    assert _cells(alone[0]) == ["ms, batch 1", "256x256", "512x512", "1024x1024", "exponent", "R²"]
    assert _cells(alone[2]) == ["openvino fp32", "100", "400", "1600", "1.00", "1.000"]
    batches = markdown_scaling(results().scaling).split("\n\n")[1].splitlines()
    assert _cells(batches[0])[:3] == ["ms, 512x512", "batch 1", "batch 2"]


def _compare(old_ms, new_ms, old_p95=1.0, new_p95=1.0):
    old, new = row(old_ms, p95_ms=old_ms * old_p95), row(new_ms, p95_ms=new_ms * new_p95)
    (change,) = compare(_results(old), _results(new))
    return change


def _results(*rows, **machine):
    return Results(MACHINE | machine, "", "", rows)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        pytest.param((100, 106), "slower", id="6 % without noise"),
        pytest.param((100, 105), "same", id="5 % is the limit"),
        pytest.param((100, 94), "faster", id="6 % less"),
        pytest.param((100, 96), "same", id="4 % less"),
        pytest.param((100, 118, 1.2, 1.0), "same", id="the old one is as noisy"),
        pytest.param((100, 118, 1.0, 1.2), "same", id="the new one is as noisy"),
        pytest.param((100, 122, 1.2, 1.1), "slower", id="more than the noise"),
        pytest.param((100, 84, 1.2, 1.0), "same", id="faster within the noise"),
        pytest.param((100, 82, 1.2, 1.0), "faster", id="faster than the noise"),
    ],
)
def test_a_regression_is_more_than_five_per_cent_and_more_than_the_noise(change, verdict):
    found = _compare(*map(float, change))
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(change[1] / change[0])


def test_rows_that_vanished_or_are_new():
    old = _results(row(), row(precision="bf16"))
    new = _results(row(batch=2), row(precision="bf16"))
    changes = compare(old, new)
    assert [change.verdict for change in changes] == ["gone", "same", "new"]
    assert [(change.old_ms, change.new_ms, change.ratio) for change in changes] == [
        (100, None, None), (100, 100, 1), (None, 100, None),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [
        {"network": "x"}, {"contestant": "x"}, {"precision": "x"}, {"device": "x"}, {"size": "1x1"}, {"batch": 2},
        {"num_classes": 2},
    ],
    ids=lambda other: next(iter(other)),
)  # fmt: skip
def test_only_rows_of_the_same_key_are_compared(other):
    assert [change.verdict for change in compare(_results(row()), _results(row(**other)))] == ["gone", "new"]


def test_two_rows_of_one_key_are_refused():
    with pytest.raises(ConfigError, match="two rows for openvino fp32 on agln_resnet50"):
        compare(_results(row()), _results(row(), row(settings="another")))


def test_other_hardware_is_refused_and_other_versions_are_told():
    old, new = _results(row(), threads=2), _results(row(), threads=4, torch="2.14.0", cuda="13.0")
    with pytest.raises(ConfigError, match="two machines cannot be compared: threads 2, now 4; measure"):
        compare(old, new)
    assert differences(old, new) == ["threads 2, now 4", "torch 2.13.0, now 2.14.0", "cuda none, now 13.0"]
    assert compare(old, new, other_machine=True)[0].verdict == "same"
    assert compare(old, _results(row(), torch="2.14.0"))[0].verdict == "same"


def test_comparison_table():
    old = _results(row(), row(200.0, contestant="torch"), row(30.0, contestant="a"))
    new = _results(row(150.0), row(20.0, contestant="a"), row(contestant="b"), torch="2.14.0")
    text = _lines(comparison_table(compare(old, new), differences(old, new)))
    assert [line.split() for line in text if line.startswith("   ") and line.strip()][:4] == [
        ["openvino", "fp32", "100", "150", "1.50", "10%", "slower"],
        ["torch", "fp32", "200", "–", "–", "–", "gone"],
        ["a", "fp32", "30.0", "20.0", "0.67", "10%", "faster"],
        ["b", "fp32", "–", "100", "–", "–", "new"],
    ]
    assert text[-1].strip() == "not the same: torch 2.13.0, now 2.14.0"
    assert "not the same" not in "".join(_lines(comparison_table(compare(old, replace(new, machine=MACHINE)))))


def test_a_ladder_that_would_be_too_wide_lists_what_had_no_effect_below():
    times = {"peer": 100.0, "a": 99.0, "b": 50.0, "mix(x, y)": 50.5, "d": 49.5}
    rows = [row(ms, contestant=name, ours=name != "peer") for name, ms in times.items()]
    within = markdown_ladder(rows, 200)
    assert within == markdown_ladder(rows)
    assert "| **no effect: a, mix(x, y), d** |" in within
    width = max(map(len, within.splitlines())) - 1
    table, below = markdown_ladder(rows, width).split("\n\n")[-2:]
    assert "| **the rest** |" in table
    assert "".join(below.splitlines()) == "The rest, without effect: a, mix(x, y), d."
