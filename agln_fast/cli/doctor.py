"""`agln-fast doctor`: what this machine has, and what to install for what is missing."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.table import Table

from agln_fast.cli.console import Json, out, print_json, shown

__all__ = ["doctor", "examine"]

# What engines are built with; what they need to run, their kinds know.
_BUILD = {
    "nncf": 'pip install "agln-fast[int8]"',
    "onnx": "the core install brings it: pip install agln-fast",
    "triton": "Linux only: pip install triton",
}


def doctor(json: Json = False) -> None:
    """Report Python, PyTorch, GPU and driver, engine libraries and CPU features, and what to do about gaps."""
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
    import torch

    from agln_fast.engines import KINDS

    def row(what: str, found: str | None, advice: str = "") -> dict[str, Any]:
        return {"what": what, "found": found, "advice": advice}

    rows = [
        row("agln-fast", version("agln-fast")),
        row("Python", platform.python_version()),
        row("system", f"{platform.system()} {platform.machine()}"),
        row("PyTorch", torch.__version__),
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(index)
            memory = f"{gpu.total_memory / 2**30:.0f} GiB"
            rows.append(
                row(f"GPU {index}", f"{gpu.name}, sm{gpu.major}{gpu.minor}, {memory}, CUDA {torch.version.cuda}")
            )
        rows.append(row("driver", _driver()))
    elif torch.version.cuda is None:
        rows.append(row("GPU", None, "this PyTorch is a CPU build; for a GPU install a CUDA build"))
    else:
        rows.append(row("GPU", None, "no CUDA device is visible; check the driver with nvidia-smi"))
    for kind in KINDS.values():
        found = kind.versions(kind.precisions[0])
        rows.append(row(kind.name, ", ".join(found.values()) or None, kind.missing() or ""))
    for package, advice in _BUILD.items():
        try:
            rows.append(row(package, version(package)))
        except PackageNotFoundError:
            rows.append(row(package, None, advice))
    features = torch.cpu.get_capabilities()
    cpu = str(features.get("cpu_name", platform.processor()))
    rows.append(row("CPU", f"{cpu}, {torch.get_num_threads()} threads"))
    for what, flag, without in (
        ("AVX2", "avx2", "CPU engines will be slow"),
        ("AVX-512", "avx512_f", "fp32 engines run at AVX2 speed"),
        ("AMX bf16", "amx_bf16", "bf16 on the CPU brings nothing here: keep fp32"),
    ):
        rows.append(row(what, "yes" if features.get(flag) else None, "" if features.get(flag) else without))
    return rows


def _driver() -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False).stdout.split()
    return answer[0] if answer else None
