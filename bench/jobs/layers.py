"""Which kernels of an engine of TensorRT-RTX are ours: read from its plan, in the order in which they run, and drawn.

python -m agln_fast.bench.jobs.layers ENGINE [-o docs/images/layers.svg]
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from agln_fast.errors import BuildError, MissingPackageError
from agln_fast.export.nodes import operators

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Kernel", "draw_layers", "read_kernels"]

_KERNEL = re.compile(r"^  (\w+)=\{ name=\"?(\w+)", re.MULTILINE)
_CONVOLUTIONS = "corrltn", "runtime_fusion"
_OTHERS = "function", "runtime_function", "maxpool", "fully_connected", "gemm"
_COLOURS = {"ours": "#D55E00", "convolution": "#75787d", "copy": "#E69F00", "other": "#d8dade"}
_WORDS = {"ours": "ours", "convolution": "convolution", "copy": "copy to another order", "other": "other"}
_COLUMNS = 32
_WIDTH, _ROW = 7.16, 0.3  # inches


class Kernel(NamedTuple):
    """kind: "ours", "convolution", "copy" or "other". op: of ours, e.g. "ChannelAffinity"."""

    kind: str
    op: str = ""


def read_kernels(plan: bytes) -> list[Kernel]:
    """What a plan launches, in this order; its programs are text.

    Raises:
        BuildError: no plan of TensorRT-RTX.
    """
    programs = plan.decode("latin1").split("header {\n")[1:]
    if not programs:
        raise BuildError("not a plan of TensorRT-RTX: there is no program in it")
    found = []
    for kind, name in _KERNEL.findall(max(programs, key=lambda text: len(_KERNEL.findall(text)))):
        if kind == "custom_layer":
            found.append(Kernel("ours", _op(name)))
        elif kind in _CONVOLUTIONS:
            found.append(Kernel("convolution"))
        elif kind in _OTHERS:
            moves = re.fullmatch(r"(Move|Resh|Tran)+", name.removeprefix("__myl_"))
            found.append(Kernel("copy" if moves else "other"))
    return found


def _op(node: str) -> str:
    """The operator of a node that the exporter named, e.g. "node_channel_affinity_3"."""
    op = re.sub(r"(_+\d+)+$", "", node.removeprefix("node_"))
    return next((name for name, each in operators().items() if each.op == op), op)


def draw_layers(kernels: Sequence[Kernel], title: str) -> Figure:
    """A cell for each kernel, in rows from left to right, ours with their initials; a count of each kind below.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib", "eval") from None
    from matplotlib.patches import Patch, Rectangle

    rows = -(-len(kernels) // _COLUMNS)
    initials = {each.op: "".join(re.findall("[A-Z]", each.op)) for each in kernels if each.op}
    height = 0.3 + _ROW * rows + 0.75
    figure = Figure((_WIDTH, height))
    axes = figure.add_axes((0.01, 0.75 / height, 0.98, _ROW * rows / height))
    axes.set_xlim(0, _COLUMNS)
    axes.set_ylim(rows, 0)
    axes.axis("off")
    for number, kernel in enumerate(kernels):
        y, x = divmod(number, _COLUMNS)
        axes.add_patch(Rectangle((x + 0.06, y + 0.1), 0.88, 0.8, color=_COLOURS[kernel.kind], linewidth=0))
        if kernel.op:
            axes.text(x + 0.5, y + 0.52, initials[kernel.op], ha="center", va="center", fontsize=7, color="white")
    figure.text(0.012, 1 - 0.08 / height, title, fontsize=9, va="top", weight="bold")
    counts = Counter(kernel.kind for kernel in kernels)
    patches = [Patch(color=_COLOURS[kind], label=f"{_WORDS[kind]}, {counts[kind]}") for kind in _WORDS if counts[kind]]
    figure.legend(
        handles=patches, loc="lower left", bbox_to_anchor=(0, 0.3 / height), ncols=4, fontsize=8, frameon=False
    )
    words = ", ".join(f"{short} {name}" for name, short in initials.items())
    figure.text(0.012, 0.1 / height, words, fontsize=7, va="bottom")
    return figure


def main() -> None:
    """Entry point of the module."""
    from agln_fast.figures.saving import save_figure

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("layers.svg"))
    parser.add_argument("--title", default="Kernels of a run, in order")
    options = parser.parse_args()
    kernels = read_kernels(options.engine.read_bytes())
    save_figure(draw_layers(kernels, options.title), options.output)
    for (kind, op), count in Counter(kernels).items():
        print(f"{count:4d}  {op or kind}")


if __name__ == "__main__":
    main()
