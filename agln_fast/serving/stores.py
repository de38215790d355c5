"""Where pictures lie and masks go: local folders, and stores that pyarrow or fsspec opens by a URI, as s3://bucket/x.

A place in a store is written as its URI. Of a URI the host or bucket, and what stands behind "?", make the file system;
what lies between is a path as it is, without escapes: "%20" is three letters.
"""

from __future__ import annotations

import errno
import io
import os
import platform
import posixpath
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

from agln_fast import environment
from agln_fast.data.decoding import image_suffixes
from agln_fast.errors import BuildError, ConfigError, ImageError, printable
from agln_fast.files import scratch_folder
from agln_fast.runtime.images import largest_file, list_images
from agln_fast.runtime.names import output_names

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

__all__ = ["Output", "Picture", "find_pictures", "is_uri"]

_LOCAL = ""
_WHOLE = ("s3", "s3a", "gs", "gcs", "abfs", "az")  # an object there is whole, or is not there
_CHUNK = 1 << 24  # bytes
_PARTS = ".agln-fast-parts"
_NAMES = (
    errno.ENAMETOOLONG,
    errno.EILSEQ,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
)  # a name is at fault, not the place


@dataclass(frozen=True)
class Picture:
    """store: the URI of its file system, "" for local files. path: in it. name: of its mask, folders and all."""

    store: str
    path: str
    name: str

    def __str__(self) -> str:
        return _shown(self.store, self.path)

    def read(self) -> bytes:
        """The bytes of the file.

        Raises:
            ImageError: it cannot be read, or is larger than an image may be (`AGLN_FAST_MAX_PIXELS`).
        """
        most = largest_file(environment.max_pixels())
        try:
            with _file_system(self.store).open_input_stream(self.path) as file:
                data: bytes = file.read(most + 1)
        except OSError as error:
            raise ImageError(f"{self}: cannot be read ({_reason(error)})") from None
        if len(data) > most:
            raise ImageError(f"{self}: more than {most} bytes; scale it down, or raise AGLN_FAST_MAX_PIXELS")
        return data


def is_uri(place: str) -> bool:
    """Whether it is one, and no local path."""
    return "://" in place


def find_pictures(named: Sequence[str], *, recursive: bool) -> tuple[list[Picture], dict[str, str]]:
    """The pictures that files, folders, patterns and URIs of these stand for, and why others stand for none.

    Only names are read of what lies in a store. A pattern there knows `*`, which passes no "/", and `**`, which does.
    The masks' names keep the folders below the deepest one that holds all that was named, of each store.

    Args:
        named: as above.
        recursive: whether folders are searched with all folders in them.

    Raises:
        ImageError: all of them stand for none.
        ConfigError: a URI that nothing here can open.
    """
    found: dict[tuple[str, str], None] = {}
    roots: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    for name in named:
        try:
            store, root, paths = _in_store(name, recursive) if is_uri(name) else _on_disk(name, recursive)
        except ImageError as error:
            failed[name] = str(error)
            continue
        roots.setdefault(store, []).append(root)
        found.update(dict.fromkeys((store, path) for path in paths))
    if not found:
        raise ImageError("; ".join(failed.values()))
    bases = {store: posixpath.commonpath(each) for store, each in roots.items()}
    names = output_names([posixpath.relpath(path, bases[store]) for store, path in found], "/")
    return [Picture(store, path, name) for (store, path), name in zip(found, names, strict=True)], failed


def _on_disk(name: str, recursive: bool) -> tuple[str, str, list[str]]:
    paths = [os.path.abspath(path) for path in list_images(name, recursive=recursive)]
    path = Path(os.path.abspath(name))
    if path.is_dir():
        return _LOCAL, str(path), paths
    return _LOCAL, str(path.parent) if path.exists() else _literal(str(path)), paths


def _in_store(uri: str, recursive: bool) -> tuple[str, str, list[str]]:
    from pyarrow.fs import FileSelector, FileType

    store, path = _split(uri)
    files = _file_system(store)
    try:
        if "*" in path:
            from fsspec.implementations.arrow import ArrowFSWrapper

            root, names = _literal(path), [str(each) for each in ArrowFSWrapper(files).glob(path)]
            paths = [info.path for info in files.get_file_info(names) if info.is_file]
        else:
            about = files.get_file_info(path)
            if about.type == FileType.NotFound:
                raise ImageError(f"{_shown(store, path)}: no such file or folder")
            if about.is_file:
                return store, posixpath.dirname(path), [path]
            root = path
            selected = FileSelector(path, recursive=recursive)
            paths = [info.path for info in files.get_file_info(selected) if info.is_file]
    except OSError as error:
        raise ImageError(f"{_shown(store, path)}: cannot be listed ({_reason(error)})") from None
    suffixes = image_suffixes()
    images = [
        each
        for each in paths
        if posixpath.splitext(each)[1].lower() in suffixes and not _is_hidden(posixpath.relpath(each, root))
    ]
    if not images:
        hint = "" if recursive or "*" in path else "; search its folders, too, with --recursive"
        raise ImageError(f"{_shown(store, path)}: none of its {len(paths)} files is an image{hint}")
    return store, root, sorted(images)


def _is_hidden(relative: str) -> bool:
    """Also what would lead out of the folder: keys of an object store may be any text."""
    return any(part.startswith(".") for part in PurePosixPath(relative).parts)


def _literal(pattern: str) -> str:
    """The folder that all of what a pattern stands for lies in."""
    parts = pattern.split("/")
    wild = next((index for index, part in enumerate(parts) if set(part) & set("*?[")), len(parts) - 1)
    return "/".join(parts[:wild]) or "/"


class Output:
    """A place for masks: a folder, or a prefix of an object store. Every file there is whole, or is not there.

    On object stores that is what a PUT does. Elsewhere a file is written into a folder `parts` of the same file system,
    and renamed. It is not forced to the disk: who reads a mask again after a power cut must look whether it is whole.
    """

    def __init__(self, place: str, parts: str = "") -> None:
        """`parts`: that of `with_parts`.

        Raises:
            ConfigError: a URI that nothing here can open.
        """
        self.place, self.parts = place, parts
        self._store, self._path = _split(place) if is_uri(place) else (_LOCAL, os.path.abspath(place))
        self._files = _file_system(self._store)
        self._is_whole = self._files.type_name.rpartition("+")[2] in _WHOLE
        self._folders: set[str] = set()

    def __str__(self) -> str:
        return _shown(self._store, self._path)

    def shown(self, name: str) -> str:
        """A file there, as a user would write it."""
        return _shown(self._store, f"{self._path}/{name}")

    @contextmanager
    def with_parts(self) -> Iterator[Output]:
        """Make the folder, and one in it for files that are being written, which is removed at the end.

        On a local disk, what dead processes left of such folders is removed first.

        Raises:
            ImageError: it cannot be made.
        """
        if self._is_whole:
            yield self
            return
        try:
            self._make(self._path)
            if self._store != _LOCAL:
                self._make(parts := f"{self._path}/{_PARTS}-{os.urandom(4).hex()}")
        except OSError as error:
            raise ImageError(f"{self}: cannot be made ({_reason(error)}); choose another place") from None
        if self._store == _LOCAL:
            with scratch_folder(inside=Path(self._path)) as folder:
                yield Output(self.place, str(folder))
        else:
            try:
                yield Output(self.place, parts)
            finally:
                self._files.delete_dir(parts)

    def names(self) -> set[str]:
        """The files that are there, by their path below the place.

        Raises:
            ImageError: it cannot be listed.
        """
        from pyarrow.fs import FileSelector

        selected = FileSelector(self._path, recursive=True, allow_not_found=True)
        try:
            found = self._files.get_file_info(selected)
        except OSError as error:
            raise ImageError(f"{self}: cannot be listed ({_reason(error)})") from None
        return {posixpath.relpath(info.path, self._path) for info in found if info.is_file}

    def read(self, name: str) -> bytes:
        """A file there.

        Raises:
            ImageError: it cannot be read.
        """
        return Picture(self._store, f"{self._path}/{name}", "").read()

    def write(self, name: str, data: bytes | IO[bytes]) -> None:
        """Write bytes, or a file from where it stands, and its folder if need be; one that is there is replaced.

        Raises:
            ImageError: its name cannot be one.
            BuildError: nothing can be written there.
        """
        target = f"{self._path}/{name}"
        written = target if self._is_whole else f"{self.parts}/{os.urandom(8).hex()}"
        source = io.BytesIO(data) if isinstance(data, bytes) else data
        try:
            with self._files.open_output_stream(written) as file:
                shutil.copyfileobj(source, file, _CHUNK)
            if not self._is_whole:
                self._make(posixpath.dirname(target))
                self._files.move(written, target)
        except OSError as error:
            if error.errno in _NAMES:
                raise ImageError(f"{self.shown(name)}: cannot be written ({_reason(error)})") from None
            raise BuildError(f"{self.shown(name)}: cannot be written ({_reason(error)}){self._hint()}") from None

    def _make(self, folder: str) -> None:
        if folder not in self._folders:
            self._files.create_dir(folder, recursive=True)
            self._folders.add(folder)

    def _hint(self) -> str:
        if self._store == _LOCAL and not os.path.isdir(self.parts):
            return f"; {platform.node()} does not see the folder: give one that all machines share, or a URI"
        return ""


def _split(uri: str) -> tuple[str, str]:
    """What makes the file system, and the path in it."""
    scheme, _, rest = uri.partition("://")
    rest, mark, query = rest.partition("?")
    host, _, path = rest.partition("/")
    store = f"{scheme}://{host}/{mark}{query}"
    base = _open(store)[1].rstrip("/")
    return store, f"{base}/{path}".rstrip("/")


def _file_system(store: str) -> FileSystem:
    return _open(store)[0]


@cache
def _open(store: str) -> tuple[FileSystem, str]:
    """The file system, and where it begins, as it names that itself.

    Raises:
        ConfigError: nothing here can open it.
        ImageError: it does not answer.
    """
    from pyarrow.fs import FileSystem, FSSpecHandler, LocalFileSystem, PyFileSystem

    if store == _LOCAL:
        return LocalFileSystem(), "/"
    with _opening(store):
        try:
            files, base = FileSystem.from_uri(store)
        except ValueError as error:  # pyarrow's own do not know the scheme
            if "Unrecognized" not in str(error):
                raise
            from fsspec.core import url_to_fs

            found, base = url_to_fs(store)
            return PyFileSystem(FSSpecHandler(found)), str(base)
    return files, str(base)


@contextmanager
def _opening(store: str) -> Iterator[None]:
    """Errors in our words."""
    place = _address(store)
    try:
        yield
    except ImportError as error:
        raise ConfigError(f"{place}: {printable(error)}") from None
    except ValueError as error:
        raise ConfigError(f"{place}: no store that is known here ({printable(error)})") from None
    except OSError as error:
        raise ImageError(f"{place}: cannot be opened ({_reason(error)})") from None


def _shown(store: str, path: str) -> str:
    """As a user would write it, without a password."""
    if store == _LOCAL:
        return path
    return _address(store) + path.removeprefix(_open(store)[1].rstrip("/"))


def _address(store: str) -> str:
    scheme, _, host = store.partition("?")[0].partition("://")
    user, at, name = host.rstrip("/").rpartition("@")
    return printable(f"{scheme}://{name if ':' in user else user + at + name}")


def _reason(error: OSError) -> str:
    number = errno.ENOENT if isinstance(error, FileNotFoundError) else error.errno  # fsspec's have none
    return os.strerror(number) if number else printable(error)
