"""Files and folders that appear whole or not at all, and folders for a while.

What dead processes left of folders is removed. A folder that is not finished has a name of its own and, beside it, a
lock file that its process holds. The kernel lets go of the lock when the process ends, however it ends: what has a free
lock is nobody's. The lock lies beside the folder, not in it, because it outlives the folder and must not become part of
it; a lock on the folder itself would do on local disks, but network file systems lock no folders.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from agln_fast import interruption
from agln_fast.errors import AglnError, BuildError

__all__ = ["is_returning", "replacing", "scratch_folder", "whole_folder"]

_SCRATCH = "agln-fast-"
_TOKEN = "[0-9a-f]{8}"
_LOCK, _OLD = ".lock", ".old"
_AT_FDCWD, _RENAME_NOREPLACE, _RENAME_EXCHANGE = -100, 1, 2
_NO_SUCH_RENAME = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)
_TAKEN = (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: str | os.PathLike[str], error: type[AglnError]) -> Iterator[Path]:
    """An empty file beside `path` that takes its place at the end, or vanishes when anything fails.

    It follows the umask, and is on the disk before it takes the place. Where `path` is a link, what it points to is
    replaced. A kill leaves `path` as it was, and beside it at most a hidden file that ends in ".part".

    Raises:
        error: it cannot be written.
        OSError: that of the block, which has nothing to do with the file.
    """
    target = _real(Path(path))
    part, in_block = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part"), False
    try:
        part.touch(exist_ok=False)
        in_block = True
        yield part
        in_block = False
        _sync(part)
        part.replace(target)
    except OSError as reason:
        # Writing to an open file fails without its name.
        if in_block and reason.filename is not None and not _is_about(reason, part):
            raise
        raise error(_cannot_be_written(path, reason)) from None
    finally:
        try:
            part.unlink(missing_ok=True)
        finally:  # a signal that cut the first one short has raised, and does so once
            part.unlink(missing_ok=True)


@contextmanager
def whole_folder(destination: Path, replaceable: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """An empty folder beside `destination` that takes its place at the end, or vanishes when anything fails.

    What bears that name at the end stays, unless `replaceable` says of it that it may be replaced. It can then be read
    at any moment, whatever happens, and is removed when the new one is in its place and on the disk. Folder and files
    follow the umask. What dead processes left beside `destination` is removed first.

    Raises:
        BuildError: it cannot be written, or something is there that is not to be replaced; nothing is left behind.
        OSError: that of the block, which has nothing to do with the folder.
    """
    # Where it is a link, what the link points to is replaced.
    target = _real(destination)
    folder, in_block = target, False
    try:
        with _claim(target.parent, f".{target.name}.", target) as folder:
            folder.mkdir()
            in_block = True
            yield folder
            in_block = False
            _flush(folder)
            with interruption.held():
                _put_in_place(folder, target, replaceable or (lambda _: False))
    except AglnError as error:
        # The folder is gone when the message is read.
        error.args = (str(error).replace(str(folder), str(destination)),)
        raise
    except _TakenError:
        raise BuildError(
            f"{destination}: appeared during the work, and is not replaced; move it away, or choose another name"
        ) from None
    except OSError as error:
        if in_block and not _is_about(error, folder):
            raise
        raise BuildError(_cannot_be_written(destination, error)) from None


@contextmanager
def scratch_folder(inside: Path | None = None) -> Iterator[Path]:
    """An empty folder, for this user alone, in the system's folder for temporary files; removed at the end.

    What dead processes left there is removed first. `inside`: it is a hidden one in that folder, and follows the umask.
    """
    parent, prefix = (inside, f".{_SCRATCH}") if inside else (Path(tempfile.gettempdir()), _SCRATCH)
    with _claim(parent, prefix) as folder:
        folder.mkdir(0o777 if inside else 0o700)
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


class _TakenError(Exception):
    """Something bears the name, and is to keep it."""


@contextmanager
def _claim(parent: Path, prefix: str, target: Path | None = None) -> Iterator[Path]:
    """A free name in `parent` that is this process's; all that bears it at the end is removed."""
    claims: list[tuple[Path, FileIO]] = []
    try:
        with interruption.held():
            _remove_dead(parent, prefix, target)
            claims.append(_free_name(parent, prefix))
        yield claims[0][0]
    finally:
        # A signal may raise before the first call has come to hold it, but does so once.
        try:
            _give_up(claims, target)
        finally:
            _give_up(claims, target)


def _free_name(parent: Path, prefix: str) -> tuple[Path, FileIO]:
    """A name, and its lock."""
    while True:
        name = parent / f"{prefix}{secrets.token_hex(4)}"
        lock = FileIO(os.open(f"{name}{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "r+")
        # Some file systems have no locks: then nobody finds a free one, and nothing of others is ever removed.
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock.fileno()).st_nlink:
            return name, lock
        lock.close()  # another process took it for a dead one's before it was locked


def _give_up(claims: list[tuple[Path, FileIO]], target: Path | None) -> None:
    with interruption.held():
        while claims:
            name, lock = claims.pop()
            with lock:
                _remove(name, target)


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


def _put_in_place(folder: Path, target: Path, replaceable: Callable[[Path], bool]) -> None:
    """Give `folder` the name `target`, and what bore that name the one of `folder`.

    It is looked at before it loses its name, so that a kill can do it no harm, and after it: nobody else changes it
    then, and what came in between gets its name back.

    Raises:
        _TakenError: it is not replaceable.
    """
    if not _took_free_name(folder, target):
        if not replaceable(target):
            raise _TakenError
        if _renamed(folder, target, _RENAME_EXCHANGE):
            if not replaceable(folder):
                _renamed(folder, target, _RENAME_EXCHANGE)
                raise _TakenError
        else:
            old = folder.with_name(folder.name + _OLD)
            os.rename(target, old)
            if not replaceable(old):
                raise _TakenError  # it comes back when the claim is given up
            os.rename(folder, target)
            os.rename(old, folder)
    _sync(target.parent)


def _took_free_name(folder: Path, target: Path) -> bool:
    """Give `folder` the name `target`; False where it is taken."""
    try:
        if not _renamed(folder, target, _RENAME_NOREPLACE):
            if os.path.lexists(target):
                return False
            os.rename(folder, target)  # the only thing that this replaces is an empty folder
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


def _renamed(one: Path, other: Path, flag: int) -> bool:
    """Rename in a way that `os.rename` has not; False where the C library, the kernel or the file system has it not."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_SUCH_RENAME:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _cannot_be_written(path: str | os.PathLike[str], error: OSError) -> str:
    if error.errno is None:  # a library's own, such as for a picture that is too large for its format
        return f"{path}: cannot be written ({error})"
    hint = "free some space" if error.errno in _NO_SPACE else "check the folder and its permissions"
    return f"{path}: cannot be written ({error.strerror}); {hint}"


def _is_about(error: OSError, folder: Path) -> bool:
    """Whether an error is due to the folder, or file: writing to a full disk names no file."""
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return error.errno in _NO_SPACE or any(Path(name).is_relative_to(folder) for name in names)
