"""`agln-fast doctor`: what this machine has, and what to install for what is missing."""

from __future__ import annotations

import platform
from typing import Any

from rich.table import Table

from agln_fast.cli.console import Json, out, print_json, shown

__all__ = ["doctor", "examine"]

# What engines are built with; what they need to run, their kinds know.
_BUILD = {
    "onnx": 'only to build: pip install "agln-fast[build]"',
    "nncf": 'only to build int8: pip install "agln-fast[int8]"',
    "triton": "only for kind fused on a GPU, Linux only: pip install triton",
}


def doctor(json: Json = False) -> None:
    """Report Python, GPU and driver, engine libraries, what builds engines, CPU features, and what to do about gaps."""
    rows = examine()
    if json:
        print_json(rows)
        return
    table = Table("what", "found", "to do", title="agln-fast doctor")
    for row in rows:
        table.add_row(row["what"], shown(row["found"] or "–"), shown(row["advice"]))
    out.print(table)


def examine() -> list[dict[str, Any]]:
    """Rows of `what`, `found` (None if it is not there) and `advice` (empty if all is well)."""
    from agln_fast.engines import KINDS
    from agln_fast.export.plugins import compiler, headers, obstacle
    from agln_fast.machine import gpus, installed, processor, threads_of

    def row(what: str, found: str | None, advice: str = "") -> dict[str, Any]:
        return {"what": what, "found": found, "advice": advice}

    rows = [
        row("agln-fast", installed("agln-fast")),
        row("Python", platform.python_version()),
        row("system", f"{platform.system()} {platform.machine()}"),
    ]
    found_gpus = gpus()
    for index, gpu in enumerate(found_gpus):
        rows.append(row(f"GPU {index}", f"{gpu.name}, {gpu.capability}, {gpu.memory_mib / 1024:.0f} GiB"))
        rows.append(row("driver", gpu.driver))
    if not found_gpus:
        rows.append(row("GPU", None, "nvidia-smi finds none; engines for the CPU need none"))
    elif "+cpu" in (installed("torch") or ""):
        rows.append(row("CUDA", None, "this PyTorch is a CPU build; for the GPU install a CUDA build"))
    for kind in KINDS.values():
        found = kind.versions(kind.precisions[0])
        rows.append(row(kind.name, ", ".join(found.values()) or None, kind.missing() or ""))
    for package, advice in _BUILD.items():
        number = installed(package)
        rows.append(row(package, number, "" if number else advice))
    reason = obstacle()
    rows.append(
        row(
            "our layers",
            None if reason else f"{compiler()}, {headers()[0]}",
            f"only to build with kernels of ours: {reason}" if reason else "",
        )
    )
    cpu = processor()
    rows.append(row("CPU", f"{cpu.name}, {threads_of(None)} threads"))
    for what, flag, without in (
        ("AVX2", "avx2", "CPU engines will be slow"),
        ("AVX-512", "avx512f", "fp32 engines run at AVX2 speed"),
        ("bf16", "avx512_bf16", "bf16 on the CPU brings nothing here: keep fp32"),
        ("AMX bf16", "amx_bf16", "bf16 on the CPU runs at the speed of AVX-512"),
    ):
        rows.append(row(what, "yes" if flag in cpu.flags else None, "" if flag in cpu.flags else without))
    return rows
