"""Read the tensors of a weights file, whatever its suffix says: a zip or an old pickle of PyTorch, or safetensors.

Nothing in a file is executed (`weights_pickle`), and no tensor refers to the file once it is read. Memory is about
three times the file's size at most for what trainings write, and bounded for what they do not (docs/checkpoints.md).
"""

from __future__ import annotations

import io
import itertools
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple, cast

import torch
from torch import Tensor

from agln_fast.errors import CheckpointError, printable
from agln_fast.models.weights_account import Account
from agln_fast.models.weights_fcn import CLASSES_KEY, stored_classes
from agln_fast.models.weights_names import CONTAINERS, Found, find_weights, kind_of
from agln_fast.models.weights_pickle import (
    MOST_PICKLE_BYTES,
    NOT_PYTORCH,
    Inert,
    StoredTensor,
    read_pickle,
)
from agln_fast.models.weights_safetensors import read_shards, read_tensors

__all__ = ["CLASSES_KEY", "StateDict", "Weights", "read_safetensors", "read_weights"]

StateDict = dict[str, Tensor]


class Weights(NamedTuple):
    """The tensors of a file by name, in memory of their own, its metadata, and how they were found.

    Those that hold numbers with a fraction are float32, whatever they are in the file.
    """

    state: StateDict
    metadata: dict[str, str]
    account: Account


_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32)
_MOST_LISTED_BYTES = 4 << 20  # of a zip's list of entries; 2,400 need 300 kB
_SMALL_BYTES = 16 << 20  # what the smallest file may claim
# Half precision doubles as float32, and the storage that it is cut from may be as large as the file.
_MOST_TIMES = 4
_CHUNK_BYTES = 1 << 20
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001

_FETCH = "fetch the file again"
# How files begin that are taken for checkpoints -> what they are.
_TAKEN_FOR_CHECKPOINTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights: run `git lfs pull` where it lies"),
    (b"<", "a web page, not a checkpoint: the download asked for a login or met an error; " + _FETCH),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"\x89HDF", "an HDF5 file, not a checkpoint of PyTorch: convert it first"),
)


def read_weights(path: Path, wanted: str | None = None) -> Weights:
    """The weights in a file, found as `find_weights` tells.

    Args:
        wanted: which of several, see `find_weights`.

    Raises:
        CheckpointError: as `load_checkpoint`, but for what needs a network to tell.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: not a file")
        with path.open("rb") as file:
            return _named(str(path), lambda: _read(file, path, wanted))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except PermissionError:
        raise CheckpointError(
            f"{path}: no permission to read it; change that with chmod, or run as its owner"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({printable(error.strerror)})") from None


def read_safetensors(data: bytes, name: str) -> Weights:
    """As `read_weights`, from the bytes of a safetensors file; `name` is what errors call it."""
    return _named(name, lambda: _from_safetensors(*read_tensors(data), None))


def _named(name: str, read: Callable[[], Weights]) -> Weights:
    """What `read` returns, in float32; its errors begin with `name`."""
    try:
        weights = read()
        state, _, account = weights
        for key, tensor in state.items():  # one by one, because the file's own go as those of float32 come
            if tensor.dtype in _FLOATS and tensor.dtype != torch.float32:
                account.converted[str(tensor.dtype).removeprefix("torch.")] += 1
                state[key] = tensor.float()
        return weights
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from None
    except MemoryError:
        raise CheckpointError(f"{name}: needs more memory than there is") from None


def _read(file: BinaryIO, path: Path, wanted: str | None) -> Weights:
    size = os.fstat(file.fileno()).st_size
    start = file.read(512)
    file.seek(0)
    if not start:
        raise CheckpointError(f"not a checkpoint: the file is empty, a truncated download or a full disk; {_FETCH}")
    if start[5:9] == b"\0\0\0{":  # eight bytes of length, then JSON; looked for first, because a length may be any text
        return _from_safetensors(*read_tensors(file.read()), wanted)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    for beginning, what in _TAKEN_FOR_CHECKPOINTS:
        if text.startswith(beginning):
            raise CheckpointError(what)
    if start[257:262] == b"ustar":
        raise CheckpointError("a tar archive, not a checkpoint: unpack it first")
    if path.suffix == ".json" and text.startswith(b"{"):
        return _from_safetensors(*read_shards(path), wanted)
    if start.startswith(b"PK"):
        return _from_zip(file, size, wanted)
    if start.startswith(b"\x80"):
        return _from_legacy(file, size, wanted)
    if path.suffix == ".safetensors":
        return _from_safetensors(*read_tensors(file.read()), wanted)
    raise CheckpointError(NOT_PYTORCH)


def _from_safetensors(tensors: StateDict, metadata: dict[str, str], wanted: str | None) -> Weights:
    found = find_weights(tensors, wanted)
    return Weights(dict(_checked(found.state)), metadata, found.account)


def _from_zip(file: BinaryIO, size: int, wanted: str | None) -> Weights:
    try:
        if not zipfile.is_zipfile(file):
            raise CheckpointError(f"truncated: the end of the archive is missing; {_FETCH}")
        with zipfile.ZipFile(cast(BinaryIO, _ShortReads(file))) as archive:
            return _from_archive(archive, size, wanted)
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        NotImplementedError,
        EOFError,
        RuntimeError,
        ValueError,
    ) as error:
        raise CheckpointError(f"damaged ({_first_line(error)}); {_FETCH}") from None


class _ShortReads(io.RawIOBase):
    """A file that refuses to read much at once: `zipfile` reads its list of entries whole, and makes objects of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        if size > _MOST_LISTED_BYTES:
            raise zipfile.BadZipFile("too many entries")
        return self._file.read(size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET and offset < 0:
            raise zipfile.BadZipFile("an entry before the start")
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True


def _from_archive(archive: zipfile.ZipFile, size: int, wanted: str | None) -> Weights:
    entries = {info.filename: info for info in archive.infolist()}
    names = [name for name in entries if name.rpartition("/")[2] == "data.pkl"]
    if not names:
        raise CheckpointError(f"{NOT_PYTORCH}: a zip archive without data.pkl")
    root = names[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise CheckpointError(
            "a TorchScript archive, which holds code: save the state dict of the model that it was made from"
        )
    # PyTorch compresses nothing; whoever packs its files anew gains a tenth.
    claimed = sum(info.file_size for info in entries.values())
    if claimed > 3 * size + _SMALL_BYTES:
        raise CheckpointError(f"a file of {size:,} bytes that unpacks to {claimed:,}: not written by PyTorch")
    # The other methods set aside as much memory as an entry's header says.
    if any(info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for info in entries.values()):
        raise CheckpointError("its entries are compressed in a way that PyTorch does not know: pack them anew, stored")
    if entries[names[0]].file_size > MOST_PICKLE_BYTES:
        raise CheckpointError(f"more than {MOST_PICKLE_BYTES >> 20} MiB beside the weights; save a plain state dict")
    content = read_pickle(io.BytesIO(_entry(archive, names[0])))
    swapped = f"{root}byteorder" in entries and _entry(archive, f"{root}byteorder") == b"big"

    def record(key: str, nbytes: int) -> bytearray:
        if f"{root}data/{key}" not in entries:
            raise CheckpointError(f"damaged: its storage '{printable(key)}' is missing; {_FETCH}")
        if entries[f"{root}data/{key}"].file_size > nbytes + _CHUNK_BYTES:
            raise CheckpointError(f"damaged: its storage '{printable(key)}' holds more than it claims; {_FETCH}")
        return _entry(archive, f"{root}data/{key}")

    return _with_classes(_loaded(find_weights(content, wanted), record, size, swapped), content)


def _entry(archive: zipfile.ZipFile, name: str) -> bytearray:
    """All bytes of an entry, whose checksum `zipfile` compares."""
    with archive.open(name) as source:
        return _exactly(source, archive.getinfo(name).file_size)


def _from_legacy(file: BinaryIO, size: int, wanted: str | None) -> Weights:
    """Files of PyTorch before 1.6: magic number, version, system, content, keys; then the records in that order."""
    dtypes: dict[str, torch.dtype] = {}
    magic, version = read_pickle(file), read_pickle(file)
    if magic != _LEGACY_MAGIC or version != _LEGACY_VERSION:
        raise CheckpointError(NOT_PYTORCH)
    _, content, keys = read_pickle(file), read_pickle(file, dtypes), read_pickle(file)
    places: dict[str, tuple[int, int]] = {}
    for key in keys if isinstance(keys, list) else ():
        dtype = dtypes.get(key) if isinstance(key, str) else None
        if dtype is None or key in places:
            raise CheckpointError(NOT_PYTORCH)
        count = int.from_bytes(_exactly(file, 8), "little")
        places[key] = file.tell(), count * dtype.itemsize
        if sum(places[key]) > size:
            raise CheckpointError(f"truncated: the end of the file is missing; {_FETCH}")
        file.seek(sum(places[key]))

    def record(key: str, nbytes: int) -> bytearray:
        if key not in places:
            raise CheckpointError(f"damaged: its storage '{printable(key)}' is missing; {_FETCH}")
        offset, count = places[key]
        file.seek(offset)
        return _exactly(file, min(count, nbytes))

    return _with_classes(_loaded(find_weights(content, wanted), record, size), content)


def _exactly(source: IO[bytes], count: int) -> bytearray:
    """The next `count` bytes."""
    data = bytearray(count)
    view = memoryview(data)
    for start in range(0, count, _CHUNK_BYTES):
        chunk = source.read(min(_CHUNK_BYTES, count - start))
        view[start : start + len(chunk)] = chunk
        if len(chunk) < min(_CHUNK_BYTES, count - start):
            raise CheckpointError(f"truncated: the end of the file is missing; {_FETCH}")
    return data


def _checked(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """`state`, if it holds nothing but dense tensors of real numbers, whether read or stored."""
    for name, value in state.items():
        shown = f"entry '{printable(name)}'"
        if not isinstance(value, Tensor | StoredTensor) and not (isinstance(value, Inert) and value.tensor):
            places = f" (weights may be under {', '.join(CONTAINERS)})" if isinstance(value, dict) else ""
            raise CheckpointError(f"not a checkpoint: {shown} is no tensor but {kind_of(value)}{places}")
        real = _INTEGERS if name.endswith("num_batches_tracked") else _FLOATS
        if isinstance(value, Inert) or value.dtype not in real:
            kind = value.what if isinstance(value, Inert) else value.dtype
            raise CheckpointError(f"{shown} is not a dense tensor of real numbers ({kind})")
        if isinstance(value, StoredTensor) and not value.fits():
            raise _less(name, value)
    return state


def _with_classes(weights: Weights, content: object) -> Weights:
    """With what MMSegmentation calls the classes as metadata, which is then no entry that is not used."""
    classes = stored_classes(content)
    if classes and "meta" in weights.account.unused:
        weights.account.unused.remove("meta")
    return weights._replace(metadata=classes)


def _loaded(found: Found, record: Callable[[str, int], bytearray], size: int, swapped: bool = False) -> Weights:
    """The tensors that `found` describes, from a file of `size` bytes.

    Args:
        record: reads the bytes of the storage of that key, which its tensors say to be so many.
        swapped: the bytes of each number stand in the other order.
    """
    state: Mapping[str, StoredTensor] = _checked(found.state)
    storages: dict[str, int] = {}
    for value in state.values():
        key, stop = value.storage.key, value.storage.start + value.storage.nbytes
        storages[key] = max(stop, storages.get(key, 0))
    # Names may share a storage, as tied weights do; each gets a copy, and a small file must not ask for many.
    if sum(value.nbytes for value in state.values()) > 2 * sum(storages.values()):
        raise CheckpointError(f"its {len(state)} entries claim far more than the {len(storages)} storages hold")
    needed = sum(max(value.nbytes, math.prod(value.shape) * torch.float32.itemsize) for value in state.values())
    needed += max(storages.values())
    if needed > _MOST_TIMES * size + _SMALL_BYTES:
        raise CheckpointError(f"a file of {size:,} bytes that needs {needed:,} in memory: not written by PyTorch")
    tensors: StateDict = dict.fromkeys(state, torch.empty(0))  # in the file's order
    by_storage = sorted(state.items(), key=lambda item: item[1].storage.key)
    for key, group in itertools.groupby(by_storage, key=lambda item: item[1].storage.key):
        members = list(group)
        data = record(key, storages[key])
        for name, value in members:
            if value.storage.start + value.storage.nbytes > len(data):
                raise _less(name, value)
            alone = len(members) == 1 and value.nbytes == len(data)
            tensor = _cut(data, value)
            if swapped:
                tensor = _swapped(tensor)
            elif not alone:
                tensor = tensor.clone()
            tensors[name] = tensor
    return Weights(tensors, {}, found.account)


def _swapped(tensor: Tensor) -> Tensor:
    """A copy whose numbers have their bytes in the other order."""
    signed = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return torch.from_numpy(tensor.view(signed).numpy().byteswap()).view(tensor.dtype)


def _less(name: str, tensor: StoredTensor) -> CheckpointError:
    return CheckpointError(f"entry '{printable(name)}' claims shape {tensor.shape}, but the file holds less")


def _cut(data: bytearray, tensor: StoredTensor) -> Tensor:
    if 0 in tensor.shape:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    storage = tensor.storage
    count = storage.nbytes // tensor.dtype.itemsize
    elements = torch.frombuffer(data, dtype=tensor.dtype, count=count, offset=storage.start)
    return elements.as_strided(tensor.shape, tensor.stride, tensor.offset)


def _first_line(error: BaseException) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])
