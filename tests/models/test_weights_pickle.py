"""What a pickle names is never called, never imported, and costs no more memory than its size explains."""

from __future__ import annotations

import argparse
import collections
import decimal
import gc
import io
import pathlib
import pickle
import random
import subprocess
import sys
import textwrap
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from pickles import archive, call, dictionary, legacy, name, number, pickled, text, together

import agln_fast
from agln_fast.errors import CheckpointError, printable
from agln_fast.models import weights_pickle
from agln_fast.models.weights_file import read_weights
from agln_fast.models.weights_names import CONTAINERS
from agln_fast.models.weights_pickle import Inert, read_pickle

FLOATS = ("float16", "float32", "float64", "longdouble", "complex64", "complex128", "clongdouble")
INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
BESIDE = {
    **{kind: np.ones((), kind)[()] for kind in FLOATS + INTEGERS},
    "big endian": np.ones((), ">f4")[()],
    "str_": np.str_("naïve"),
    "bytes_": np.bytes_(b"\xff\x00"),
    "datetime64": np.datetime64("2021-06-01T12:00"),
    "timedelta64": np.timedelta64(3, "h"),
    "structure": np.zeros((), "f4,i2")[()],
    "array of no dimension": np.array(0.5),
    "array": np.arange(6, dtype="i2").reshape(2, 3),
    "Fortran order": np.zeros((3, 2), order="F"),
    "array of words": np.array(["road", "sky"]),
    "type": np.float32,
    "dtype": np.dtype("f8"),
    "random state": np.random.RandomState(0).get_state(),
    "settings": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs")),
    "default": collections.defaultdict(list, {"loss": [0.5]}),
    "queue": collections.deque([1.0], 20),
    "bytes": b"\xff",
    "set": {1, 2},
    "tuples as keys": {(0, 1): 0.5},
    "whole numbers' type": int,
    "simple": types.SimpleNamespace(lr=0.1),
    "range": range(3),
    "decimal": decimal.Decimal("0.1"),
    "generator": np.random.default_rng(0),
    "whole optimizer": torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], 0.1),
    "whole scaler": torch.amp.GradScaler(enabled=False),
    "ordered": collections.OrderedDict(a=1),
    "type of tensors": torch.bfloat16,
    "size": torch.Size([2]),
    "device": torch.device("cpu"),
    "optimizer": {"state": {0: {"step": torch.tensor(3.0), "momentum": torch.zeros(2)}}, "groups": [{"lr": 0.1}]},
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_stands_beside_weights_is_read_without_calling_numpy(protocol, beside):
    calls = []
    file = io.BytesIO()
    torch.save({"a": BESIDE[beside], "b": 7}, file, pickle_protocol=protocol)
    with zipfile.ZipFile(file) as opened:
        data = opened.read("archive/data.pkl")
    gc.disable()  # Hypothesis looks at the clock whenever garbage is collected
    sys.setprofile(lambda _, event, function: calls.append(function) if event == "c_call" else None)
    try:
        read = read_pickle(io.BytesIO(data))
    finally:
        sys.setprofile(None)
        gc.enable()
    assert read["b"] == 7
    assert len(calls) > 10
    called = {getattr(function, "__module__", None) or type(function.__self__).__module__ for function in calls}
    assert called <= {"builtins", "_io", "_struct", "sys", "math"}


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
@pytest.mark.parametrize("kind", ["f2", "i1", "b1", "U3"])
def test_both_names_of_numpys_scalar_are_known(kind, module):
    dtype = call(name("numpy", "dtype"), text(kind), b"\x89", b"\x88")
    dtype += together(number(3), text("<"), b"N", b"N", b"N", number(-1), number(-1), number(0)) + b"b"
    scalar = call(name(module, "scalar"), dtype, call(name("_codecs", "encode"), text("\x00<"), text("latin1")))
    assert isinstance(read_pickle(io.BytesIO(pickled(scalar))), Inert)


def test_pickles_of_python_2_are_read():
    pairs = b"](](U\x01a" + number(1) + b"e](U\x01\xff" + number(2) + b"ee"
    body = call(name("collections", "OrderedDict"), pairs)
    assert read_pickle(io.BytesIO(pickled(body))) == {"a": 1, "\ufffd": 2}
    assert read_pickle(io.BytesIO(pickled(call(name("__builtin__", "set"), b"]")))) == Inert("builtins.set")


@pytest.mark.parametrize(
    ("module", "attribute"),
    [
        ("posix", "system"),
        ("builtins", "eval"),
        ("__builtin__", "getattr"),
        ("torch", "load"),
        ("torch", "_dynamo"),
        ("torch.nn.modules.linear", "Linear"),
        ("numpy", "load"),
        ("numpy.testing", "dtype"),
        ("copyreg", "_reconstructor"),
        ("torch\x1b[2J", "\u202esystem"),
    ],
)
def test_all_other_names_are_refused_and_nothing_is_imported(module, attribute):
    loaded = set(sys.modules)
    with pytest.raises(CheckpointError, match="refused: besides weights it wants to load") as caught:
        read_pickle(io.BytesIO(pickled(call(name(module, attribute), text("x")))))
    assert str(caught.value).isprintable()
    assert set(sys.modules) == loaded


MALFORMED = {
    "nothing on the stack": b"R",
    "call of a value": number(1) + together() + b"R",
    "call without tuple": name("numpy", "dtype") + b"]R",
    "mark missing": b"t",
    "item of a number": number(1) + text("a") + text("b") + b"s",
    "odd items": b"}(" + text("a") + b"u",
    "unknown memo": b"h\x07",
    "unknown code": b"\xff",
    "storage of nothing": together(text("storage")) + b"Q",
    "storage of a function": together(text("storage"), name("numpy", "dtype"), text("0"), text("cpu"), number(1))
    + b"Q",
    "negative storage": together(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(-1))
    + b"Q",
    "module by id": together(text("module"), name("torch", "Tensor"), text("a"), text("b")) + b"Q",
    "module of no class": together(text("module"), text("x"), text("a"), text("b")) + b"Q",
    "tensor of too little": call(name("torch._utils", "_rebuild_tensor_v2"), text("x")),
    "text that is none": b"X\x01\x00\x00\x00\xff",
    "a type in a type": call(
        name("torch._tensor", "_rebuild_from_type_v2"),
        name("torch._tensor", "_rebuild_from_type_v2"),
        name("torch", "Tensor"),
        together(),
        b"}",
    ),
    "a name that is a tuple": text("collections") + together(text("OrderedDict")) + b"\x93",
    "a module that is a number": number(1) + text("OrderedDict") + b"\x93",
    "a long name": text("collections") + text("x" * 200) + b"\x93",
    "nothing at the end": b"",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_pickles_are_told(case):
    with pytest.raises(CheckpointError, match=r"^truncated, damaged, or not a checkpoint of PyTorch$"):
        read_pickle(io.BytesIO(pickled(MALFORMED[case])))


def test_a_pickle_that_ends_early_is_told_wherever_it_ends():
    data = pickle.dumps({"a": [0.5, None, "x"], "b": np.float32(1)}, protocol=4)
    for length in range(len(data)):
        with pytest.raises(CheckpointError, match="truncated"):
            read_pickle(io.BytesIO(data[:length]))


@pytest.mark.parametrize("shape", [(-1,), (1 << 70,), (2,) * 9, (True,)], ids=["negative", "huge", "9-d", "bool"])
def test_impossible_shapes_are_told(shape):
    storage = together(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(1)) + b"Q"
    sizes = together(*(b"\x88" if n is True else number(n) for n in shape))
    strides = together(*(number(1) for _ in shape))
    tensor = call(name("torch._utils", "_rebuild_tensor_v2"), storage, number(0), sizes, strides, b"\x89", b"}")
    with pytest.raises(CheckpointError, match="not a checkpoint of PyTorch"):
        read_pickle(io.BytesIO(pickled(tensor)))


def test_keys_that_are_no_text_are_all_one():
    numbers = b"".join(number(i * ((1 << 61) - 1)) + b"N" for i in range(1, 4))  # the hash of each is 0
    read = read_pickle(io.BytesIO(pickled(b"}(" + numbers + text("a") + b"N" + together() + b"Nu")))
    assert read == {Inert("int"): None, "a": None, Inert("tuple"): None}


def test_a_recursion_that_is_too_deep_is_damage(monkeypatch):
    def recurse(_: object) -> object:
        return recurse(_)

    monkeypatch.setitem(weights_pickle._MAKERS, "collections.OrderedDict", recurse)
    with pytest.raises(CheckpointError, match="not a checkpoint of PyTorch"):
        read_pickle(io.BytesIO(pickled(call(name("collections", "OrderedDict")))))


def test_more_values_and_bytes_than_any_training_writes_are_refused(monkeypatch):
    monkeypatch.setattr(weights_pickle, "_MOST_STEPS", 1000)
    with pytest.raises(CheckpointError, match="more than 1,000 values beside the weights"):
        read_pickle(io.BytesIO(pickled(b"]" * 2000)))
    # A list that is named again costs two bytes, and would be copied by each call.
    pairs = b"](" + b"](NNeq\x01" + b"h\x01" * 90 + b"eq\x000"
    again = name("collections", "OrderedDict") + b"(h\x00tR0"
    read_pickle(io.BytesIO(pickled(pairs + again + b"N")))
    with pytest.raises(CheckpointError, match="more than 1,000 values"):
        read_pickle(io.BytesIO(pickled(pairs + again * 15 + b"N")))
    monkeypatch.setattr(weights_pickle, "MOST_PICKLE_BYTES", 1 << 20)
    with pytest.raises(CheckpointError, match="more than 1 MiB beside the weights"):
        read_pickle(io.BytesIO(pickled(text("x" * (1 << 20)))))


def test_what_is_printed_has_no_control_characters():
    assert printable("encoder.conv1") == "encoder.conv1"
    assert printable("größe") == "größe"
    assert printable("\x1b[31m\r\n\u202e\ud800") == "\\x1b[31m\\r\\n\\u202e\\ud800"
    assert printable("x" * 1000) == "x" * 200 + "…"


def _crashing() -> bytes:
    """A structured dtype with an object where the file says a number is: NumPy follows the number as a pointer."""

    def dtype(kind: bytes, *state: bytes) -> bytes:
        return call(name("numpy", "dtype"), kind, b"\x89", b"\x88") + together(*state) + b"b"

    pointer = call(name("numpy", "dtype"), text("O"), b"\x89", b"\x88")
    field = dtype(
        text("f8"),
        number(3),
        text("<"),
        together(pointer, together(number(1))),
        b"N",
        b"N",
        number(-1),
        number(-1),
        number(1),
    )
    kind = dictionary(
        {
            "names": b"](" + text("a") + b"e",
            "formats": b"](" + field + b"e",
            "offsets": b"](" + number(0) + b"e",
            "itemsize": number(8),
        }
    )
    address = call(name("_codecs", "encode"), text("@AAAAAAA"), text("latin1"))
    scalar = call(name("numpy.core.multiarray", "scalar"), call(name("numpy", "dtype"), kind), address)
    return dictionary({"state_dict": dictionary({"a": call(name("torch", "Size"), scalar)})})


def _costly() -> dict[str, bytes]:
    """Pickles whose values crash other readers, or cost much more than their size if anything looks inside."""
    nested = b")" + b"\x85" * 200_000
    doubled = b"N" + b"q\x00h\x00\x86" * 60  # 2**60 values, if they are shown
    storage = together(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(1)) + b"Q"
    one = {"x.y": call(name("torch._utils", "_rebuild_tensor"), storage, number(0), together(), together())}
    large = dictionary({f"{i}.x": b"N" for i in range(100_000)}) + b"q\x00"
    return {
        "dtype": _crashing(),
        "nested lists": b"](" * 150_000 + b"e" * 150_000,
        "key of nested tuples": b"}" + nested + b"Ns",
        "key of doubled tuples": b"}" + doubled + b"Ns",
        "module of nested tuples": nested + text("x") + b"\x93",
        "module of doubled tuples": doubled + text("x") + b"\x93",
        "name of doubled tuples": text("x") + doubled + b"\x93",
        "long name again and again": text("int" + "x" * (8 << 20)) + b"q\x000" + (text("numpy") + b"h\x00\x93") * 1000,
        "storage of doubled tuples": doubled + b"Q",
        "call of doubled tuples": doubled + together() + b"R",
        "keys of one hash": b"}("
        + b"".join(b"\x8a\x0a" + (i * ((1 << 61) - 1)).to_bytes(10, "little") + b"N" for i in range(1, 150_000))
        + b"u",
        "one dictionary under many names": b"}("
        + text("x")
        + large
        + b"".join(text(str(i)) + b"h\x00" for i in range(100_000))
        + b"u",
        "one dictionary in many": b"}("
        + text("x")
        + large
        + b"".join(text(str(i)) + b"}" + text("model") + b"h\x00s" for i in range(60_000))
        + b"u",
        "containers in each other": b"}q\x00" + b"".join(text(name) + b"h\x00s" for name in CONTAINERS),
        "names of wrappers": dictionary(one | {"module." * 70 + str(i): b"N" for i in range(19_000)}),
        "names of losses": dictionary(one | {"loss_" * 90 + f"!{i}.x": b"N" for i in range(19_000)}),
        "names of many parts": dictionary(
            {"a." * 240: one["x.y"]} | {"a." * 240 + str(i): b"N" for i in range(19_000)}
        ),
    }


def _random_body(chance: random.Random) -> bytes:
    """Any steps, in an order that mostly leaves something on the stack to work with."""
    storage = together(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(1)) + b"Q"
    functions = ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
    steps = [
        *(bytes([code]) for code in b"N}])\x8f(tleusa01\x85\x86\x87\x90\x91\x94\x93R\x81\x92Qb"),
        *(number(1), number(-1), text("a"), text("storage"), text("state_dict"), storage, b"q\x00", b"h\x00"),
        *(b"q\x00h\x00\x86" * 30, b"\x85" * 2000, text("a") + b"\x93", b"q\x01" + text("a") + b"h\x01\x93"),
        *(name("torch._utils", function) for function in functions),
        *(name("torch._tensor", "_rebuild_from_type_v2"), name("torch", "Size"), name("builtins", "list")),
        text("collections") + text("OrderedDict") + b"\x93",
        call(name("torch._utils", functions[0]), storage, number(0), together(), together(), b"N", b"}"),
    ]
    return b"}NN(" + b"".join(chance.choices(steps, k=chance.randint(1, 40)))


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which limits a process's memory and time")
def test_files_that_crash_or_stall_other_readers_are_refused(tmp_path):
    """In a process of its own, because a crash is a signal, with 30 seconds and 1 GiB more than the libraries need.

    Each pickle is read from both kinds of file; so are random ones, and damaged ones of PyTorch.
    """
    torch.save({"a": torch.ones(3), "b": {"c": np.float16(1), "d": np.zeros(2)}}, tmp_path / "good")
    with zipfile.ZipFile(tmp_path / "good") as opened:
        good = opened.read("good/data.pkl")
    chance = random.Random(0)
    bodies = list(_costly().values()) + [_random_body(chance) for _ in range(500)]
    for source in (good, pickled(_crashing())):
        for _ in range(500):
            data = bytearray(source)
            for _ in range(chance.randint(1, 8)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            bodies.append(bytes(data).removeprefix(b"\x80\x02").removesuffix(b"."))
    with zipfile.ZipFile(tmp_path / "cases", "w") as cases:
        for i, body in enumerate(bodies):
            cases.writestr(f"{i} zip", archive(body, {"data/0": bytes(4)}))
            cases.writestr(f"{i} legacy", legacy(body))
    script = textwrap.dedent("""
        import resource, sys, zipfile
        from pathlib import Path
        from agln_fast.errors import CheckpointError
        from agln_fast.models.checkpoint import load_checkpoint

        load_checkpoint("fpn_nano")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
        spent = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(spent.ru_utime + spent.ru_stime) + 30,) * 2)
        path = Path(sys.argv[1]) / "case.pth"
        with zipfile.ZipFile(Path(sys.argv[1]) / "cases") as cases:
            for case in cases.namelist():
                path.write_bytes(cases.read(case))
                print(case, end=": ", flush=True)
                try:
                    load_checkpoint(path)
                except CheckpointError as error:
                    assert str(error).isprintable()
                    print("refused", flush=True)
    """)
    ran = subprocess.run(
        [sys.executable, "-c", script, tmp_path], capture_output=True, text=True, timeout=300, check=False
    )
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, (lines[-1:], ran.stderr[-2000:])
    assert lines == [f"{i} {kind}: refused" for i in range(len(bodies)) for kind in ("zip", "legacy")]


def test_weights_load_with_numpys_scalars_beside_them(small_network, tmp_path: Path):
    path = tmp_path / "best.pth.tar"
    torch.save({"state_dict": small_network("fpn_resnet18").state_dict(), "beside": BESIDE}, path)
    assert agln_fast.load_checkpoint(path).config.architecture == "fpn"


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_paths_of_every_python_are_known(module):
    """Python 3.13 wrote the module in which it kept them, which others do not have."""
    path = call(name(module, "PosixPath"), text("runs"), text("best.pth"))
    assert read_pickle(io.BytesIO(pickled(path))) == Inert(
        "pathlib.PosixPath" if "_" not in module else f"{module}.PosixPath"
    )


def test_settings_of_omegaconf_are_no_obstacle():
    """As Lightning stores them, written by omegaconf 2.4 and PyTorch 2.13; neither is needed to read it."""
    loaded = set(sys.modules)
    found = read_weights(Path(__file__).parents[1] / "golden" / "lightning_omegaconf.ckpt")
    assert {key: tensor.tolist() for key, tensor in found.state.items()} == {"b": [0.0]}
    assert found.account.unused == ["hyper_parameters", "l"]
    assert not {module for module in set(sys.modules) - loaded if "omegaconf" in module}


@pytest.mark.parametrize(
    "kind", ["easydict.EasyDict", "pytorch_lightning.utilities.parsing.AttributeDict", "yacs.config.CfgNode"]
)
def test_dictionaries_of_every_make_hold_what_they_hold(kind):
    made = name(*kind.rsplit(".", 1)) + b")\x81" + dictionary({"a": b"N"})[1:] + b"}b"
    assert read_pickle(io.BytesIO(pickled(made))) == {"a": None}


WHOLE = {
    "itself": lambda network: network,
    "in a container": lambda network: {"model": network, "epoch": 3},
    "beside its weights": lambda network: {"state_dict": network.state_dict(), "model": network},
    "wrapped": torch.nn.Sequential,
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("case", WHOLE)
def test_a_whole_model_is_refused_with_what_to_do(case, legacy, small_network, tmp_path):
    torch.save(WHOLE[case](small_network()), tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    outermost = (
        r"torch\.nn\.modules\.container\.Sequential" if case == "wrapped" else r"agln_fast\..*\.SegmentationNetwork"
    )
    with pytest.raises(CheckpointError, match=rf"holds a whole model, of class '{outermost}'.*model\.state_dict\(\)"):
        agln_fast.load_checkpoint(tmp_path / "x.pth")


def test_a_call_beside_a_whole_model_is_named_first():
    """The advice to load the file elsewhere must not be given for what would run commands there."""
    model = name("models", "Net") + b")\x81" + dictionary({"_parameters": b"}", "_modules": b"}"}) + b"b"
    with pytest.raises(CheckpointError, match=r"whole model, of class 'models\.Net'"):
        read_pickle(io.BytesIO(pickled(model)))
    for body in (model + call(name("posix", "system"), text("x")), call(name("posix", "system"), text("x")) + model):
        with pytest.raises(CheckpointError, match=r"wants to load 'posix\.system'"):
            read_pickle(io.BytesIO(pickled(body)))


def test_what_is_unknown_is_told_before_what_is_damaged():
    with pytest.raises(CheckpointError, match=r"wants to load 'posix\.system'"):
        read_pickle(io.BytesIO(pickled(call(name("posix", "system"), text("x")) + b"\xff")))
