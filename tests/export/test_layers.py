"""Our layers for TensorRT: what they launch is what Triton launches, and what is damaged is refused."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from agln_fast.bench.kernels.calls import CALLS
from agln_fast.errors import BuildError
from agln_fast.export.nodes import operators
from agln_fast.export.plugins import compiler, headers, library, obstacle
from agln_fast.export.records import Argument, Launch, Place, Port, Program, Record, _OnlyLaunches
from agln_fast.kernels.devices import DEVICES

HERE = Path(__file__).parent / "layers"
pytestmark = pytest.mark.skipif(obstacle() is not None, reason=str(obstacle()))
SIDES = 16, 64


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The library of our layers, and the harness and the stand-in for the driver, compiled: `built.library`, ..."""

    class Built:
        folder = tmp_path_factory.mktemp("layers")
        library = folder / "cache" / "libagln_layers.so"
        harness = folder / "harness.so"
        driver = folder / "libcuda.so.1"

    cache = os.environ["AGLN_FAST_CACHE"]
    os.environ["AGLN_FAST_CACHE"] = str(Built.folder / "cache")
    try:
        Built.library = library()
    finally:
        os.environ["AGLN_FAST_CACHE"] = cache
    include = [f"-I{folder}" for folder in headers()]
    command = [compiler(), "-w", "-O1", "-shared", "-fPIC", *include]
    subprocess.run([*command, "-std=c++17", HERE / "harness.cpp", "-o", Built.harness, "-ldl"], check=True)
    subprocess.run([*command, "-fpermissive", "-xc", HERE / "fake_cuda.c", "-o", Built.driver], check=True)
    (Built.folder / "libcuda.so").symlink_to(Built.driver.name)
    return Built


def on_stand_in(built, script, *arguments, stdin="", **environment):
    """The last line that a script prints, as JSON; its process has the stand-in for the driver, and Triton compiles."""
    place = {"LD_LIBRARY_PATH": str(built.folder), "TRITON_LIBCUDA_PATH": str(built.folder)}
    rest = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, built.harness, built.library, *arguments],
        input=stdin,
        env={**rest, **place, **environment},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def same_launches(found):
    """Whether both asked for the same: names, binaries, grids, blocks, memory, numbers, places in inputs and outputs,
    and for each place in Triton's workspace one in the layer's."""
    if not len(found["triton"]) == len(found["layer"]) == len(found["record"]) > 0:
        return False
    start, size = found["workspace"]
    places, taken = {}, {}
    for triton, layer, kinds in zip(found["triton"], found["layer"], found["record"], strict=True):
        triton, layer = triton.split(), layer.split()
        if triton[:5] != layer[:5] or not len(triton) == len(layer) == 5 + len(kinds):
            return False
        for one, other, (kind, count) in zip(triton[5:], layer[5:], kinds, strict=True):
            if not len(one) == len(other) == 2 * count:
                return False
            if kind != Place.WORKSPACE:
                if one != other:
                    return False
            elif (
                places.setdefault(one, other) != other
                or taken.setdefault(other, one) != one
                or not start <= int(other, 16) < start + size
            ):
                return False
    return True


def _compare(built, cases):
    script = HERE / "launched.py"
    found = on_stand_in(built, script, stdin=json.dumps(cases))
    assert len(found) == len(cases)
    for each in found:  # number, sizes and order: what the driver reads of each argument
        assert each["entries"] == [[size for _, size in launch] for launch in each["record"]]
    wrong = [case for case, each in zip(cases, found, strict=True) if not same_launches(each)]
    assert not wrong
    return found


def test_layers_launch_what_triton_launches(built):
    """Every op at two levels of the pyramid, with several batches in one record."""
    cases = [[op, "float16", "sm90", side, 2] for op in CALLS for side in SIDES]
    found = _compare(built, cases)
    # The comparison sees a digit that differs: in a number, in a grid, in a place, in a binary.
    for word in (-3, 2, 5, 1):
        spoilt = json.loads(json.dumps(found[0]))
        words = spoilt["layer"][0].split()
        words[word] = f"{words[word][:-1]}{(int(words[word][-1], 16) + 1) % 16:x}"
        spoilt["layer"][0] = " ".join(words)
        assert not same_launches(spoilt)


@pytest.mark.slow
@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_layers_launch_what_triton_launches_everywhere(built, dtype, capability):
    _compare(built, [[op, dtype, capability, side, 3] for op in CALLS for side in (16, 32, 64)])


PORT = Port((-1, 4), torch.float16)


def _program(name, batch, *arguments):
    places = arguments or (
        Argument(Place.INPUT),
        Argument(Place.OUTPUT, offset=8),
        Argument(Place.WORKSPACE, offset=512),
    )
    value = Argument(Place.VALUE, value=(7 * batch).to_bytes(4, "little"))
    return Program((Launch(int(name == "other"), name, (batch, 2, 3), 64, 50_000, (*places, value)),), 1024)


RECORD = Record(
    "ChannelApply",
    (PORT,),
    (PORT,),
    (b"binary", b"text\0"),
    {
        ("sm86", 1): _program("one", 1),
        ("sm86", 2): _program("two", 2),
        ("sm90", 2): _program("hopper", 2),
        ("ptx", 2): _program("other", 2),
    },
)


def _hash(image):
    """As the stand-in has it: FNV-1a of 64 bits."""
    value = 0xCBF29CE484222325
    for byte in image:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def _attach(built, tmp_path, data=None, batch=2, threads=1, name="ChannelApply", **environment):
    file = tmp_path / "record"
    file.write_bytes(RECORD.to_bytes() if data is None else data)
    sizes = {"FAKE_CUDA_SIZES": " ".join(f"{name}:8884" for name in ("one", "two", "hopper", "other"))}
    return on_stand_in(built, HERE / "attached.py", name, file, str(batch), str(threads), **{**sizes, **environment})


@pytest.mark.parametrize(
    ("capability", "batch", "launched"),
    [
        ("86", 1, "one"),
        ("86", 2, "two"),
        ("90", 2, "hopper"),
        ("80", 2, "other"),
        ("89", 2, "other"),
        ("121", 2, "other"),
    ],
)
def test_the_program_of_the_gpu_and_the_batch_runs(built, tmp_path, capability, batch, launched):
    found = _attach(built, tmp_path, batch=batch, FAKE_CUDA_CAPABILITY=capability)
    numbers = f"{0x1000:016x} {0x2008:016x} {0x3200:016x} {7 * batch:08x}"
    image = _hash(b"text" if launched == "other" else b"binary")
    assert found["launches"] == [f"{launched} image={image:016x} grid={batch},2,3 block=64,1,1 shared=50000 {numbers}"]
    assert (found["shape"], found["enqueue"], found["messages"]) == (0, [0], "")


def test_a_gpu_without_a_binary_is_told(built, tmp_path):
    found = _attach(built, tmp_path, FAKE_CUDA_CAPABILITY="75")
    assert found["created"]
    assert not found["attached"]
    assert "this GPU is sm75, and the engine's layers are for sm80 and later, sm86, sm90:" in found["messages"]


def test_another_batch_or_shape_is_refused(built, tmp_path):
    found = _attach(built, tmp_path, batch=3, FAKE_CUDA_CAPABILITY="86")
    assert (found["shape"], found["enqueue"], found["launches"]) == (-1, [-1], [])
    assert "no kernels for a batch of 3" in found["messages"]
    other = Record("ChannelApply", (Port((-1, 5), torch.float16),), (PORT,), RECORD.binaries, RECORD.programs)
    found = _attach(built, tmp_path, other.to_bytes(), FAKE_CUDA_CAPABILITY="86")
    assert found["shape"] == -1
    assert "ChannelApply was built for other shapes" in found["messages"]


@pytest.mark.parametrize("call", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuLaunchKernel"])
def test_a_call_of_the_driver_that_fails_is_named(built, tmp_path, call):
    found = _attach(built, tmp_path, FAKE_CUDA_CAPABILITY="90", FAKE_CUDA_FAILS=call)
    assert found["attached"] == (call == "cuLaunchKernel")
    assert found.get("enqueue", [-1]) == [-1]
    assert re.search(rf"agln-fast: {call}( hopper)? failed: unspecified launch failure", found["messages"])


def test_contexts_in_threads_do_not_disturb_each_other(built, tmp_path):
    found = _attach(built, tmp_path, threads=4, FAKE_CUDA_CAPABILITY="90")
    assert found["enqueue"] == [0]
    assert len(found["launches"]) == 4 * 50
    assert len(set(found["launches"])) == 1


@pytest.fixture
def native(built):
    """The harness in this process: nothing of it asks the driver."""
    harness = ctypes.CDLL(built.harness)
    harness.create.restype = ctypes.c_void_p
    harness.messages.restype = ctypes.c_char_p
    harness.workspace.restype = ctypes.c_long

    def create(data, name="ChannelApply", building=False):
        return harness.create(str(built.library).encode(), name.encode(), data, len(data), building)

    harness.made = create
    return harness


def _serialised(native, layer):
    data = ctypes.c_char_p()
    length = native.serialised(ctypes.c_void_p(layer), ctypes.byref(data))
    return ctypes.string_at(data, length)


def test_a_layer_is_made_of_what_it_serialises(native):
    data = RECORD.to_bytes()
    layer = native.made(base64.b64encode(data), building=True)
    assert _serialised(native, layer) == data
    again = native.made(_serialised(native, layer))
    assert _serialised(native, again) == data
    assert native.workspace(ctypes.c_void_p(again), 2) == 1024
    assert native.workspace(ctypes.c_void_p(again), 0) == 0


def test_a_damaged_record_is_refused(native):
    data = RECORD.to_bytes()
    foreign = [b"", b"AGLN", b"PK\x03\x04" + data[4:], data[:4] + b"\x02" + data[5:], data + b"\0"]
    for damaged in [*foreign, *(data[:length] for length in range(len(data)))]:
        assert native.made(damaged) is None
    assert native.made(data, name="AttentionPool") is None, "another layer's"
    assert b"damaged, or of another version: build the engine again" in native.messages()
    assert native.made(b"!" * 40, building=True) is None
    assert native.made(data) is not None


def test_a_flipped_bit_is_seen(native):
    data = RECORD.to_bytes()
    for place in range(len(data)):
        for bit in (0, 3, 7):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            assert native.made(bytes(flipped)) is None


@pytest.mark.parametrize(
    ("dtype", "channels_last", "type_and_format"),
    [
        (torch.float32, True, (0, 8)),  # DataType::kFLOAT, TensorFormat::kHWC
        (torch.float16, True, (1, 2)),  # kHALF, kHWC8
        (torch.bfloat16, True, (7, 2)),  # kBF16, kHWC8
        (torch.uint8, False, (2, 0)),  # kINT8, kLINEAR: layers have no uint8
        (torch.int32, False, (3, 0)),
    ],
)
def test_types_and_formats_are_those_of_the_record(native, dtype, channels_last, type_and_format):
    port = Port((-1, 8, 2, 2), dtype, channels_last)
    record = Record("ChannelApply", (PORT,), (port,), RECORD.binaries, RECORD.programs)
    layer = native.made(record.to_bytes())
    taken = [
        (kind, layout)
        for kind in range(10)
        for layout in range(13)
        if native.takes(ctypes.c_void_p(layer), 1, 1, 1, kind, layout)
    ]
    assert taken == [type_and_format]


def test_every_op_has_a_layer(built, native):
    assert native.count(str(built.library).encode()) == len(CALLS)


@pytest.mark.parametrize(("name", "message"), [("CXX", None), ("headers", "AGLN_FAST_TENSORRT_INCLUDE")])
def test_what_is_missing_to_compile_is_named(name, message, monkeypatch, tmp_path):
    if name == "CXX":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        assert "need a C++ compiler: install g++" in obstacle()
    else:
        monkeypatch.setenv("AGLN_FAST_TENSORRT_INCLUDE", str(tmp_path))
        assert f"{tmp_path} has no NvInfer.h" in obstacle()
        assert "pip install kernel-lens" in obstacle()


def test_a_builder_on_a_gpu_may_run_what_nobody_attached(built, tmp_path):
    """And says what cannot be done there, as an attached one does."""
    found = _attach(built, tmp_path, threads=0, FAKE_CUDA_CAPABILITY="90")
    assert (found["shape"], found["enqueue"]) == (0, [0])
    assert len(found["launches"]) == 1
    found = _attach(built, tmp_path, threads=0, FAKE_CUDA_CAPABILITY="75")
    assert (found["shape"], found["enqueue"]) == (-1, [-1])


def test_a_tensor_that_begins_amid_sixteen_bytes_is_refused(built, tmp_path):
    found = _attach(built, tmp_path, FAKE_CUDA_CAPABILITY="90", INPUT_AT="0x1008")
    assert (found["enqueue"], found["launches"]) == ([-1], [])
    assert "a tensor begins at no multiple of 16 bytes" in found["messages"]


def test_modules_are_unloaded_where_they_were_loaded(built, tmp_path):
    found = _attach(built, tmp_path, threads=3, FAKE_CUDA_CAPABILITY="90")
    assert found["modules"] == [3, 3]


def test_what_a_launcher_does_beside_launching_is_refused():
    """A copy that a launcher makes would be missing in the layer."""
    with (
        pytest.raises(BuildError, match="its launcher calls aten::clone, which a layer would not do"),
        _OnlyLaunches("op"),
    ):
        torch.empty(4, 4).t().contiguous()
    with _OnlyLaunches("op"):
        torch.empty(2, 2).view(4)


def test_old_headers_are_passed_over(tmp_path, monkeypatch):
    (tmp_path / "NvInfer.h").touch()
    for text, good in (("#define NV_TENSORRT_MAJOR 8\n", False), ("#define TRT_MAJOR_ENTERPRISE 10\n", True)):
        (tmp_path / "NvInferVersion.h").write_text(text)
        monkeypatch.setenv("AGLN_FAST_TENSORRT_INCLUDE", str(tmp_path))
        assert (obstacle() is None) == good


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A stand-in for the library of TensorRT whose headers there are."""
    folder = tmp_path_factory.mktemp("nvinfer")
    text = (headers()[0] / "NvInferVersion.h").read_text()
    major = re.search(r"^#define (?:NV_TENSORRT|TRT)_MAJOR(?:_ENTERPRISE)? (\d+)", text, re.MULTILINE)[1]
    name = f"libnvinfer.so.{major}"
    include = [f"-I{path}" for path in headers()]
    command = [compiler(), "-w", "-std=c++17", "-shared", "-fPIC", f"-Wl,-soname,{name}", *include]
    subprocess.run([*command, HERE / "fake_nvinfer.cpp", "-o", folder / name], check=True)
    return folder / name


def loaded(*files, **environment):
    """What a process says that only loads libraries, one after the other."""
    script = "import ctypes, sys\nfor file in sys.argv[1:]: ctypes.CDLL(file)"
    command = [sys.executable, "-c", script, *map(str, files)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)


def test_layers_register_themselves_where_that_is_asked_for(built, stand_in):
    """As Triton Inference Server loads them: it never asks a library for its layers."""
    assert loaded(stand_in, built.library).stdout == ""
    done = loaded(stand_in, built.library, AGLN_FAST_REGISTER_LAYERS="1")
    assert (set(done.stdout.splitlines()), done.stderr) == ({f"{name} 1 agln" for name in operators()}, "")


def test_layers_do_not_register_themselves_twice_nor_nowhere(built, stand_in, tmp_path):
    again = tmp_path / "again.so"
    again.write_bytes(built.library.read_bytes())
    told = loaded(stand_in, built.library, again, AGLN_FAST_REGISTER_LAYERS="1").stderr
    assert told == "agln-fast: TensorRT takes no layers of ours: it has them already\n"
    told = loaded(built.library, AGLN_FAST_REGISTER_LAYERS="1").stderr
    assert re.match(r"agln-fast: no TensorRT \d+, with whose headers this library was compiled, is loaded: ", told)
