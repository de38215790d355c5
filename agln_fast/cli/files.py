"""Text files that options name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from agln_fast.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from agln_fast.plan.plan import Plan

__all__ = ["read_plan", "read_text"]


def read_plan(option: str) -> Literal["auto", "none"] | Plan:
    """What `--plan` stands for: one of the two words, or the plan in a JSON file.

    Raises:
        ConfigError: no such file, or no plan in it.
    """
    from agln_fast.plan.plan import Plan

    words: tuple[Literal["auto", "none"], ...] = ("auto", "none")
    for word in words:
        if option == word:
            return word
    hint = did_you_mean(option, words)
    return Plan.from_json(read_text(Path(option), f"plan {option}", f"{hint}; give auto, none, or a JSON file"))


def read_text(path: Path, name: str = "", advice: str = "") -> str:
    """The text of a file, which a message calls `name`.

    Raises:
        ConfigError: it cannot be read; `advice` ends the message.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name or path}: cannot be read ({error}){advice}") from None
