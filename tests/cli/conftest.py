"""The command line, run in this process."""

from __future__ import annotations

import sys

import pytest

from agln_fast.cli import main


@pytest.fixture
def cli(monkeypatch, capsys):
    """`cli("run", …)` returns exit code, standard output and standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["agln-fast", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
