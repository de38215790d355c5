"""The tree of errors with its exit codes; what is chosen by its name is known, or the message helps to find it."""

from __future__ import annotations

from typing import Any

import pytest

from agln_fast import errors
from agln_fast.errors import BundleError, ConfigError, choose

TREE = {
    "AglnError": (Exception, 1),
    "ConfigError": ("AglnError", 2),
    "CheckpointError": ("AglnError", 3),
    "ImageError": ("AglnError", 4),
    "BundleError": ("AglnError", 5),
    "BundleChangedError": ("BundleError", 5),
    "BackendError": ("AglnError", 6),
    "MissingPackageError": ("BackendError", 6),
    "BuildError": ("AglnError", 7),
    "VerificationError": ("BuildError", 8),
    "DatasetError": ("AglnError", 9),
    "TrainingError": ("AglnError", 10),
}
FRUIT = ("apple", "fig")


def test_errors_are_one_tree_with_the_exit_codes_of_the_command_line():
    found = {name: value for name, value in vars(errors).items() if isinstance(value, type) and name in errors.__all__}
    names = {error: name for name, error in found.items()}
    assert {
        name: (names.get(error.__base__, error.__bases__[0]), error.exit_code) for name, error in found.items()
    } == TREE
    assert issubclass(ConfigError, ValueError)


def test_the_known_one_is_returned():
    assert choose("fruit", "fig", FRUIT) is FRUIT[1]
    assert choose("fruit", "fig", iter(FRUIT)) == "fig"


@pytest.mark.parametrize(
    ("value", "options", "message"),
    [
        ("aple", {}, "unknown fruit 'aple'; did you mean 'apple'? known: apple, fig"),
        ("x", {}, "unknown fruit 'x'; known: apple, fig"),
        ("x", {"where": "a.json"}, "a.json: unknown fruit 'x'; known: apple, fig"),
        ("x", {"listed": "list_fruit()"}, "unknown fruit 'x'; known: list_fruit()"),
        (["apple"], {}, "unknown fruit ['apple']; did you mean 'apple'? known: apple, fig"),
        ("\x1b[2J", {}, r"unknown fruit '\x1b[2J'; known: apple, fig"),
        ("x" * 1000, {}, f"unknown fruit '{'x' * 199}…; known: apple, fig"),
    ],
    ids=["close", "far", "in a file", "too many", "another type", "escape sequence", "long"],
)
def test_the_message_helps(value: object, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as raised:
        choose("fruit", value, FRUIT, **options)
    assert str(raised.value) == message


def test_the_class_of_the_error_is_given():
    with pytest.raises(BundleError, match="unknown engine 'x'"):
        choose("engine", "x", FRUIT, error=BundleError)
