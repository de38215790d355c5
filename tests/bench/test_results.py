"""A results file gives back what was saved, and says what is wrong with anything else."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from synthetic_rows import results, row

from agln_fast.bench.race.results import Results, load_results, save_results, write_csv
from agln_fast.bench.race.rows import Row
from agln_fast.errors import ConfigError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.json"


def test_what_was_saved_is_loaded(path):
    saved = results()
    save_results(saved, path)
    assert load_results(path) == saved
    assert json.loads(path.read_text())["rows"][0] == asdict(saved.rows[0])
    assert list(path.parent.iterdir()) == [path]


def test_whole_numbers_are_times_as_well(path):
    save_results(replace(results(), rows=(replace(row(), median_ms=100),)), path)
    assert load_results(path).rows[0].median_ms == 100


def test_a_file_is_written_whole_or_not_at_all(path):
    save_results(results(), path)
    before = path.read_text()
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_results(Results({}, "", "", (row(float("nan")),)), path)
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_missing(tmp_path):
    for write in (lambda path: save_results(results(), path), lambda path: write_csv(results().rows, path)):
        with pytest.raises(ConfigError, match=r"file: cannot be written \(No such file or directory\)"):
            write(tmp_path / "nowhere" / "file")


def test_a_file_that_is_missing_or_no_json(path):
    with pytest.raises(ConfigError, match=r"results\.json: cannot be read: No such file.*; measure again"):
        load_results(path)
    for damaged in (b'{"machine": ', b"\xff\xfe"):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match="is damaged, no JSON"):
            load_results(path)


def _set(*keys, value):
    """The change of a JSON tree at a place; `...` deletes."""

    def change(tree):
        for key in keys[:-1]:
            tree = tree[key]
        if value is ...:
            del tree[keys[-1]]
        else:
            tree[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(_set("rows", value=...), "no results of the suite", id="a part is missing"),
        pytest.param(_set("launch_us", value=1), "no results of the suite", id="a file of another benchmark"),
        pytest.param(_set("machine", value="Xeon"), "machine, command or date is damaged", id="machine"),
        pytest.param(_set("command", value=None), "machine, command or date is damaged", id="command"),
        pytest.param(_set("date", value=2026), "machine, command or date is damaged", id="date"),
        pytest.param(_set("ladder", value={}), "ladder is no list", id="no list"),
        pytest.param(_set("scaling", 3, value=[]), r"scaling\[3\]: is no row", id="no row"),
        pytest.param(_set("rows", 1, "p95_ms", value=...), r"rows\[1\]: without p95_ms", id="an older version"),
        pytest.param(_set("rows", 0, "joules", value=1), r"rows\[0\]: with joules, of another", id="a newer version"),
        pytest.param(_set("rows", 0, "median_ms", value="9"), "median_ms is '9', not float", id="text for a number"),
        pytest.param(_set("rows", 0, "median_ms", value=None), "median_ms is None, not float", id="not optional"),
        pytest.param(_set("rows", 0, "miou", value="9"), r"miou is '9', not float \| None", id="optional, but text"),
        pytest.param(_set("rows", 0, "batch", value=True), "batch is True, not int", id="a bool for a number"),
        pytest.param(_set("rows", 0, "ours", value=1), "ours is 1, not bool", id="a number for a bool"),
    ],
)
def test_what_is_foreign_or_damaged_is_named(path, change, message):
    tree = asdict(results())
    tree = json.loads(json.dumps(tree))
    change(tree)
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=message):
        load_results(path)


def test_json_of_another_kind(path):
    path.write_text("[]")
    with pytest.raises(ConfigError, match="no results of the suite"):
        load_results(path)


def test_csv_has_the_columns_of_row(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [row(settings="LATENCY, f32"), row(miou=None, ours=True)]
    write_csv(rows, path)
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == [field.name for field in fields(Row)]
    assert lines[0] == [str(value) for value in asdict(rows[0]).values()]
    assert lines[1][header.index("miou")] == ""


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[2] / "bench" / "results").glob("*.json")), ids=lambda file: file.name
)
def test_every_file_that_the_project_keeps_is_read(file):
    results = load_results(file)
    assert results.rows
    assert results.machine


def test_results_of_another_kind_are_named(path):
    save_results(replace(results(), rows=(), kind="ablation"), path)
    with pytest.raises(ConfigError, match="unknown kind of results 'ablation'; known: networks"):
        load_results(path, "networks")
