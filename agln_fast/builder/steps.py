"""The steps of a build, announced: which one of how many, and about how long it takes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rich.progress import Progress

from agln_fast import interruption

__all__ = ["Steps", "about"]

_log = logging.getLogger("agln_fast.build")


class Steps:
    """Shows the step that runs in the caller's progress display; without a terminal, a line for each on its console.

    Without a display the lines go to the logger "agln_fast.build", level INFO.
    """

    def __init__(self, progress: Progress | None, agenda: Sequence[str]) -> None:
        """`agenda` names all steps in their order."""
        self._progress = progress
        self._agenda = list(agenda)
        self._task = None if progress is None else progress.add_task("", total=len(self._agenda))

    def start(self, name: str, expected: str = "") -> None:
        """The step `name` begins; `expected` is its time, in words.

        Raises:
            Interrupted: a signal asked the program to end.
        """
        interruption.check()
        number = self._agenda.index(name)
        line = f"[{number + 1}/{len(self._agenda)}] {name}{expected and f', {expected}'}"
        if self._progress is None or self._task is None:
            _log.info("%s", line)
        elif self._progress.disable:
            self._progress.console.print(line, markup=False, highlight=False)
        else:
            self._progress.update(self._task, description=line.replace("[", r"\["), completed=number)

    def finish(self) -> None:
        """All is done.

        Raises:
            Interrupted: a signal asked the program to end.
        """
        interruption.check()
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description="done", completed=len(self._agenda))


def about(seconds: float) -> str:
    """`about 8 s`, `about 2 min`."""
    return f"about {max(1, round(seconds))} s" if seconds < 90 else f"about {round(seconds / 60)} min"
