"""The bundle: a folder NAME.agln with weights, engines and the manifest that describes them.

`SHA256SUMS` lists every file of the bundle (`sha256sum -c` reads it), so a change of any byte is noticed on opening.
Afterwards files are read by `Bundle.read` alone, which gives no bytes but those that the manifest in memory describes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from agln_fast.artefact import Artefact
from agln_fast.errors import BundleChangedError, BundleError, choose, did_you_mean, printable
from agln_fast.files import is_returning
from agln_fast.manifest import (
    LARGEST,
    REBUILD,
    EngineRecord,
    Manifest,
    check_plain,
    format_manifest,
    parse_manifest,
)

__all__ = ["SEALS", "Bundle", "is_bundle", "open_bundle", "read_manifest", "seal", "unreadable"]

_MANIFEST = "manifest.json"
_SUMS = "SHA256SUMS"
SEALS = (_MANIFEST, _SUMS)
"""The files of a bundle that its manifest does not list."""
# Gone, on a server that has another now, or no regular file, which `_regular` says.
_ANOTHER = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.ELOOP, errno.ENXIO, errno.EINVAL)
_LONGEST = 1200  # characters of a message
_ATTEMPTS, _PAUSE_S = 50, 0.01


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, and its manifest. Every file's hash was checked when it was opened."""

    path: Path
    manifest: Manifest

    def engine(self, name: str) -> EngineRecord:
        """The engine called `name`.

        Raises:
            BundleError: there is none; the message lists those that there are.
        """
        engines = {engine.name: engine for engine in self.manifest.engines}
        return engines[choose("engine", name, engines, where=str(self.path), error=BundleError)]

    def matching(self, backend: str = "auto", precision: str | None = None) -> tuple[EngineRecord, ...]:
        """The engines of `backend` ("auto" for any) in `precision` (None for any); at least one.

        Raises:
            BundleError: there is none; the message lists those that there are.
        """
        engines = tuple(
            engine
            for engine in self.manifest.engines
            if backend in ("auto", engine.backend) and precision in (None, engine.precision)
        )
        if not engines:
            known = [engine.name for engine in self.manifest.engines]
            wanted = f"{backend} engine" + (f" in {precision}" if precision else "")
            raise BundleError(f"{self.path}: no {wanted}{did_you_mean(backend, known)}; it has {', '.join(known)}")
        return engines

    def artefact(self, name: str) -> Artefact:
        """What the engine called `name` is opened from; its files are read by `read`.

        Raises:
            BundleError: there is none.
        """
        engine, manifest = self.engine(name), self.manifest
        return Artefact(
            name=name,
            kind=engine.backend,
            precision=engine.precision,
            file=self.path / engine.file,
            contract=manifest.contract,
            model=manifest.model,
            plan=engine.plan,
            versions=engine.versions,
            compute_capabilities=engine.compute_capabilities,
            floating=engine.floating,
            read=self._read,
        )

    def _read(self, file: Path) -> bytes:
        return self.read(file.relative_to(self.path).as_posix())

    def read(self, name: str) -> bytes:
        """The file `name`, read once: the bytes returned are those whose hash was compared with the manifest's.

        Raises:
            BundleError: the manifest does not list it, or it cannot be read.
            BundleChangedError: it is not there any more, or not what it was when the bundle was opened.
        """
        hashes = self.manifest.files
        if name not in hashes:
            raise BundleError(f"{self.path}: the manifest gives no hash for {name}; {REBUILD}")
        try:
            with _regular(self.path / name) as file:
                data = file.read()
        except OSError as error:
            if error.errno not in _ANOTHER:
                raise unreadable(self.path / name, error) from None
            raise BundleChangedError(f"{self.path / name}: cannot be read any more ({error}); open it again") from None
        if hashlib.sha256(data).hexdigest() != hashes[name]:
            raise BundleChangedError(f"{self.path}: {name} was changed since the bundle was opened; open it again")
        return data


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Write `manifest.json`, with the sha256 of every file of `folder` in it, and `SHA256SUMS`; return the manifest.

    Raises:
        BundleError: it would not open again, and nothing is written.
    """
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    values = replace(manifest, files=files).to_dict()
    manifest = Manifest.from_dict(parse_manifest(format_manifest(values)))
    (folder / _MANIFEST).write_bytes(format_manifest(values))
    (folder / _SUMS).write_text(_sums({**files, _MANIFEST: _sha256(folder / _MANIFEST)}))
    return manifest


def open_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Open a bundle and check every byte of it against its hashes.

    Where it is replaced meanwhile, it is the old one or the new one, never a part of each.

    Raises:
        BundleError: no such folder, not a bundle, a missing, changed or unlisted file, another schema version, or a
            value in the manifest that makes no sense.
    """
    path = Path(path)
    for _ in range(_ATTEMPTS):
        try:
            bundle = _open(path)
        except OSError as error:
            raise unreadable(path, error) from None
        if bundle is not None:
            return bundle
    raise BundleError(f"{path}: is replaced again and again while it is opened; wait for the builds to end")


def _open(path: Path) -> Bundle | None:
    """None where it is worth to try again, because the folder was replaced in the meantime."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        if path.is_dir() or (not path.exists() and is_returning(path)):
            time.sleep(_PAUSE_S)
            return None
        what = "not a folder" if path.exists() else "no such bundle"
        raise BundleError(f"{path}: {what}; a bundle is the folder NAME.agln that `agln-fast build` writes") from None
    try:
        return Bundle(path, _check(folder, path))
    except (BundleError, OSError) as error:
        if not _is_at(path, folder):
            return None
        if isinstance(error, BundleError):
            raise BundleError(f"{path}: {printable(error, _LONGEST)}") from None
        raise
    finally:
        os.close(folder)


def _is_at(path: Path, folder: int) -> bool:
    """Whether `path` is the name of the folder that was opened."""
    try:
        return os.path.samestat(os.fstat(folder), path.stat())
    except OSError:
        return False


def _check(folder: int, path: Path) -> Manifest:
    """The manifest of the bundle in a folder's descriptor, through which all is read: its name may be another's by now.

    `path` is only named in messages.

    Raises:
        BundleError: the message does not name the folder.
    """
    names = set(_walk(folder))
    for name in (_MANIFEST, _SUMS):
        if name not in names:
            raise BundleError(f"not a bundle, or a damaged one: there is no {name}; {REBUILD}")
    with _regular(_MANIFEST, folder) as file:
        text = file.read(LARGEST + 1)
    manifest = Manifest.from_dict(parse_manifest(text), path)
    needed = [name for engine in manifest.engines for name in engine.files if name not in manifest.files]
    if needed:
        raise BundleError(f"the manifest gives no hash for {needed[0]}; {REBUILD}")
    actual = {_MANIFEST: hashlib.sha256(text).hexdigest()}
    for name, expected in manifest.files.items():
        try:
            actual[name] = _sha256(name, folder)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(f"{name} is missing; copy the bundle again or {REBUILD}") from None
        if actual[name] != expected:
            raise BundleError(f"{name} was changed after the build; copy the bundle again or {REBUILD}")
    sums = _sums(actual).encode()
    with _regular(_SUMS, folder) as file:
        if file.read(len(sums) + 1) != sums:
            raise BundleError(f"manifest.json or {_SUMS} was changed after the build; copy it again or {REBUILD}")
    unlisted = sorted(names - {*manifest.files, _MANIFEST, _SUMS})
    if unlisted:
        raise BundleError(f"{printable(unlisted[0])} is not in the manifest; move it out of the bundle's folder")
    return manifest


def _walk(folder: int) -> Iterator[str]:
    """Every file in the folder and those in it. What has a hidden name is not ours, and read by nobody: file managers
    and network file systems put such there."""
    for where, folders, files, _ in os.fwalk(dir_fd=folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (PurePosixPath(where, name).as_posix() for name in files if not name.startswith("."))


def _raise(error: OSError) -> NoReturn:
    raise error


def _regular(name: str | Path, folder: int | None = None) -> BufferedReader:
    """Open a file to read it, in the folder of that descriptor; pipes and devices, which may block, are not opened."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(name))
    return open(descriptor, "rb")


def unreadable(path: Path, error: OSError) -> BundleError:
    """What to raise where a bundle, or a file of it, is there and cannot be read."""
    hint = {
        errno.EMFILE: "raise the limit of open files (`ulimit -n`), or close some",
        errno.ENFILE: "close some files: the system has too many open",
        errno.EIO: "copy the bundle again",
        errno.ENOMEM: "free some memory",
    }.get(error.errno or 0, "check its permissions")
    return BundleError(f"{path}: cannot be read ({printable(error)}); {hint}")


def is_bundle(path: Path) -> bool:
    """Whether a bundle is at `path`, sound or not."""
    return (path / _MANIFEST).is_file()


def read_manifest(path: Path) -> Any:
    """What `manifest.json` of the bundle at `path` holds, of whatever schema.

    Raises:
        BundleError: not a bundle, or no JSON.
        OSError: it cannot be read.
    """
    if not path.is_dir():
        what = "not a folder" if path.exists() else "no such bundle"
        raise BundleError(f"{path}: {what}; a bundle is the folder NAME.agln that `agln-fast build` writes")
    try:
        with _regular(path / _MANIFEST) as file:
            values = parse_manifest(file.read(LARGEST + 1))
        check_plain(values)
        return values
    except FileNotFoundError:
        raise BundleError(f"{path}: not a bundle, or a damaged one: there is no {_MANIFEST}; {REBUILD}") from None
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from None


def _sums(hashes: dict[str, str]) -> str:
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))


def _sha256(name: str | Path, folder: int | None = None) -> str:
    """Of a file's bytes, in hexadecimal digits; in the folder of that descriptor."""
    with _regular(name, folder) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
