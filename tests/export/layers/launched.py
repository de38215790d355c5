"""Run by test_layers.py in a process of its own, on a stand-in for the CUDA driver: what Triton's own launcher asks of
the driver for a call of an op, and what a layer of our library asks of it for the record of this call.

    python launched.py HARNESS LIBRARY < CASES

CASES is a JSON list of [op, dtype, capability, side, batch]. Printed is a list of objects: "triton" and "layer",
a list of launches each; "record", kind and bytes of their arguments; "workspace", address and bytes of the layer's;
"entries", bytes of the parameters of each kernel in its binary.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import NamedTemporaryFile, mkdtemp
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime import driver

from agln_fast.bench.kernels.calls import CALLS, Case
from agln_fast.export.layers import _as_given
from agln_fast.export.nodes import operators
from agln_fast.export.records import Port, record
from agln_fast.kernels.devices import DEVICES
from agln_fast.kernels.registration import OPS

WEIGHTS = "w_", "b_", "bias"


class Device:
    """Triton's own launcher and utilities, on the stand-in."""

    launcher_cls = CudaLauncher

    def __init__(self, capability: str) -> None:
        self.utils, self._number = CudaUtils(), int(capability.removeprefix("sm"))

    def get_current_target(self):
        return GPUTarget("cuda", self._number, 32)

    def get_current_device(self):
        return self._number  # Triton keeps what it has compiled by device

    def get_current_stream(self, device):
        return 0


def port(name: str, tensor: torch.Tensor) -> Port:
    if name.startswith(WEIGHTS):
        order = (1, 2, 3, 0) if tensor.ndim == 4 and tensor.shape[1] == 1 else ()
        return Port(tuple(tensor.shape[side] for side in order or range(tensor.ndim)), tensor.dtype, order=order)
    return Port((-1, *tensor.shape[1:]), tensor.dtype, channels_last=tensor.ndim == 4)


def parameters(binary: bytes, kernel: str) -> list[int]:
    """Bytes of each parameter of a kernel's entry, in order, as cuobjdump reads them in the binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [tool, "--dump-elf", "--function", kernel, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"KPARAM_INFO.*?Ordinal\s*:\s*(\w+)\s+Offset\s*:\s*\w+\s+Size\s*:\s*(\w+)", text, re.DOTALL)
    sizes = {int(ordinal, 0): int(size, 0) for ordinal, size in found}
    return [sizes[ordinal] for ordinal in range(len(sizes))]


def logged(act) -> list[str]:
    file = Path(mkdtemp()) / "launches.txt"
    os.environ["FAKE_CUDA_LOG"] = str(file)
    act()
    return file.read_text().splitlines() if file.exists() else []


def compare(native: ctypes.CDLL, library: str, op: str, dtype: str, capability: str, side: int, count: int) -> dict:
    operator = next(each for each in operators().values() if each.op == op)
    case = Case(count, side, getattr(torch, dtype), draws=False, classes=152)  # rows of classes that need no copy
    call = CALLS[op]
    keywords = call.keywords(case)
    inputs, attributes = operator.split(call.arguments(case))
    names = [name for name, tensor in zip(operator.input_names(len(inputs)), inputs, strict=True) if tensor is not None]
    ports = [port(name, tensor) for name, tensor in zip(names, (x for x in inputs if x is not None), strict=True)]

    def arguments(tensors):
        left = iter(map(_as_given, ports, tensors))
        return {**operator.bind([None if x is None else next(left) for x in inputs], attributes), **keywords}

    # For other sizes, too: a batch must be found among several.
    found = record(operator.name, op, ports, arguments, (1, count, count + 1), [capability])
    program = found.programs[capability, count]
    sizes = {each.kernel: "".join(str(len(a.value) or 8) for a in each.arguments) for each in program.launches}
    os.environ["FAKE_CUDA_SIZES"] = " ".join(f"{name}:{size}" for name, size in sizes.items())
    os.environ["FAKE_CUDA_CAPABILITY"] = capability.removeprefix("sm")

    given = [each.empty(count) for each in ports]
    results = []

    def by_triton():
        with patch.object(driver, "_active", Device(capability)):
            result = OPS[op].launch((), arguments(given), (capability, DEVICES[capability].processors))
        results.extend(result if isinstance(result, tuple) else (result,))

    by_hand = logged(by_triton)
    data = found.to_bytes()
    layer = native.attach(ctypes.c_void_p(native.create(library.encode(), operator.name.encode(), data, len(data), 0)))
    workspace = torch.empty(max(1, program.workspace), dtype=torch.uint8)
    sides = [each for x in (*given, *results) for each in (x.ndim, *x.shape)]
    pointers = [(ctypes.c_void_p * len(many))(*(x.data_ptr() for x in many)) for many in (given, results)]
    shapes = (ctypes.c_int * len(sides))(*sides)

    def by_layer():
        space = ctypes.c_void_p(workspace.data_ptr())
        status = native.enqueue(ctypes.c_void_p(layer), shapes, len(given), len(results), *pointers, space)
        assert status == 0, ctypes.string_at(native.messages())

    return {
        "triton": by_hand,
        "layer": logged(by_layer),
        "record": [[[each.place, len(each.value) or 8] for each in launch.arguments] for launch in program.launches],
        "workspace": [workspace.data_ptr(), program.workspace],
        "entries": [parameters(found.binaries[launch.binary], launch.kernel) for launch in program.launches],
    }


def main(harness: str, library: str) -> None:
    native = ctypes.CDLL(harness)
    native.create.restype = native.attach.restype = ctypes.c_void_p
    print(json.dumps([compare(native, library, *case) for case in json.load(sys.stdin)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
