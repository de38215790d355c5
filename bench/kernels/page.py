"""The pages of the docs whose tables are written by a program."""

from __future__ import annotations

from pathlib import Path

from agln_fast.errors import ConfigError

__all__ = ["replace_section"]


def replace_section(page: Path, name: str, text: str) -> None:
    """Put `text` between the lines `<!-- NAME: begin -->` and `<!-- NAME: end -->` of a page.

    Raises:
        ConfigError: the page has no such lines.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
    before, found, rest = page.read_text("utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ConfigError(f"{page}: needs the two lines {begin.strip()} and {end.strip()} for the table")
    page.write_text(f"{before}{begin}\n{text.strip()}\n\n{end}{after}", "utf-8")
