"""What was done to get a network's weights out of what a file holds: one line for a log, and for `inspect`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from agln_fast.errors import printable

__all__ = ["Account", "several"]

_MOST_SHOWN = 3

_log = logging.getLogger("agln_fast.checkpoint")


@dataclass
class Account:
    """What was opened, left aside, stripped, ignored and converted on the way to the weights.

    place: names of the containers that were opened, from the outside; none if the file is the state dict itself.
    others: the places beside it that hold weights, too.
    asked: whether the place was asked for.
    guessed: whether it was taken because no other place holds weights, not for its name.
    stripped: parts that were taken out of the names of tensors, in the order in which they went.
    ignored: names of entries of losses and counters.
    strangers: how many entries were left out with each first part, because they are no part of the network.
    unused: what else stands beside the weights.
    converted: how many tensors of each type became float32.
    """

    place: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    asked: bool = False
    guessed: bool = False
    stripped: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    strangers: Counter[str] = field(default_factory=Counter)
    unused: list[str] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)

    def log(self, path: str) -> None:
        """Say it to the logger "agln_fast.checkpoint", if there is anything to say.

        It is a warning where another answer was possible, or something was lost; else it is for information.
        """
        lossy = self.guessed or self.ignored or self.strangers or self.converted
        level = logging.WARNING if lossy or (self.others and not self.asked) else logging.INFO
        if text := str(self):
            _log.log(level, "%s: %s", path, text)

    def __str__(self) -> str:
        """One line; empty if the file is a plain state dict in float32."""
        place, remarks = printable(".".join(self.place)), []
        if self.others:
            taken = "as asked" if self.asked else "others with --weights NAME, or weights=NAME"
            remarks.append(
                f"holds weights under {several([place, *self.others])}; those of '{place}' are taken, {taken}"
            )
        elif place:
            remarks.append(f"weights under '{place}'" + (", the only ones that it holds" if self.guessed else ""))
        if self.stripped:
            remarks.append(f"names without {several(dict.fromkeys(f'{part}.' for part in self.stripped))}")
        if self.converted:
            counts = " and ".join(f"{count} tensors of {kind}" for kind, count in self.converted.items())
            remarks.append(f"{counts} converted to float32")
        if self.ignored:
            remarks.append(f"{len(self.ignored)} entries of losses or counters ignored ({_first(self.ignored)})")
        if self.strangers:
            count = self.strangers.total()
            remarks.append(f"{count} entries that are no part of it ignored ({_first([*self.strangers])})")
        if self.unused:
            remarks.append(f"not used: {_first(self.unused)}")
        return "; ".join(remarks)


def several(names: Sequence[str] | dict[str, None]) -> str:
    """'a' and 'b' and 'c', of which only the first ones are shown."""
    shown = [f"'{printable(name)}'" for name in names]
    rest = [f"{len(shown) - _MOST_SHOWN} more"] if len(shown) > _MOST_SHOWN else []
    return " and ".join(shown[:_MOST_SHOWN] + rest)


def _first(names: Sequence[str]) -> str:
    return ", ".join(printable(name) for name in names[:_MOST_SHOWN]) + (", …" if len(names) > _MOST_SHOWN else "")
