"""The command line `agln-fast`: one file per verb."""

from agln_fast.cli.app import main

__all__ = ["main"]
