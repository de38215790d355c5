"""Signals, each in a process of its own: they go to the whole process, and this one has other tests to run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_BEGIN = """
import ctypes, os, signal, sys
from pathlib import Path
from agln_fast import interruption

# Who runs the tests may ignore some, as `nohup` does.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)

def ask(number=int(sys.argv[1])):
    os.kill(os.getpid(), number)

class Asks:
    def __del__(self):
        ask()

def in_a_finaliser():
    Asks()

def in_a_callback():
    ctypes.CFUNCTYPE(None)(ask)()

def behind_an_except():
    try:
        ask()
    except BaseException:
        pass
"""


def run(script: str, number: int = signal.SIGTERM, *arguments: str, **options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", _BEGIN + script, str(int(number)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_the_first_signal_raises_where_the_program_is(number: signal.Signals) -> None:
    done = run(
        """
with interruption.listening():
    try:
        ask()
    except KeyboardInterrupt as interrupted:
        print(interrupted.number, interrupted.exit_code, interruption.noted().number)
""",
        number,
    )
    assert (done.stdout.split(), done.stderr) == ([str(number.value), str(128 + number), str(number.value)], "")


@pytest.mark.parametrize("way", ["in_a_finaliser", "in_a_callback", "behind_an_except"])
def test_a_signal_whose_exception_is_lost_is_raised_by_every_check_after_it(way: str) -> None:
    done = run(
        f"""
with interruption.listening():
    interruption.check()
    {way}()
    for _ in range(2):
        try:
            interruption.check()
        except interruption.Interrupted as interrupted:
            print(interrupted.exit_code)
"""
    )
    assert (done.stdout.split(), done.stderr) == (["143", "143"], "")


def test_other_exceptions_that_are_lost_are_still_told() -> None:
    done = run("with interruption.listening():\n    ctypes.CFUNCTYPE(None)(lambda: 1 / 0)()")
    assert "ZeroDivisionError" in done.stderr


def test_nothing_is_installed_before_and_left_behind() -> None:
    """Nor does `check` see what came to somebody else's handlers."""
    done = run(
        """
state = lambda: [*map(signal.getsignal, interruption._SIGNALS), sys.unraisablehook]
before = state()
with interruption.listening():
    try: ask()
    except interruption.Interrupted: pass
print(state() == before, signal.set_wakeup_fd(-1), interruption.noted())
interruption.check()
signal.signal(signal.SIGTERM, lambda *_: print("theirs"))
ask()
interruption.check()
"""
    )
    assert done.stdout.split() == ["True", "-1", "None", "theirs"], done.stderr


def test_what_is_ignored_stays_ignored() -> None:
    """As `nohup` wants it."""
    done = run(
        """
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with interruption.listening():
    ask()
    interruption.check()
print("went on")
""",
        signal.SIGHUP,
    )
    assert done.stdout == "went on\n", done.stderr


def test_a_signal_to_a_child_is_the_childs_own() -> None:
    done = run(
        """
with interruption.listening():
    child = os.fork()
    if not child:
        ask()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), interruption.noted())
"""
    )
    assert done.stdout.split() == [str(-signal.SIGTERM), "None"], done.stderr


def test_a_request_that_arrives_twice_is_one() -> None:
    """`timeout` signals its child, and then the group that the child is in."""
    done = run(
        """
with interruption.listening():
    try:
        ask()
    finally:
        behind_an_except()
        print("cleaned up", flush=True)
"""
    )
    assert done.stdout == "cleaned up\n"


_STUCK = """
import hashlib
with interruption.listening():
    while True:
        try:
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        except KeyboardInterrupt:
            pass
"""


def test_a_second_signal_ends_what_is_stuck_in_a_library() -> None:
    command = [sys.executable, "-c", _BEGIN + _STUCK, "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        for _ in range(100):
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(0.1)
                break
            except subprocess.TimeoutExpired:
                continue
        else:
            process.kill()
        assert (process.returncode, process.stderr.read()) == (
            143,
            "interrupted again: ended at once, nothing was cleaned up\n",
        )


@pytest.mark.parametrize("listening", [True, False], ids=["listening", "alone"])
def test_deferred_signals_cancel_and_raise_at_the_end(listening: bool) -> None:
    """Ctrl-C does in every program, other signals where they are listened for."""
    block = """
    try:
        with interruption.deferred(lambda: print("cancel")):
            ask()
            print("went on")
    except KeyboardInterrupt:
        print("raised")
"""
    begin = "with interruption.listening():" if listening else "if True:"
    done = run(begin + block, signal.SIGTERM if listening else signal.SIGINT)
    assert done.stdout.split("\n")[:-1] == ["cancel", "went on", "raised"], done.stderr


@pytest.mark.parametrize("listening", [True, False], ids=["listening", "alone"])
def test_held_signals_wait_for_the_end_of_the_block(listening: bool) -> None:
    """Also on leaving it with an error; then all is as before."""
    block = """
    before = [*map(signal.getsignal, interruption._SIGNALS)]
    for fails in (False, True):
        try:
            with interruption.held():
                ask()
                print("went on")
                fails and 1 / 0
        except KeyboardInterrupt:
            print("raised")
        except ZeroDivisionError:
            print("failed")
    print([*map(signal.getsignal, interruption._SIGNALS)] == before)
"""
    begin = "with interruption.listening():" if listening else "if True:"
    done = run(begin + block, signal.SIGTERM if listening else signal.SIGINT)
    # The second signal is no news where the first was noted.
    last = "failed" if listening else "raised"
    assert done.stdout.split("\n")[:-1] == ["went on", "raised", "went on", last, "True"], done.stderr


def test_deferring_after_a_lost_signal_raises_at_once() -> None:
    done = run(
        """
with interruption.listening():
    in_a_callback()
    try:
        with interruption.deferred(lambda: None):
            print("begun")
    except KeyboardInterrupt:
        print("raised")
"""
    )
    assert done.stdout == "raised\n", done.stderr


_BUILD = """
from agln_fast.cli import main
from agln_fast.runtime import references

pack = references.pack

def lose_a_signal_and_pack(*arguments):
    if interruption.noted() is None:
        in_a_callback()
    return pack(*arguments)

references.pack = lose_a_signal_and_pack
checkpoint, bundle = sys.argv[2:]
sys.argv[1:] = ["build", checkpoint, "-o", bundle, "--size", "64x64", "--precision", "fp32", "--target", "cuda"]
main()
"""


def test_a_build_ends_although_the_exception_was_lost(small_checkpoint: Path, tmp_path: Path) -> None:
    """And leaves nothing, neither where the bundle should be nor among the temporary files."""
    for name in ("bundles", "temporary"):
        (tmp_path / name).mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    done = run(_BUILD, signal.SIGHUP, str(small_checkpoint), str(tmp_path / "bundles" / "small.agln"), env=environment)
    left = sorted(path.name for path in tmp_path.rglob("*"))
    assert (done.returncode, left) == (129, ["bundles", "temporary"]), done.stderr
    assert done.stderr.splitlines()[-1] == "interrupted by SIGHUP"


def test_a_second_signal_leaves_a_terminal_with_its_cursor() -> None:
    """A progress bar hides it, and has no time to show it again."""
    main, terminal = os.openpty()
    command = [sys.executable, "-c", _BEGIN + _STUCK, "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.1)
    assert os.read(main, 100).startswith(b"\x1b[?25hinterrupted again")
    os.close(main)
    os.close(terminal)


def test_a_handler_that_is_not_pythons_stays() -> None:
    done = run(
        """
real = signal.getsignal
signal.getsignal = lambda number: None if number == signal.SIGHUP else real(number)
with interruption.listening():
    print(real(signal.SIGHUP) is signal.SIG_DFL)
print("ended")
"""
    )
    assert done.stdout.split() == ["True", "ended"], done.stderr


def test_a_signal_at_the_very_end_is_no_traceback() -> None:
    """When the verb is through, and nothing but the listening is left to end."""
    done = run(
        """
from agln_fast.cli import main
real = signal.set_wakeup_fd

def ask_and_set(descriptor, **options):
    if descriptor == -1:
        ask()
    return real(descriptor, **options)

signal.set_wakeup_fd = ask_and_set
sys.argv[1:] = ["--version"]
main()
"""
    )
    assert (done.returncode, done.stderr) == (143, "interrupted by SIGTERM\n")
