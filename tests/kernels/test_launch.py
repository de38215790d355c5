"""Launch configurations: which one is taken, and how pixels are divided."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agln_fast.kernels import launch
from agln_fast.kernels.launch import LaunchConfig, block, choose, pixel_block, regular, split

HALF = ("float16", "bfloat16")
CONFIGS = (
    LaunchConfig(HALF, {"P": 64}, 8, 3, capabilities=("sm90",), regular=True),
    LaunchConfig(HALF, {"P": 32}, 8, 2, regular=True),
    LaunchConfig(HALF, {"P": 16}, 4, 1),
)


@pytest.mark.parametrize(
    ("capability", "is_regular", "tile"),
    [("sm90", True, 64), ("sm86", True, 32), ("sm90", False, 16)],
    ids=["its-own", "that-of-all", "irregular"],
)
def test_the_first_that_fits_is_taken(capability, is_regular, tile):
    config = choose(CONFIGS, torch.zeros(1, dtype=torch.bfloat16), is_regular, capability, 77)
    assert (config.tile["P"], config.processors) == (tile, 77)


def test_another_dtype_is_refused():
    with pytest.raises(TypeError, match=r"no kernel for torch\.float32: needs float16"):
        choose(CONFIGS, torch.zeros(1), True, "sm90", 132)


def test_the_device_is_asked_once(monkeypatch):
    calls = []
    monkeypatch.setattr(launch, "_device", lambda device: calls.append(device) or ("sm90", 132))
    assert choose(CONFIGS, torch.zeros(1).half(), True).tile == {"P": 64}
    assert calls == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        pytest.param(torch.empty(2, 256, 15, 15).to(memory_format=torch.channels_last), True, id="channels-last"),
        pytest.param(torch.empty(2, 256, 15, 15), False, id="contiguous-odd-rows"),
        pytest.param(torch.empty(2, 24, 8, 8).to(memory_format=torch.channels_last), False, id="24-channels"),
        pytest.param(torch.empty(2, 512, 8, 8).to(memory_format=torch.channels_last), False, id="too-many-channels"),
        pytest.param(torch.empty(150, 256), True, id="matrix"),
        pytest.param(torch.empty(256, 150), False, id="matrix-of-150-columns"),
        pytest.param(None, True, id="absent"),
    ],
)
def test_regular(x, expected):
    assert regular(torch.empty(16, 16), x) is expected


@given(st.integers(1, 10**6), st.integers(4, 8), st.integers(1, 300), st.integers(1, 8), st.integers(1, 200))
def test_split_covers_all_pixels_in_whole_tiles(count, power, programs, steps, processors):
    step = 2**power
    config = LaunchConfig(HALF, {}, 4, 1, steps=steps, processors=processors)
    parts, size = split(count, step, programs, config)
    assert size % step == 0
    assert (parts - 1) * size < count <= parts * size
    assert parts == 1 or size >= steps * step
    assert parts * programs <= max(processors, programs)


@pytest.mark.parametrize(
    ("count", "programs", "waves", "tile"),
    [
        pytest.param(30 * 30, 1, 1, 16, id="small-map"),
        pytest.param(128 * 128, 1, 1, 128, id="large-map"),
        pytest.param(30 * 30, 8, 1, 64, id="small-maps-of-a-batch"),
        pytest.param(3, 10**6, 1, 16, id="tiny-maps"),
        pytest.param(64 * 64, 1, 2, 32, id="two-programs-each-would-be-small"),
        pytest.param(128 * 128, 1, 2, 64, id="two-programs-each"),
        pytest.param(128 * 128, 8, 2, 128, id="more-than-two-each"),
    ],
)
def test_tiles_of_pixels_leave_no_processor_idle(count, programs, waves, tile):
    assert pixel_block(count, programs, LaunchConfig(HALF, {"P": 128}, 4, 1, waves=waves, processors=132)) == tile


def test_block_is_a_power_of_two_within_its_limits():
    assert [block(size, 64) for size in (1, 16, 17, 33, 64, 1000)] == [16, 16, 32, 64, 64, 64]
