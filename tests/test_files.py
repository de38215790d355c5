"""Files and folders that appear whole or not at all, whatever is killed; and nothing is left of dead processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import nullcontext

import pytest

from agln_fast import files
from agln_fast.errors import BuildError, BundleError, ImageError
from agln_fast.files import is_returning, replacing, scratch_folder, whole_folder

BOTH = pytest.mark.parametrize("swap", [True, False], ids=["one step", "two steps, where the kernel has none"])


@pytest.fixture
def two_steps(swap, monkeypatch):
    if not swap:
        monkeypatch.setattr(files, "_renamed", lambda one, other, flag: False)


def _anything(path):
    """As in a build with --force, which replaces bundles."""
    return True


def _write(folder, text):
    (folder / "a").write_text(text)
    (folder / "inner").mkdir()
    (folder / "inner" / "b").write_text(text)


def _text(folder):
    """The version of a folder, which is the same in all its files."""
    first, second = (folder / "a").read_text(), (folder / "inner" / "b").read_text()
    assert first == second
    return first


@BOTH
def test_a_folder_appears_and_is_replaced(two_steps, tmp_path):
    for text in ("first", "second"):
        with whole_folder(tmp_path / "x", _anything) as folder:
            _write(folder, text)
            assert text == "first" or _text(tmp_path / "x") == "first"
        assert _text(tmp_path / "x") == text
        assert os.listdir(tmp_path) == ["x"]


def test_what_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with whole_folder(tmp_path / "link", _anything) as folder:
        _write(folder, "new")
    assert (tmp_path / "link").is_symlink()
    assert _text(tmp_path / "real") == "new"
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def _fail(destination, error):
    """`error`, in whose text {} is the unfinished folder, while `destination` is written."""
    with whole_folder(destination, _anything) as folder:
        _write(folder, "second")
        error.args = tuple(arg.format(folder) if isinstance(arg, str) else arg for arg in error.args)
        raise error


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (BundleError("{}/a is wrong"), BundleError, "^/.*/x/a is wrong$"),
        (OSError(errno.ENOSPC, "full"), BuildError, "/x: cannot be written .*; free some space"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
    ids=["an error of ours", "a full disk", "an interrupt"],
)
def test_nothing_is_left_of_what_fails(error, raised, message, tmp_path):
    with whole_folder(tmp_path / "x") as folder:
        _write(folder, "first")
    with pytest.raises(raised, match=message):
        _fail(tmp_path / "x", error)
    assert os.listdir(tmp_path) == ["x"]
    assert _text(tmp_path / "x") == "first"


@BOTH
@pytest.mark.parametrize("replaceable", [None, lambda path: (path / "b").exists()], ids=["nothing", "another kind"])
def test_what_appeared_meanwhile_stays(replaceable, two_steps, tmp_path):

    def work():
        with whole_folder(tmp_path / "x", replaceable) as folder:
            _write(folder, "ours")
            (tmp_path / "x").mkdir()
            (tmp_path / "x" / "precious").touch()

    with pytest.raises(BuildError, match="x: appeared during the work, and is not replaced; move it away"):
        work()
    assert os.listdir(tmp_path) == ["x"]
    assert os.listdir(tmp_path / "x") == ["precious"]


@BOTH
def test_what_takes_the_place_after_the_last_look_comes_back(two_steps, tmp_path):
    """The look before the swap sees what may go; what is got by it is another."""
    (tmp_path / "x").mkdir()
    looks = []

    def becomes_another(path):
        looks.append(path)
        if len(looks) == 1:
            (path / "precious").touch()
        return not (path / "precious").exists() or len(looks) == 1

    with pytest.raises(BuildError, match="appeared"), whole_folder(tmp_path / "x", becomes_another) as folder:
        _write(folder, "ours")
    assert os.listdir(tmp_path) == ["x"]
    assert os.listdir(tmp_path / "x") == ["precious"]


def test_errors_of_the_block_about_other_files_stay_what_they_are(tmp_path):
    """Only what concerns the folder is a failure to write it."""
    with pytest.raises(FileNotFoundError), whole_folder(tmp_path / "x"):
        (tmp_path / "image.png").read_bytes()
    with pytest.raises(BuildError, match="x: cannot be written"), whole_folder(tmp_path / "x") as folder:
        (folder / "inner" / "a").touch()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("swap", "call", "remains"),
    [(True, 0, "first"), (False, 0, "first"), (False, 1, "first"), (False, 2, "second")],
    ids=["the only step", "old one moved away", "new one put in its place", "old one given up"],
)
def test_a_folder_stays_whole_where_a_step_of_the_replacement_fails(swap, call, remains, tmp_path, monkeypatch):
    with whole_folder(tmp_path / "x") as folder:
        _write(folder, "first")
    outcomes, rename = [True] * call + [False] + [True] * 9, os.rename

    def fail_once(one, other):
        if not outcomes.pop(0):
            raise OSError(errno.EIO, "Input/output error")
        return rename(one, other)

    def renamed(one, other, flag):
        """As where the kernel cannot swap names, or fails at it."""
        if swap and flag == files._RENAME_NOREPLACE:
            raise FileExistsError(errno.EEXIST, "File exists")
        return swap and fail_once(one, other)

    monkeypatch.setattr(files, "_renamed", renamed)
    monkeypatch.setattr(os, "rename", rename if swap else fail_once)
    with pytest.raises(BuildError, match="Input/output error"), whole_folder(tmp_path / "x", _anything) as folder:
        _write(folder, "second")
    assert os.listdir(tmp_path) == ["x"]
    assert _text(tmp_path / "x") == remains


def test_folders_and_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "x") as folder:
            _write(folder, "text")
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "x", tmp_path / "x" / "inner", tmp_path / "x" / "a")]
    assert modes == [0o750, 0o750, 0o640]


def test_what_lives_is_left_alone(tmp_path):
    """Two builds of one name at once: the last to end stays, and none takes the other for dead."""
    with whole_folder(tmp_path / "x", _anything) as first:
        _write(first, "first")
        with whole_folder(tmp_path / "x") as second:
            _write(second, "second")
            assert _text(first) == "first"
        assert _text(tmp_path / "x") == "second"
    assert _text(tmp_path / "x") == "first"
    assert os.listdir(tmp_path) == ["x"]


def test_what_has_another_name_is_left_alone(tmp_path):
    """Also what has the same beginning, or a lock that is no file."""
    others = [".x.y.0123abcd.lock", ".x.0123abcd.lock.bak", ".x.0123abc.lock", "x.0123abcd.lock"]
    for name in others:
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / ".y.0123abcd.lock")
    (tmp_path / ".x.89abcdef.lock").symlink_to(tmp_path / "x.0123abcd.lock")
    with whole_folder(tmp_path / "x") as folder:
        _write(folder, "text")
    assert sorted(os.listdir(tmp_path)) == sorted([*others, ".y.0123abcd.lock", ".x.89abcdef.lock", "x"])


def test_file_systems_without_locks_will_do(tmp_path, monkeypatch):
    def none(*_args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", none)
    with whole_folder(tmp_path / "x", _anything) as folder, whole_folder(tmp_path / "x") as other:
        _write(folder, "first")
        _write(other, "second")
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize(("code", "raised"), [(errno.EINVAL, None), (errno.EIO, BuildError)], ids=["idle", "failed"])
def test_what_is_not_on_the_disk_is_not_put_in_place(code, raised, tmp_path, monkeypatch):
    """But where there is nothing to do for a folder that is no failure."""

    def refuse(descriptor):
        raise OSError(code, "no")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(raised) if raised else nullcontext(), whole_folder(tmp_path / "x") as folder:
        _write(folder, "text")
    assert os.listdir(tmp_path) == ([] if raised else ["x"])


def _replace(path, text, error=None):
    with replacing(path, ImageError) as part:
        part.write_text(text)
        if error is not None:
            raise error


@pytest.mark.parametrize("name", ["x", "link"])
def test_a_file_appears_and_is_replaced(name, tmp_path):
    (tmp_path / "link").symlink_to("x")
    for text in ("first", "second"):
        with replacing(str(tmp_path / name), ImageError) as part:
            assert (part.parent, part.read_bytes()) == (tmp_path, b"")
            part.write_text(text)
            assert text == "first" or (tmp_path / "x").read_text() == "first"
        assert (tmp_path / "x").read_text() == text
        assert (tmp_path / "link").is_symlink()
        assert sorted(os.listdir(tmp_path)) == ["link", "x"]


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "full"), ImageError, r"/x: cannot be written \(full\); free some space"),
        (OSError(errno.EIO, "broken"), ImageError, r"/x: cannot be written \(broken\); check the folder"),
        (OSError("too wide"), ImageError, r"/x: cannot be written \(too wide\)$"),
        (FileNotFoundError(errno.ENOENT, "no image", "/a.png"), FileNotFoundError, r"no image.*/a\.png"),
        (ValueError("NaN"), ValueError, "^NaN$"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
    ids=["full-disk", "write-that-fails", "library", "another-file", "nothing-of-files", "interrupt"],
)
def test_a_file_that_fails_leaves_the_old_one(error, raised, message, tmp_path):
    _replace(tmp_path / "x", "first")
    with pytest.raises(raised, match=message):
        _replace(tmp_path / "x", "second", error)
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "first"


@pytest.mark.parametrize(("name", "reason"), [("none/x", "No such file"), ("taken", "Is a directory")])
def test_a_place_for_no_file_is_one_clear_error(name, reason, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ImageError, match=rf"{name}: cannot be written \({reason}.*\); check the folder and its perm"):
        _replace(tmp_path / name, "text")
    assert os.listdir(tmp_path) == ["taken"]


def test_a_file_follows_the_umask_and_is_on_the_disk_first(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.append((tmp_path / "x").exists()), fsync(file)))
    before = os.umask(0o027)
    try:
        _replace(tmp_path / "x", "text")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640
    assert synced == [False]


def test_scratch_folders_vanish_and_are_for_their_user_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as folder:
        assert folder.parent == tmp_path
        assert folder.stat().st_mode & 0o777 == 0o700
        with scratch_folder() as other:
            assert folder.exists()
        assert not other.exists()
    assert not os.listdir(tmp_path)


_BEGIN = """
import os, signal, sys
from contextlib import nullcontext, suppress
from pathlib import Path
from agln_fast import files, interruption

place, swap, number = Path(sys.argv[1]), sys.argv[2] == "True", int(sys.argv[3])
target, here = place / "x", files.tempfile
here.tempdir = str(place / "temporary")
os.mkdir(here.tempdir)
renamed, fsync = files._renamed, os.fsync
left = None  # events until the end; None for never


def step(*_):
    global left
    if left is not None:
        left = left - 1 if left else None  # the signal is an event, too
        if left is None:
            os.kill(os.getpid(), number)


def reported(one, other, flag):
    step()
    done = swap and renamed(one, other, flag)
    step()
    return done


# Before every system call that Python reports, and before and after those that it does not.
sys.addaudithook(lambda event, _: step() if event.partition(".")[0] in ("os", "open", "shutil", "fcntl") else None)
files._renamed = reported
os.fsync = lambda descriptor: (step(), fsync(descriptor))


def replace(text):
    with files.scratch_folder() as scratch, files.whole_folder(target, lambda _: True) as folder:
        for path in (scratch / "a", folder / "a", folder / "b"):
            path.write_text(text)
"""

_KILLS = """

def in_a_child(text, after):
    global left
    child = os.fork()
    if child == 0:
        left = after
        replace(text)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def check(texts):
    files.is_returning(target)
    found = [(target / name).read_text() for name in "ab"]
    assert found[0] in texts and found == found[:1] * 2, (found, texts)
    return found[0]


replace("0")
kills = 0
while in_a_child(str(kills + 1), kills):
    at = check({str(kills), str(kills + 1)})
    replace(str(kills + 1))
    assert check({str(kills + 1)})
    assert sorted(os.listdir(place)) == ["temporary", "x"], os.listdir(place)
    assert not os.listdir(here.tempdir)
    kills += 1
print(kills)
"""


@BOTH
def test_a_kill_at_any_moment_leaves_a_whole_version_and_nothing_for_long(swap, tmp_path):
    assert _moments(_KILLS, tmp_path, swap, signal.SIGKILL) > 30


_SIGNALS = """
asked = 0
replace("0")
for number_of_events in range(1000):
    left = number_of_events
    try:
        with interruption.listening() if number == signal.SIGTERM else nullcontext():
            replace(str(number_of_events + 1))
    except KeyboardInterrupt:
        asked += 1
    over, left = left is not None, None
    found = {(target / name).read_text() for name in "ab"}
    assert len(found) == 1 and found <= set(map(str, range(number_of_events + 2))), found
    assert sorted(os.listdir(place)) == ["temporary", "x"], (number_of_events, os.listdir(place))
    assert not os.listdir(here.tempdir), number_of_events
    if over:
        break
assert asked == number_of_events, (asked, number_of_events)
print(asked)
"""


@BOTH
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["command line", "Ctrl-C in any program"])
def test_a_signal_at_any_moment_leaves_a_whole_version_and_nothing_else(swap, number, tmp_path):
    """Also one that comes while it is cleaned up; and it is always raised."""
    assert _moments(_SIGNALS, tmp_path, swap, number) > 30


_FILE = """
def replace(text):
    with files.replacing(target, files.BuildError) as part:
        part.write_text(text)
    with suppress(ValueError), files.replacing(target, files.BuildError) as part:
        part.write_text("wrong")
        raise ValueError


asked = 0
replace("0")
for number_of_events in range(1000):
    left = number_of_events
    try:
        with interruption.listening() if number == signal.SIGTERM else nullcontext():
            replace(str(number_of_events + 1))
    except KeyboardInterrupt:
        asked += 1
    over, left = left is not None, None
    assert target.read_text() in map(str, range(number_of_events + 2))
    assert sorted(os.listdir(place)) == ["temporary", "x"], (number_of_events, os.listdir(place))
    if over:
        break
assert asked == number_of_events, (asked, number_of_events)
print(asked)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["command line", "Ctrl-C in any program"])
def test_a_signal_at_any_moment_leaves_a_whole_file_and_nothing_else(number, tmp_path):
    assert _moments(_FILE, tmp_path, True, number) > 10


def _moments(script, place, swap, number):
    """Run a script that sends itself a signal at every moment there is; how many there were."""
    command = [sys.executable, "-c", _BEGIN + script, str(place), str(swap), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_what_is_simply_missing_does_not_return(tmp_path):
    assert not is_returning(tmp_path / "x")
    assert not is_returning(tmp_path / "no" / "such" / "folder")
