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
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from agln_fast.bench.kernels.calls import CALLS, Case
from agln_fast.bench.kernels.page import replace_section
from agln_fast.errors import ConfigError
from agln_fast.export.records import recording
from agln_fast.kernels.devices import DEVICES
from agln_fast.kernels.registration import OPS

__all__ = ["DTYPES", "Compiled", "compared", "compile_op"]


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MMA = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma.sync"}


@dataclass(frozen=True)
class Compiled:
    """One kernel, compiled.

    tile: the tile sizes and switches it was compiled with.
    registers: of each thread; spill_bytes: of each thread, in local memory; shared_bytes: of each block.
    tensor_cores: the family of instructions, or "" for none.
    blocks: that a multiprocessor runs at once. load_bytes, store_bytes: of the widest access to global memory.
    moved: bytes of all tensors that it is given.
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
    blocks: int
    load_bytes: int
    store_bytes: int
    moved: int


# Where nothing is a multiple of 16, and more channels are than fit a tile.
_ODD: dict[str, Any] = {
    "side": 127,
    "channels": 300,
    "descriptors": 150,
    "classes": 59,
    "memory_format": torch.contiguous_format,
}


def compile_op(op: str, dtype: torch.dtype, capability: str, *, odd: bool = False) -> list[Compiled]:
    """Compile every kernel that `op` launches, in its shipped configuration.

    Args:
        op: of OPS; dtype: of DTYPES; capability: of DEVICES.
        odd: for sizes that suit no tile, in the place of AGLN's.

    Raises:
        ConfigError: the process interprets kernels (TRITON_INTERPRET), so nothing is compiled.
    """
    from triton import knobs

    if knobs.runtime.interpret:
        raise ConfigError("TRITON_INTERPRET is set, so nothing is compiled: unset it")
    call, case = CALLS[op], Case(1, 128, dtype, draws=False)
    device = capability, DEVICES[capability].processors
    with recording(capability) as found:
        for changes in [{**_ODD, **change} for change in call.odd] if odd else [{}]:
            size = replace(case, **changes)
            OPS[op].launch(call.arguments(size), call.keywords(size), device)
    rows = []
    for noted in found:
        compiled, kwargs = noted.compiled, noted.keywords
        registers, spill_bytes = _resources(compiled.asm["cubin"])
        tensors = {x.data_ptr(): x for _, x in noted.arguments if isinstance(x, torch.Tensor)}
        load_bytes, store_bytes = _widths(compiled.asm["ptx"])
        threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
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
                DEVICES[capability].blocks_at_once(threads, registers, shared),
                load_bytes,
                store_bytes,
                sum(x.nbytes for x in tensors.values()),
            )
        )
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _widths(ptx: str) -> tuple[int, int]:
    """Bytes of the widest load from global memory, and of the widest store, of one thread."""
    widest = {"ld": 0, "st": 0}
    for kind, count, bits in re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        widest[kind] = max(widest[kind], int(count or 1) * int(bits) // 8)
    for size in re.findall(r"cp\.async\.c[ag]\.shared\.global[^;]*?, (0x[0-9a-f]+|\d+)[,;]", ptx):
        widest["ld"] = max(widest["ld"], int(size, 0))
    return widest["ld"], widest["st"]


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
    """A table for each op, with a line for each kernel, tile and range of capabilities that it is shipped for.

    Where registers or shared memory differ between capabilities or between float16 and bfloat16, both ends are given.
    """
    ops: dict[str, dict[tuple[str, ...], list[Compiled]]] = {}
    for row in rows:
        bits = "32" if row.dtype == "float32" else "16"
        key = row.kernel.strip("_").removesuffix("_kernel"), bits, _tile(row.tile), f"{row.num_warps}, {row.num_stages}"
        ops.setdefault(row.op, {}).setdefault(key, []).append(row)
    lines = []
    for op, kernels in ops.items():
        lines += [
            f"### {op}",
            "",
            "| kernel | bits | tile | warps, stages | on | registers | KiB | products |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for names, found in kernels.items():
            cells = [
                _capabilities(row.capability for row in found),
                _ends(row.registers for row in found),
                _ends(round(row.shared_bytes / 1024) for row in found),
                ", ".join(dict.fromkeys(row.tensor_cores.removesuffix(".sync") or "none" for row in found)),
            ]
            lines.append(f"| {' | '.join([*names, *cells])} |")
        lines.append("")
    return "\n".join(lines)


def compared(before: Sequence[Compiled], after: Sequence[Compiled], bytes_per_second: float) -> str:
    """A line for each kernel of an op that changed, or came: what it was on sm90 in half precision, and what it is.

    Its bound is the time to move all that it is given, at `bytes_per_second`.
    """

    def of(rows: Sequence[Compiled]) -> dict[str, list[Compiled]]:
        found: dict[str, list[Compiled]] = {}
        for row in rows:
            if (row.capability, row.dtype) == ("sm90", "float16"):
                found.setdefault(row.op, []).append(row)
        return found

    lines = [
        "| op | kernel | registers | KiB | blocks | bytes a load | MB | bound, µs |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    old = of(before)
    for op, rows in of(after).items():
        if old.get(op) == rows:
            continue
        for when, kernels in (("before", old.get(op, [])), ("now", rows)):
            for row in kernels:
                name = row.kernel.strip("_").removesuffix("_kernel")
                numbers = row.registers, round(row.shared_bytes / 1024), row.blocks, row.load_bytes
                moved = f"{row.moved / 1e6:.1f} | {1e6 * row.moved / bytes_per_second:.1f}"
                lines.append(f"| {op}, {when} | {name} | {' | '.join(map(str, numbers))} | {moved} |")
    return "\n".join(lines)


def _tile(settings: str) -> str:
    """As "N64 P32 WHOLE": sizes, then the switches that are on, but for those that say what the call has."""
    words = []
    for name, _, value in (setting.partition("=") for setting in settings.split()):
        if name.startswith("B") or value not in ("0", "1"):
            words.append(f"{name.removeprefix('B')}{value}")
        elif value == "1" and name not in ("HAS_R", "GATES", "ALIGNED"):
            words.append(name)
    return " ".join(words)


def _capabilities(names: Iterable[str]) -> str:
    """ "all", or their numbers."""
    present = set(names)
    numbers = [name.removeprefix("sm") for name in DEVICES if name in present]
    return "all" if len(numbers) == len(DEVICES) else ", ".join(numbers)


def _ends(values: Iterable[int]) -> str:
    found = sorted(set(values))
    return str(found[0]) if len(found) == 1 else f"{found[0]}–{found[-1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile for every dtype and capability, and print what came out."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(OPS)}; default all")
    parser.add_argument("--capability", action="append", choices=list(DEVICES), help="may be repeated; default all")
    parser.add_argument("--dtype", action="append", choices=[_name(dtype) for dtype in DTYPES], help="the same")
    parser.add_argument("--odd", action="store_true", help="compile for sizes that suit no tile, instead of AGLN's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write", type=Path, help="page of the docs whose table is replaced")
    parser.add_argument("--before", type=Path, help="JSON of older kernels: a table of what changed is written, too")
    parser.add_argument("--measured", type=Path, help="with --before: JSON of the kernels timed on a device of sm90")
    options = parser.parse_args(arguments)
    if options.before and not options.measured:
        parser.error("--before needs --measured")
    unknown = [op for op in options.ops if op not in OPS]
    if unknown:
        parser.error(f"unknown op {unknown[0]!r}; known: {', '.join(OPS)}")
    rows: list[Compiled] = []
    for op in options.ops or OPS:
        for dtype in [dtype for dtype in DTYPES if _name(dtype) in (options.dtype or [_name(dtype)])]:
            for capability in options.capability or DEVICES:
                compiled = compile_op(op, dtype, capability, odd=options.odd)
                rows += compiled
                if not options.json:
                    for row in compiled:
                        print(*asdict(row).values(), flush=True)
    if options.json:
        json.dump([asdict(row) for row in rows], sys.stdout, indent=1)
    if options.write:
        replace_section(options.write, "compiled", to_markdown(rows))
        if options.before:
            before = [Compiled(**row) for row in json.loads(options.before.read_text("utf-8"))]
            roofline = json.loads(options.measured.read_text("utf-8"))["roofline"]
            replace_section(options.write, "compared", compared(before, rows, roofline["bytes_per_second"]))


if __name__ == "__main__":
    main()
