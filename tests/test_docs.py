"""The pages keep to their own rules, and what they name is there."""

from __future__ import annotations

import re
import tomllib
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.main import get_command

from agln_fast.bench.pages.fill import PAGES as FILLED
from agln_fast.bench.pages.fill import fill
from agln_fast.bench.race.results import load_results
from agln_fast.cli.app import app
from agln_fast.engines import KINDS
from agln_fast.manifest import SCHEMA_VERSION
from agln_fast.plan.plan import Plan

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "agln_fast" / "checkpoints" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# Names that are no modules: loggers, and keys of a safetensors file and of ONNX files.
LOGGERS = {"agln_fast.checkpoint", "agln_fast.images", "agln_fast.tensorrt"}
KEYS = {f"agln_fast.{name}" for name in ("classes", "config", "contract", "created_with", "model", "palette")}
OTHERS = {"voc_aug.py", "pascal_context.py"}  # scripts of mmsegmentation
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TOOLS = "".join(path.read_text("utf-8") for path in sorted((ROOT / "bench").rglob("*.py")))
RESULTS = load_results(ROOT / "bench" / "results" / "suite-amd-epyc-avx512-2core-512.json", "networks")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """Without code."""
    return FENCE.sub("", page.read_text("utf-8"))


def tables(page: Path) -> list[list[str]]:
    """The cells of each row, but of the line of dashes."""
    rows = [line for line in prose(page).splitlines() if line.startswith("|")]
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip().strip("|"))]
        for row in rows
        if not re.fullmatch(r"[|\s:-]+", row)
    ]


def commands(page: Path) -> list[list[str]]:
    """The words of each command line, joined where it is continued, without what a shell takes for a comment.

    Those between backquotes, too; `A && B` are two.
    """
    consoles = [code for language, code in FENCE.findall(page.read_text("utf-8")) if language == "console"]
    lines = "".join(consoles).replace("\\\n", " ").splitlines()
    typed = [line[2:].partition(" #")[0] for line in lines if line.startswith("$ ")]
    quoted = [code for code in re.findall(r"`([^`]+)`", prose(page)) if re.match(r"(agln-fast|python -m|make) ", code)]
    return [part.split() for line in (*typed, *quoted) for part in line.split(" && ")]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


@every_page
def test_lines_are_short(page):
    long = [(n, line) for n, line in enumerate(page.read_text("utf-8").splitlines(), 1) if len(line) > 110]
    assert not long


@every_page
def test_no_merge_is_left_open(page):
    assert not re.search(r"^(<<<<<<<|=======$|>>>>>>>)", page.read_text("utf-8"), re.MULTILINE)


@every_page
def test_tables_have_no_empty_and_no_crowded_cell(page):
    for row in tables(page):
        assert all(cell and cell != "–" for cell in row), row
        assert max(map(len, row)) <= 120, row


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose(page)):
        target = "".join(target)
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = page.parent / path if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


@every_page
def test_files_and_modules_are_there(page):
    """What stands in backquotes and looks like a path of the project, or like a name of the package."""
    for name in re.findall(r"`([^`\s]+)`", prose(page)):
        if re.fullmatch(r"(agln_fast|kernels|export|bench|tests|docs)/[\w./-]*", name) and "NAME" not in name:
            assert (ROOT / name).exists(), name
        if re.fullmatch(r"[\w./-]+\.(py|sh)", name) and name not in OTHERS and "NAME" not in name:
            assert list(ROOT.glob(f"*/**/{name}")) or (ROOT / name).exists(), name
        if match := re.match(r"agln_fast((?:\.\w+)+)", name):
            parts = match[1].split(".")[1:]
            assert name in LOGGERS | KEYS or known(parts), name


def known(parts: list[str]) -> bool:
    """Whether `agln_fast.A.B` is a module, or something in one."""
    for count in range(len(parts), -1, -1):
        name = ".".join(["agln_fast", *parts[:count]])
        try:
            there = find_spec(name) is not None
        except ModuleNotFoundError:
            there = False
        if there:
            value = import_module(name)
            for part in parts[count:]:
                if not hasattr(value, part):
                    return False
                value = getattr(value, part)
            return True
    return False


@every_page
def test_commands_and_their_options_are_there(page):
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    for words in commands(page):
        if "agln-fast" in words and len(words) > words.index("agln-fast") + 1:
            verb, *rest = words[words.index("agln-fast") + 1 :]
            if verb.startswith("-") or verb in ("...", "…"):
                continue
            assert verb in verbs, words
            options = {name for option in verbs[verb].params for name in (*option.opts, *option.secondary_opts)}
            for word in rest[: rest.index("|") if "|" in rest else None]:
                if word.startswith("-") and not re.fullmatch(r"-[\d.]+", word):
                    assert word.partition("=")[0] in {*options, "--help", "--debug"}, words
        elif words[:2] == ["python", "-m"]:
            assert words[2] == "pytest" or known(words[2].split(".")[1:]), words
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", MAKEFILE, re.MULTILINE), words


@every_page
def test_options_are_there(page):
    """What stands alone in backquotes: of a verb, or of a tool of ours."""
    verbs = get_command(app).commands.values()  # type: ignore[attr-defined]
    ours = {name for verb in verbs for option in verb.params for name in (*option.opts, *option.secondary_opts)}
    for option in re.findall(r"`(--[a-z][\w-]*)", prose(page)):
        assert option in {*ours, "--help", "--debug", "--version"} or f'"{option}"' in TOOLS, option


@every_page
def test_names_in_code_are_there(page):
    for language, code in FENCE.findall(page.read_text("utf-8")):
        if language == "python":
            for name in re.findall(r"\bagln_fast((?:\.\w+)+)", code):
                assert known(name.split(".")[1:]), name


def test_the_layers_are_those_of_the_contract():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    told = next(code for _, code in FENCE.findall(page) if code.startswith("cli\n"))
    assert [line.partition("  ")[0] for line in told.splitlines()] == contracts[0]["layers"]


def test_the_readme_has_every_kind_of_engine():
    rows = {row[0].strip("`"): row for row in tables(ROOT / "README.md") if row[0].startswith("`")}
    assert set(rows) == set(KINDS)
    for name, kind in KINDS.items():
        _, runs_on, precisions, _ = rows[name]
        assert {word.lower() for word in re.findall(r"CPU|CUDA", runs_on)} == set(kind.devices)
        assert set(precisions.split(", ")) == set(kind.precisions)


@every_page
def test_plans_are_as_they_are_written(page):
    for forms in re.findall(r"mix_before_upsample\(([^)]*)\)", page.read_text("utf-8")):
        mix = tuple(re.split(r", ?", forms))
        assert f"mix_before_upsample({forms})" in str(Plan(fold_batchnorm=True, mix_before_upsample=mix))


def test_the_schema_of_the_manifest_is_this_one():
    page = (ROOT / "docs" / "bundle.md").read_text("utf-8")
    assert set(re.findall(r"(?:of schema version|this one reads|this agln-fast reads) (\d+)", page)) == {
        str(SCHEMA_VERSION)
    }
    assert f"- `schema_version`\n  - type: {SCHEMA_VERSION}\n" in page


def _filled(tmp_path: Path, name: str, **changed: object) -> Path:
    """A page filled with stored results, of which something is `changed`."""
    page = tmp_path / Path(name).name
    page.write_text(fill((ROOT / name).read_text("utf-8"), replace(RESULTS, **changed)), "utf-8")
    return page


@pytest.mark.parametrize("name", FILLED)
def test_filled_pages_keep_to_the_rules(tmp_path, name):
    """Also where no rung of the ladder has an effect, so that one line stands for all."""
    flat = tuple(replace(rung, median_ms=RESULTS.ladder[0].median_ms) for rung in RESULTS.ladder)
    for changed in ({}, {"ladder": flat}):
        page = _filled(tmp_path, name, **changed)
        test_lines_are_short(page)
        test_tables_have_no_empty_and_no_crowded_cell(page)
    for rung in RESULTS.ladder[1:]:
        assert name != "docs/performance.md" or rung.contestant in page.read_text("utf-8")
