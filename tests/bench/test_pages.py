"""Pages are those of the results: written where the markers are, found stale when anything differs."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
from synthetic_rows import results

from agln_fast.bench.pages.fill import FIGURES, PAGES, SECTIONS, fill, main, stale
from agln_fast.bench.pages.presentation import (
    NOTES,
    markdown_ladder,
    markdown_overview,
    markdown_scaling,
    markdown_table,
)
from agln_fast.bench.race.results import save_results
from agln_fast.errors import ConfigError

PICTURES = [f"{FIGURES}/{name}.svg" for name in ("latency", "ladder", "pareto", "scaling")]


def _section(name, content="old\n"):
    return f"<!-- bench:{name} -->\n{content}<!-- /bench -->"


@pytest.fixture
def checkout(tmp_path):
    """Two pages with markers, and the results."""
    root = tmp_path / "checkout"
    (root / "docs").mkdir(parents=True)
    (root / "README.md").write_text(f"# Title\n\n{_section('overview')}\n\nend\n")
    (root / "docs" / "performance.md").write_text("\n".join(map(_section, SECTIONS)))
    save_results(results(), tmp_path / "results.json")
    return root


def _main(checkout, *options):
    return main([str(checkout.parent / "results.json"), "--root", str(checkout), *options])


@pytest.mark.parametrize(
    ("section", "content"),
    [
        ("machine", "Xeon, 2 threads; python 3.11.7, torch 2.13.0; `agln-fast bench`, 2026-01-02."),
        ("overview", f"Medians in ms; {markdown_overview(results().rows).replace(', ms |', ' |')}"),
        ("table", f"{markdown_table(results().rows)}\n\n{textwrap.fill(NOTES, 110, break_on_hyphens=False)}"),
        ("ladder", markdown_ladder(results().ladder)),
        ("scaling", markdown_scaling(results().scaling)),
    ],
)
def test_a_section_is_replaced_and_the_rest_left(section, content):
    filled = fill(f"before\n{_section(section)}\nafter {_section(section)}.", results())
    whole = _section(section, f"\n{content}\n\n")
    assert filled == f"before\n{whole}\nafter {whole}."
    assert fill(filled, results()) == filled


def test_a_page_without_markers_is_left():
    assert fill("text <!-- /bench -->\n<!-- comment -->", results()) == "text <!-- /bench -->\n<!-- comment -->"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(_section("tabel"), "page: unknown section 'tabel'; did you mean 'table'", id="unknown"),
        pytest.param("<!-- bench:table -->\n", "section 'table' has no end: put <!-- /bench -->", id="no end"),
        pytest.param(f"<!-- bench:table -->\n{_section('ladder')}", "section 'table' has no end", id="another first"),
    ],
)
def test_markers_that_are_wrong(text, message):
    with pytest.raises(ConfigError, match=message):
        fill(text, results())


@pytest.mark.parametrize("section", ["overview", "table", "ladder", "scaling"])
def test_a_section_without_rows_is_an_error(section):
    empty = replace(results(), rows=(), ladder=(), scaling=())
    with pytest.raises(ConfigError, match=r"the results have no .*: measure them, or remove the section"):
        fill(_section(section), empty)
    assert "Xeon" in fill(_section("machine"), empty)


def test_stale_pages_are_found_written_and_then_fresh(checkout, capsys):
    before = {name: (checkout / name).read_text() for name in PAGES}
    assert _main(checkout, "--check") == 1
    told = capsys.readouterr().out.splitlines()
    assert told[:-1] == [f"{name}: stale" for name in (*PAGES, *PICTURES)]
    assert told[-1] == f"run: python -m agln_fast.bench.pages.fill {checkout.parent / 'results.json'}"
    assert {name: (checkout / name).read_text() for name in PAGES} == before
    assert not (checkout / FIGURES).exists()

    assert _main(checkout) == 0
    assert capsys.readouterr().out.splitlines() == [f"{name}: written" for name in (*PAGES, *PICTURES)]
    assert (checkout / "README.md").read_text() == fill(before["README.md"], results())
    assert (checkout / PICTURES[0]).read_text().startswith("<?xml")
    assert _main(checkout, "--check") == 0
    assert capsys.readouterr().out == ""

    (checkout / PICTURES[1]).write_text("another")
    assert list(stale(results(), checkout)) == [PICTURES[1]]


def test_only_what_was_measured_is_drawn(checkout):
    (checkout / "README.md").write_text("nothing\n")
    (checkout / "docs" / "performance.md").write_text("nothing\n")
    unscored = tuple(replace(row, miou=None) for row in results().rows)
    assert list(stale(replace(results(), rows=unscored, ladder=(), scaling=()), checkout)) == [PICTURES[0]]
    assert stale(replace(results(), rows=(), ladder=(), scaling=()), checkout) == {}


def test_a_page_that_is_missing(checkout, capsys):
    (checkout / "docs" / "performance.md").unlink()
    assert _main(checkout) == ConfigError.exit_code
    assert "no docs/performance.md: give the checkout as --root" in capsys.readouterr().err
    assert "old" in (checkout / "README.md").read_text()


def test_as_a_command(tmp_path):
    command = [sys.executable, "-m", "agln_fast.bench.pages.fill", tmp_path / "nowhere.json", "--check"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == ConfigError.exit_code
    assert "nowhere.json: cannot be read" in answer.stderr
