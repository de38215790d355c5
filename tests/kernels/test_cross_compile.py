"""Every kernel, dtype and shipped configuration compiles for six compute capabilities, within their limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agln_fast.bench.kernels.cross_compile import DTYPES, Compiled, compared, compile_op, to_markdown
from agln_fast.errors import ConfigError
from agln_fast.kernels.devices import DEVICES
from agln_fast.kernels.registration import OPS

# Kernels without a matrix product: they add, sum, look up, or interpolate.
NO_PRODUCT = {"_bias_relu_kernel", "_label_kernel", "_resize_kernel", "_softmax_kernel", "_upsample_kernel"}
# Bytes of a thread: measured on an H100, these tiles are a fifth to a quarter faster than the best without spills.
SPILLS = {("semantic_distribution", "sm90"): 128}
# Bytes of the widest load, where a thread has no more channels: with eight of them it spills.
NARROW = {"_upsample_kernel": 8}
DOCS = Path(__file__).parents[2] / "docs" / "kernels.md"


def compiled(*arguments):
    """In a process of its own: Triton decides at its import whether it interprets or compiles."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "agln_fast.bench.kernels.cross_compile", *arguments, "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert answer.returncode == 0, answer.stderr[-2000:]
    rows = [Compiled(**row) for row in json.loads(answer.stdout)]
    for row in rows:
        assert row.spill_bytes <= SPILLS.get((row.op, row.capability), 0), row
        assert row.shared_bytes <= 1024 * DEVICES[row.capability].shared_kib, row
        if row.dtype == "float16" and "--odd" not in arguments:
            assert row.load_bytes == NARROW.get(row.kernel, 16), row
        product = row.kernel not in NO_PRODUCT and not (row.op == "channel_apply" and "HAS_R=0" in row.tile)
        assert bool(row.tensor_cores) == (product and row.dtype != "float32"), row
    return rows


def test_blocks_at_once():
    """By threads, by registers, by shared memory, and at most so many (CUDA occupancy calculator)."""
    a100, l4, h200 = (DEVICES[name] for name in ("sm80", "sm89", "sm90"))
    assert a100.blocks_at_once(256, 32, 0) == 8
    assert a100.blocks_at_once(256, 255, 0) == 1
    assert a100.blocks_at_once(128, 168, 0) == 3
    assert l4.blocks_at_once(256, 32, 0) == 6
    assert (a100.blocks_at_once(32, 16, 0), l4.blocks_at_once(32, 16, 0)) == (32, 24)
    assert [h200.blocks_at_once(128, 32, kib << 10) for kib in (227, 113, 112, 75)] == [1, 2, 2, 3]


def test_every_op_compiles_for_one_capability():
    rows = compiled(*OPS, "--capability", "sm90", "--dtype", "float16")
    assert {row.op for row in rows} == set(OPS)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_op_compiles_everywhere(op):
    rows = compiled(op)
    assert {(row.dtype, row.capability) for row in rows} == {
        (str(dtype).removeprefix("torch."), capability) for dtype in DTYPES for capability in DEVICES
    }
    documented = DOCS.read_text()
    for line in to_markdown(rows).splitlines()[2:]:
        assert line in documented, "run `python -m agln_fast.bench.kernels.cross_compile --write docs/kernels.md`"


@pytest.mark.slow
def test_sizes_that_suit_no_tile():
    """C = 300, N = 150, K = 59, 127x127 pixels, contiguous: wide loads of padded classes alone, several tiles."""
    rows = compiled(*OPS, "--odd", "--capability", "sm86", "--capability", "sm90")
    assert {row.op for row in rows} == set(OPS)
    assert {row.op for row in rows if row.load_bytes == 16} == {"label_upsample"}
    assert {row.tile.partition("HAS")[2] for row in rows if row.op == "channel_apply"} == {
        "_R=1 HAS_M=1",
        "_R=1 HAS_M=0",
        "_R=0 HAS_M=1",
    }


def test_what_changed_is_compared():
    """24 MB at 2.4 TB/s are 10 µs; what is as it was, of another device or dtype, is left out."""
    same = Compiled("same", "_k", "float16", "sm90", "", 4, 2, 32, 0, 0, "", 8, 16, 16, 10**6)
    before = replace(same, op="op", registers=40, moved=48 * 10**6)
    now = replace(before, registers=80, moved=24 * 10**6)
    others = [replace(now, op="op", capability="sm80"), replace(now, dtype="float32")]
    lines = compared([same, before], [same, now, *others, replace(now, op="new")], 2.4e12).splitlines()
    assert lines[2:] == [
        "| op, before | k | 40 | 0 | 8 | 16 | 48.0 | 20.0 |",
        "| op, now | k | 80 | 0 | 8 | 16 | 24.0 | 10.0 |",
        "| new, now | k | 80 | 0 | 8 | 16 | 24.0 | 10.0 |",
    ]


def test_spills_are_seen():
    """A tile of four times as many channels as the shipped one, on as many warps."""
    program = (
        "import torch\n"
        "from dataclasses import replace\n"
        "from agln_fast.bench.kernels.cross_compile import compile_op\n"
        "from agln_fast.kernels.launch import LaunchConfig\n"
        "from agln_fast.kernels.registration import OPS\n"
        "tile = {'H': 16, 'W': 8, 'C': 256}\n"
        "config = LaunchConfig(('float16',), tile, num_warps=4, num_stages=1)\n"
        "OPS['upsample_taps'] = replace(OPS['upsample_taps'], configs=(config,))\n"
        "print(max(row.spill_bytes for row in compile_op('upsample_taps', torch.float16, 'sm90')))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert int(answer.stdout) > 0


@pytest.mark.interpreter
def test_nothing_is_compiled_while_kernels_are_interpreted():
    with pytest.raises(ConfigError, match="TRITON_INTERPRET is set"):
        compile_op("attention_pool", DTYPES[0], "sm90")
