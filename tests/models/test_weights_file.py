"""Files of every kind are told by their content, and cost no more memory than their size explains."""

from __future__ import annotations

import io
import json
import os
import random
import struct
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pickles import archive, call, dictionary, legacy, name, number, text, together
from safetensors.torch import save, save_file

import agln_fast
from agln_fast.errors import CheckpointError
from agln_fast.models import weights_file
from agln_fast.models.weights_file import read_safetensors, read_weights

_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which tells and limits a process's memory")


def _tensor(key: str, shape: tuple[int, ...], kind: str = "FloatStorage", elements: int | None = None) -> bytes:
    """The pickle of a tensor of `shape` on record `key`, which claims to hold `elements` (None: as many)."""
    claimed = int(np.prod(shape)) if elements is None else elements
    storage = together(text("storage"), name("torch", kind), text(key), text("cpu"), number(claimed)) + b"Q"
    strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
    sizes, steps = (together(*map(number, values)) for values in (shape, strides))
    return call(name("torch._utils", "_rebuild_tensor_v2"), storage, number(0), sizes, steps, b"\x89", b"}")


@pytest.fixture(scope="module")
def state(small_network):
    return small_network("fpn_resnet18").state_dict()


@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".safetensors", ".bin", ""])
@pytest.mark.parametrize("kind", ["zip", "legacy", "packed anew", "safetensors"])
def test_content_decides_not_the_suffix(kind, suffix, state, tmp_path):
    path = tmp_path / f"weights{suffix}"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "packed anew":
        with zipfile.ZipFile(path) as source:
            entries = {entry: source.read(entry) for entry in source.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
            for entry, data in entries.items():
                target.writestr(entry, data)
    read = read_weights(path).state
    assert list(read) == list(state) or kind == "safetensors"  # which sorts
    assert {key: tensor.dtype for key, tensor in read.items()} == {key: tensor.dtype for key, tensor in state.items()}
    assert all(torch.equal(read[key], tensor) for key, tensor in state.items())


def test_a_header_length_that_looks_like_a_web_page_is_none(tmp_path):
    data = save({"a": torch.zeros(2)}, metadata={"x": "y" * 100})
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    packed = json.dumps(header).encode().ljust(ord("<") + 256)
    (tmp_path / "x.pth").write_bytes(struct.pack("<Q", len(packed)) + packed + bytes(8))
    assert (tmp_path / "x.pth").read_bytes().startswith(b"<")
    assert torch.equal(read_weights(tmp_path / "x.pth").state["a"], torch.zeros(2))


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("weights.pth"))
    return file.getvalue()


FOREIGN = {
    "empty": (b"", "the file is empty, a truncated download or a full disk"),
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "a Git LFS pointer.*git lfs pull",
    ),
    "web page": (b"\xef\xbb\xbf\n <!DOCTYPE html><html>Sign in</html>", "a web page, not a checkpoint"),
    "answer of a store": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "a web page"),
    "gzip": (b"\x1f\x8b\x08\x00rest", "compressed with gzip"),
    "HDF5": (b"\x89HDF\r\n\x1a\nrest", "an HDF5 file"),
    "tar": (_tar(), "a tar archive, not a checkpoint: unpack it"),
    "words": (b'{"message": "Not Found"}', "not a checkpoint of PyTorch"),
    "other pickle": (b"\x80\x04K\x01.", "not a checkpoint of PyTorch"),
    "start of a zip": (b"PK\x03\x04rest", "truncated: the end of the archive is missing"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files_are_told_apart(case, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(FOREIGN[case][0])
    expected = "truncated, damaged" if (case, suffix) in {("words", ".safetensors")} else FOREIGN[case][1]
    with pytest.raises(CheckpointError, match=expected) as caught:
        agln_fast.load_checkpoint(path)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).isprintable()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_told(tmp_path):
    torch.jit.trace(torch.nn.Conv2d(1, 1, 1), torch.zeros(1, 1, 2, 2)).save(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="a TorchScript archive, which holds code"):
        agln_fast.load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (PermissionError(13, "Permission denied"), "no permission to read it"),
        (OSError(5, "Input/output error"), r"cannot be read \(Input/output error\)"),
        (FileNotFoundError(2, "gone"), "no such file"),
    ],
    ids=["permission", "disk", "gone since"],
)
def test_reasons_for_not_reading_are_told_apart(raised, message, tmp_path, monkeypatch):
    """Not by `chmod`: for root nothing is forbidden."""
    (tmp_path / "x.pth").write_bytes(b"x")

    def refuse(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CheckpointError, match=message):
        agln_fast.load_checkpoint(tmp_path / "x.pth")


def test_a_folder_that_must_not_be_entered_is_told(tmp_path, monkeypatch):
    def refuse(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be found \(Permission denied\)"):
        agln_fast.load_checkpoint(tmp_path / "x.pth")


def test_big_endian_files_are_read(tmp_path):
    values = np.array([1.5, -2], ">f4")
    content = dictionary({"a": _tensor("0", (2,)), "b": _tensor("1", (1,), "HalfStorage")})
    records = {"data/0": values.tobytes(), "data/1": np.array([0.5], ">f2").tobytes(), "byteorder": b"big"}
    (tmp_path / "x.pth").write_bytes(archive(content, records))
    read = read_weights(tmp_path / "x.pth").state
    assert read["a"].tolist() == [1.5, -2]
    assert read["b"].tolist() == [0.5]


@pytest.mark.parametrize("kind", ["Float", "ComplexDouble", "Untyped"])
@pytest.mark.parametrize(("dtype", "order"), [("float32", ">f4"), ("float64", ">f8"), ("int64", ">i8")])
def test_the_tensors_type_tells_what_is_swapped_not_its_storages(dtype, order, kind, tmp_path):
    unit = {"Float": 4, "ComplexDouble": 16, "Untyped": 1}[kind]
    values = np.arange(6).reshape(2, 3)
    storage = together(text("storage"), name("torch", f"{kind}Storage"), text("0"), text("cpu"), number(64 // unit))
    shape, stride = (together(number(a), number(b)) for a, b in ((3, 2), (1, 3)))
    arguments = (storage + b"Q", number(0), shape, stride, b"\x89", b"}", name("torch", dtype))
    key = "a.num_batches_tracked" if dtype == "int64" else "a.b"
    content = dictionary({key: call(name("torch._utils", "_rebuild_tensor_v3"), *arguments)})
    data = values.astype(order).tobytes().ljust(64, b"\0")
    (tmp_path / "x.pth").write_bytes(archive(content, {"data/0": data, "byteorder": b"big"}))
    (read,) = read_weights(tmp_path / "x.pth").state.values()
    assert read.tolist() == values.T.tolist()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_views_get_memory_of_their_own(legacy, tmp_path):
    whole = torch.arange(24.0)
    views = {
        "slice": whole[3:7],
        "transposed": whole.view(4, 6).T,
        "strided": whole.view(4, 6)[::2, 1],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.0),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    torch.save({"state_dict": views}, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    read = read_weights(tmp_path / "x.pth").state
    for key, tensor in views.items():
        assert torch.equal(read[key], tensor), key
        assert read[key].untyped_storage().nbytes() == tensor.numel() * 4, key
    read["slice"].zero_()
    assert torch.equal(read["transposed"], views["transposed"])


def test_a_tensor_with_attributes_is_a_tensor(tmp_path):
    weight = torch.ones(2)
    weight.note = "pruned"
    torch.save({"a": weight}, tmp_path / "x.pth")
    assert torch.equal(read_weights(tmp_path / "x.pth").state["a"], weight)


CLAIMS = {
    "a record that is missing": (_tensor("7\x1b", (2,)), "its storage '7\\\\x1b' is missing"),
    "a shape beyond its storage": (_tensor("0", (2, 3), elements=2), r"claims shape \(2, 3\), but the file holds less"),
    "a storage beyond its record": (_tensor("0", (2, 3)), r"claims shape \(2, 3\), but the file holds less"),
    "terabytes": (_tensor("0", (1 << 40,)), "that needs 8,796,093,022,208 in memory"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_claims_that_the_file_does_not_keep(case, tmp_path):
    tensor, message = CLAIMS[case]
    (tmp_path / "x.pth").write_bytes(archive(dictionary({"a": tensor}), {"data/0": bytes(8)}))
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "x.pth")


def test_many_names_of_one_storage_are_refused_and_two_are_not(tmp_path):
    def of(names: int) -> Path:
        content = dictionary({f"a.{i}": _tensor("0", (1000,)) for i in range(names)} | {"b": _tensor("1", (1,))})
        (tmp_path / "x.pth").write_bytes(archive(content, {"data/0": bytes(4000), "data/1": bytes(4)}))
        return tmp_path / "x.pth"

    tied = read_weights(of(2)).state
    tied["a.0"].fill_(1)
    assert not tied["a.1"].any()
    with pytest.raises(CheckpointError, match="its 101 entries claim far more than the 2 storages hold"):
        read_weights(of(100))
    # Nor does it help to describe the storage differently each time.
    content = dictionary({f"a.{i}": _tensor("0", (1000 - i,)) for i in range(3)})
    (tmp_path / "x.pth").write_bytes(archive(content, {"data/0": bytes(4000)}))
    with pytest.raises(CheckpointError, match="its 3 entries claim far more than the 1 storages hold"):
        read_weights(tmp_path / "x.pth")


def test_safetensors_with_a_long_header_are_refused():
    with pytest.raises(CheckpointError, match=r"^bundle: its header has 12 MiB"):
        read_safetensors(struct.pack("<Q", 12 << 20) + b"{" + bytes(13 << 20), "bundle")


NAMES = {
    "of another type": (
        lambda state: {**state, "a\x1b[2J": torch.zeros(1).to(torch.int8)},
        r"entry 'a\\x1b\[2J' is not",
    ),
    "no tensor": (lambda state: {**state, "b\x07": 3}, r"entry 'b\\x07' is no tensor but int"),
    "unexpected": (lambda state: {**state, "c\x1b]0;": torch.zeros(1)}, r"1 unexpected \(c\\x1b\]0;\)"),
    "direction": (lambda state: {**state, "d\u202e": torch.zeros(1)}, r"1 unexpected \(d\\u202e\)"),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", NAMES)
def test_names_in_errors_are_escaped(case, legacy, state, tmp_path):
    change, message = NAMES[case]
    torch.save(change(state), tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=message) as caught:
        agln_fast.load_checkpoint(tmp_path / "x.pth")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("change", ["truncated", "another file in its place", "deleted"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors", "half safetensors"])
def test_nothing_refers_to_the_file_after_loading(kind, change, state, tmp_path):
    path = tmp_path / "weights"
    if "safetensors" in kind:
        save_file({k: v.half() if "half" in kind and v.is_floating_point() else v for k, v in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
    network = agln_fast.load_checkpoint(path)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    mapped = Path("/proc/self/maps")
    assert not mapped.exists() or str(path) not in mapped.read_text()
    if change == "deleted":
        path.unlink()
    else:
        with path.open("r+b") as file:
            file.truncate(16) if change == "truncated" else file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())


def _bombs() -> dict[str, tuple[bytes, str]]:
    """Small files that ask for gigabytes -> what they are told."""
    weights = {"a": _tensor("0", (2,))}
    two = {"data/0": bytes(8)}
    big = text("x" * (1 << 20)) + b"q\x00"
    copied = call(name("_codecs", "encode"), b"h\x00", text("latin1"))
    bodies = {
        "storage": (dictionary({"a": _tensor("0", (1 << 38,))}), "that needs 2,199,023,255,552 in memory"),
        "bytearray": (call(name("builtins", "bytearray"), number(1 << 36)), "no state dict"),
        "tensor": (name("torch", "Tensor") + together(number(1 << 34)) + b"\x81", "no state dict"),
        "copies of a text": (big + b"]" + b"(" + copied * 2000 + b"e", "no state dict"),
        "place in the memo": (b"]r\xff\xff\xff\xff", "no state dict"),
        "length of a text": (b"X\xff\xff\xff\xffabc", "more than 16 MiB beside the weights"),
        "lists": (b"]" * (2 << 20), "more than 1,000,000 values"),
        "marks": (b"(" * (2 << 20), "more than 1,000,000 values"),
        "long pickle": (b"N" * (17 << 20), " beside the weights"),
    }
    whole = archive(dictionary(weights), two)
    start, stop = whole.index(b"PK\x01\x02"), whole.index(b"PK\x05\x06")
    listed = whole[start:stop]
    times = (6 << 20) // len(listed)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 65535, 65535, len(listed) * times, start, 0)
    return {
        "deflated zeros": (
            archive(dictionary({"a": _tensor("0", (100 << 20,))}), {"data/0": bytes(400 << 20)}, zipfile.ZIP_DEFLATED),
            "that unpacks to",
        ),
        "another compression": (
            archive(dictionary(weights), two, zipfile.ZIP_LZMA),
            "compressed in a way that PyTorch does not know",
        ),
        "list of entries": (whole[:start] + listed * times + end, "too many entries"),
        "record": (
            archive(dictionary(weights), {"data/0": bytes(8 << 20)}, zipfile.ZIP_DEFLATED),
            "holds more than it claims",
        ),
        "half precision": (
            archive(
                dictionary({"a": _tensor("0", (4 << 20,), "HalfStorage")}),
                {"data/0": bytes(8 << 20)},
                zipfile.ZIP_DEFLATED,
            ),
            "bytes that needs 25,165,824 in memory",
        ),
        "legacy storage": (_legacy_bomb(), "truncated"),
        **{f"{case}, zip": (archive(body, two), message) for case, (body, message) in bodies.items()},
        **{f"{case}, legacy": (legacy(body), message) for case, (body, message) in bodies.items()},
    }


def _legacy_bomb() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()[:-16] + struct.pack("<Q", 1 << 40) + bytes(8)


@_LINUX
def test_small_files_cannot_ask_for_much_memory(tmp_path):
    """In a process whose address space ends 400 MB above what the libraries need."""
    bombs = _bombs()
    for i, (data, _) in enumerate(bombs.values()):
        (tmp_path / f"{i}.pth").write_bytes(data)
    script = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        from agln_fast.errors import CheckpointError
        from agln_fast.models.checkpoint import load_checkpoint

        load_checkpoint("fpn_nano")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
        for i in range(int(sys.argv[2])):
            try:
                load_checkpoint(f"{sys.argv[1]}/{i}.pth")
                print("loaded", flush=True)
            except CheckpointError as error:
                print(error, flush=True)
    """)
    command = [sys.executable, "-c", script, tmp_path, str(len(bombs))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for (case, (_, message)), line in zip(bombs.items(), ran.stdout.splitlines(), strict=True):
        assert message in line, case


def _most_costly(state: dict[str, torch.Tensor], path: Path, spared: int) -> None:
    """Zeros in half precision, packed, beside noise that makes the file as large as it must be, less `spared` bytes."""
    whole = io.BytesIO()
    torch.save({key: value.half() if value.is_floating_point() else value for key, value in state.items()}, whole)
    needed = sum(max(4, value.itemsize) * value.numel() for value in state.values())
    needed += max(2 * value.numel() for value in state.values())
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.namelist():
            data = source.read(entry)
            target.writestr(entry, bytes(len(data)) if "/data/" in entry else data)
        target.writestr("noise", random.Random(0).randbytes((needed - (16 << 20)) // 4 - spared))


@_LINUX
def test_loading_takes_three_times_the_file(small_network, tmp_path):
    """The peak of each load in a process that gives back what it frees, so that no load lives on memory of another.

    The last file is made to cost more, and costs four times its size and 16 MiB.
    """
    state = small_network("fpn_resnet18", width=0.75, channels=64).state_dict()
    half = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    flat = torch.cat([tensor.flatten() for tensor in half.values() if tensor.is_floating_point()])
    pieces = iter(flat.split([tensor.numel() for tensor in half.values() if tensor.is_floating_point()]))
    views = {key: next(pieces).view(v.shape) if v.is_floating_point() else v for key, v in half.items()}
    kinds = ("zip", "half zip", "half of one storage", "legacy", "safetensors", "half safetensors", "costly")
    paths = [tmp_path / kind for kind in kinds]
    torch.save({"state_dict": state, "optimizer": [tensor + 1 for tensor in state.values()]}, paths[0])
    torch.save(half, paths[1])
    torch.save(views, paths[2])
    torch.save(state, paths[3], _use_new_zipfile_serialization=False)
    save_file(state, paths[4])
    save_file(half, paths[5])
    _most_costly(state, paths[6], spared=0)
    script = textwrap.dedent("""
        import re, sys
        from pathlib import Path
        from agln_fast.models.checkpoint import load_checkpoint

        def peak():
            return int(re.search("VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

        load_checkpoint("fpn_nano")
        for path in sys.argv[1:]:
            Path("/proc/self/clear_refs").write_text("5")
            before = peak()
            load_checkpoint(path)
            print(peak() - before)
    """)
    command, mapped = [sys.executable, "-c", script, *paths], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    ran = subprocess.run(command, env=mapped, capture_output=True, text=True, timeout=300, check=True)
    held = sum(tensor.nbytes for tensor in state.values())
    for path, peak in zip(paths, ran.stdout.split(), strict=True):
        size = path.stat().st_size
        assert size > 10 << 20 or path.name == "costly"
        most = 4 * size + (16 << 20) if path.name == "costly" else 3 * size
        assert 0.9 * held < int(peak) < most + (8 << 20), path.name


def test_files_that_need_more_memory_than_their_size_explains_are_refused(small_network, tmp_path):
    state = small_network("fpn_resnet18", width=0.75, channels=64).state_dict()
    _most_costly(state, tmp_path / "x.pth", spared=200_000)
    with pytest.raises(CheckpointError, match=r"a file of [\d,]+ bytes that needs [\d,]+ in memory"):
        agln_fast.load_checkpoint(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_damage_anywhere_is_told_in_one_line(kind, tmp_path):
    content = {"a.b": torch.ones(2), "a.c": torch.ones(3, dtype=torch.float16)}
    path, whole = tmp_path / "x.pth", io.BytesIO()
    torch.save({"model": content, "best": np.float16(1)}, whole, _use_new_zipfile_serialization=kind != "legacy")
    good = save(content, metadata={"agln_fast.config": "{}"}) if kind == "safetensors" else whole.getvalue()
    chance = random.Random(0)
    messages = []
    for _ in range(500):
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] = chance.choice([0, 1, 127, 255, chance.randrange(256)])
        path.write_bytes(data[: chance.choice([len(data), len(data), chance.randrange(len(data))])])
        try:
            read_weights(path)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 200
    assert all(message.isprintable() for message in messages)


def test_running_out_of_memory_is_told(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise MemoryError

    (tmp_path / "x.pth").write_bytes(archive(dictionary({"a": _tensor("0", (2,))}), {"data/0": bytes(8)}))
    monkeypatch.setattr(weights_file, "_exactly", refuse)
    with pytest.raises(CheckpointError, match="needs more memory than there is"):
        read_weights(tmp_path / "x.pth")
