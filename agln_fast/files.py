"""Folders that appear whole or not at all, and folders for a while; what a dead process left is removed.

A folder that is not finished has a name of its own and, beside it, a lock file that its process holds. The kernel lets
go of the lock when the process ends, however it ends: what has a free lock is nobody's. The lock lies beside the
folder, not in it, because it outlives the folder and must not become part of it; a lock on the folder itself would do
on local disks, but network file systems lock no folders.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from agln_fast.errors import AglnError, BuildError

__all__ = ["is_returning", "scratch_folder", "whole_folder"]

_SCRATCH = "agln-fast-"
_TOKEN = "[0-9a-f]{8}"
_LOCK, _OLD = ".lock", ".old"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@contextmanager
def whole_folder(destination: Path) -> Iterator[Path]:
    """An empty folder beside `destination` that takes its place at the end, or vanishes when anything fails.

    Another folder may be there under that name: it can be read at any moment, whatever happens, and is removed when
    the new one is in its place and on the disk. Folder and files follow the umask. What dead processes left beside
    `destination` is removed first.

    Raises:
        BuildError: it cannot be written; nothing is left behind.
    """
    # Where it is a link, what the link points to is replaced.
    target = _real(destination)
    folder: Path | None = None
    try:
        with _claim(target.parent, f".{target.name}.", target) as folder:
            folder.mkdir()
            yield folder
            _flush(folder)
            _put_in_place(folder, target)
    except AglnError as error:
        # The folder is gone when the message is read.
        error.args = (str(error).replace(str(folder), str(destination)),)
        raise
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "check the folder and its permissions"
        raise BuildError(f"{destination}: cannot be written ({error}); {hint}") from None


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """An empty folder, for this user alone, in the system's folder for temporary files; removed at the end.

    What dead processes left there is removed first.
    """
    with _claim(Path(tempfile.gettempdir()), _SCRATCH) as folder:
        folder.mkdir(0o700)
        yield folder


def is_returning(destination: Path) -> bool:
    """Whether `destination`, which is missing, is in the midst of a replacement that needs two steps, so that it is
    worth to look again.

    A process that died between the two has left the old folder under another name: it gets its own back here.
    """
    target = _real(destination)
    prefix = f".{target.name}."
    if not any(re.fullmatch(re.escape(prefix) + _TOKEN + _OLD, name) for name in _names(target.parent)):
        return target.exists()
    _remove_dead(target.parent, prefix, target)
    return True


@contextmanager
def _claim(parent: Path, prefix: str, target: Path | None = None) -> Iterator[Path]:
    """A free name in `parent` that is this process's; all that bears it at the end is removed."""
    _remove_dead(parent, prefix, target)
    while True:
        name = parent / f"{prefix}{secrets.token_hex(4)}"
        lock = os.open(f"{name}{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        # Some file systems have no locks: then nobody finds a free one, and nothing of others is ever removed.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink:
            break
        os.close(lock)  # another process took it for a dead one's before it was locked
    try:
        yield name
    finally:
        _remove(name, target)
        os.close(lock)


def _remove_dead(parent: Path, prefix: str, target: Path | None) -> None:
    for file in _names(parent):
        if not re.fullmatch(re.escape(prefix) + _TOKEN + _LOCK, file):
            continue
        with suppress(OSError):  # gone meanwhile, or another user's
            lock = os.open(parent / file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(lock).st_nlink:
                    _remove(parent / file.removesuffix(_LOCK), target)
            finally:
                os.close(lock)


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _remove(name: Path, target: Path | None) -> None:
    """Remove `name` and what goes with it, the lock last; a target that was moved away and not replaced comes back."""
    old = name.with_name(name.name + _OLD)
    if target is not None and old.exists() and not target.exists():
        os.rename(old, target)
    for folder in (name, old):
        shutil.rmtree(folder, ignore_errors=True)
    if not (name.exists() or old.exists()):
        with suppress(OSError):
            os.unlink(f"{name}{_LOCK}")


def _flush(folder: Path) -> None:
    """Put a folder and all that is in it on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have nothing to do for a folder
            raise
    finally:
        os.close(descriptor)


def _put_in_place(folder: Path, target: Path) -> None:
    """Give `folder` the name `target`, and what bore that name the one of `folder`."""
    if not target.exists():
        os.rename(folder, target)
    elif not _exchange(folder, target):
        old = folder.with_name(folder.name + _OLD)
        os.rename(target, old)
        os.rename(folder, target)
        os.rename(old, folder)
    _sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the C library, the kernel or the file system has no such step."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
