"""What the compiler makes of every kernel: registers, spills, shared memory, tensor cores; no GPU needed.

    python -m agln_fast.bench.kernels.cross_compile [OP ...] [--json] [--write docs/kernels.md]

Each op's own launcher is called on CPU tensors, with Triton told that the device is one of a given compute capability:
what is compiled, with which constants and which alignment, is exactly what a launch on that device compiles. The
process must not have TRITON_INTERPRET set.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from agln_fast.bench.kernels.calls import CALLS, Case
from agln_fast.errors import ConfigError
from agln_fast.kernels.registration import OPS

__all__ = ["CAPABILITIES", "DTYPES", "Compiled", "compile_op"]

# Compute capability -> multiprocessors of its best-known GPU (A100, RTX 3090, L4, H200, B200, RTX 5090), and the shared
# memory that one block may use there, KiB (CUDA C++ Programming Guide, table "Technical Specifications").
CAPABILITIES = {
    "sm80": (108, 163),
    "sm86": (82, 99),
    "sm89": (58, 99),
    "sm90": (132, 227),
    "sm100": (148, 227),
    "sm120": (170, 99),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MMA = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma.sync"}


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled.

    tile: the tile sizes and switches it was compiled with.
    registers: of each thread; spill_bytes: of each thread, in local memory; shared_bytes: of each block.
    tensor_cores: the family of instructions, or "" for none.
    """

    op: str
    kernel: str
    dtype: str
    capability: str
    tile: str
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_cores: str


# Where nothing is a multiple of 16, and more channels are than fit a tile.
_ODD: dict[str, Any] = {
    "side": 127,
    "channels": 300,
    "descriptors": 150,
    "classes": 59,
    "memory_format": torch.contiguous_format,
}


class _Device:
    """Stands in for Triton's driver: a device that is compiled for, and never run on."""

    def __init__(self, capability: str) -> None:
        self._number = int(capability.removeprefix("sm"))

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._number, 32)

    def get_current_device(self) -> int:
        return self._number  # Triton keeps what it has compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compiling(capability: str) -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """Kernels are compiled instead of launched; yields the list of them, each with its keyword arguments."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    found: list[tuple[Any, dict[str, Any]]] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        found.append((compiled, kwargs))
        return compiled

    with patch.object(driver, "_active", _Device(capability)), patch.object(JITFunction, "run", compile_only):
        yield found


def compile_op(op: str, dtype: torch.dtype, capability: str, *, odd: bool = False) -> list[Compiled]:
    """Compile every kernel that `op` launches, in its shipped configuration.

    Args:
        op: of OPS; dtype: of DTYPES; capability: of CAPABILITIES.
        odd: for sizes that suit no tile, in the place of AGLN's.

    Raises:
        ConfigError: the process interprets kernels (TRITON_INTERPRET), so nothing is compiled.
    """
    from triton import knobs

    if knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set, so nothing is compiled: unset it")
    call, case = CALLS[op], Case(1, 128, dtype, draws=False)
    device = capability, CAPABILITIES[capability][0]
    with _compiling(capability) as found:
        for changes in [{**_ODD, **change} for change in call.odd] if odd else [{}]:
            size = replace(case, **changes)
            OPS[op].launch(call.arguments(size), call.keywords(size), device)
    rows = []
    for compiled, kwargs in found:
        registers, spill_bytes = _resources(compiled.asm["cubin"])
        settings = {key: value for key, value in kwargs.items() if key.isupper() and key != "PRECISION"}
        rows.append(
            Compiled(
                op,
                compiled.metadata.name,
                _name(dtype),
                capability,
                " ".join(f"{key}={int(value)}" for key, value in settings.items()),
                compiled.metadata.num_warps,
                compiled.metadata.num_stages,
                registers,
                spill_bytes,
                compiled.metadata.shared,
                next((name for mark, name in _MMA.items() if mark in compiled.asm["ptx"]), ""),
            )
        )
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory (stack included), of each thread, as cuobjdump reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        answer = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", answer)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def to_markdown(rows: Sequence[Compiled]) -> str:
    """A table of one line for each kernel, dtype and configuration, and a column for each capability."""
    lines = [
        f"| op | kernel | dtype | tile | warps, stages | {' | '.join(CAPABILITIES)} |",
        f"| --- | --- | --- | --- | --- |{' --- |' * len(CAPABILITIES)}",
    ]
    found: dict[tuple[str, ...], dict[str, Compiled]] = {}
    for row in rows:
        kernel = row.kernel.strip("_").removesuffix("_kernel")
        key = (row.op, kernel, row.dtype, row.tile, f"{row.num_warps}, {row.num_stages}")
        found.setdefault(key, {})[row.capability] = row
    for names, columns in found.items():
        cells = [_cell(columns[capability]) if capability in columns else "" for capability in CAPABILITIES]
        lines.append(f"| {' | '.join([*names, *cells])} |")
    return "\n".join(lines) + "\n"


def _cell(row: Compiled) -> str:
    cell = f"{row.registers}, {row.shared_bytes / 1024:.0f} KiB"
    return f"{cell}, {row.tensor_cores}" if row.tensor_cores else cell


_BEGIN, _END = "<!-- compiled: begin -->\n", "<!-- compiled: end -->\n"


def _write(path: Path, table: str) -> None:
    before, marker, rest = path.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not marker or not end:
        raise ConfigError(f"{path}: needs the two lines {_BEGIN.strip()} and {_END.strip()} for the table")
    path.write_text(before + _BEGIN + table + _END + after)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile for every dtype and capability, and print what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; default all")
    parser.add_argument(
        "--capability", action="append", choices=list(CAPABILITIES), help="may be repeated; default all"
    )
    parser.add_argument("--dtype", action="append", choices=[_name(dtype) for dtype in DTYPES], help="the same")
    parser.add_argument("--odd", action="store_true", help="compile for sizes that suit no tile, instead of AGLN's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write", type=Path, help="page of the docs whose table is replaced")
    options = parser.parse_args(arguments)
    unknown = [op for op in options.ops if op not in OPS]
    if unknown:
        parser.error(f"unknown op {unknown[0]!r}; known: {', '.join(OPS)}")
    rows: list[Compiled] = []
    for op in options.ops or OPS:
        for dtype in [dtype for dtype in DTYPES if _name(dtype) in (options.dtype or [_name(dtype)])]:
            for capability in options.capability or CAPABILITIES:
                compiled = compile_op(op, dtype, capability, odd=options.odd)
                rows += compiled
                if not options.json:
                    for row in compiled:
                        print(*asdict(row).values(), flush=True)
    if options.json:
        json.dump([asdict(row) for row in rows], sys.stdout, indent=1)
    if options.write:
        _write(options.write, to_markdown(rows))


if __name__ == "__main__":
    main()
