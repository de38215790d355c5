"""The registry under pytest-benchmark: a group for each network and precision class, a test for each contestant.

`agln-fast bench` takes the same contestants in turns, which is what ratios need; this shows one after the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agln_fast.bench.race.arguments import DEFAULT_NETWORKS
from agln_fast.bench.race.cases import choose_entries
from agln_fast.bench.race.contestants import contestant
from agln_fast.bench.race.measure import Entry
from agln_fast.bench.race.weights import random_network
from agln_fast.bench.race.workshop import RaceWorkshop
from agln_fast.contract import IOContract
from agln_fast.engines import check_threads

CUDA = torch.cuda.is_available()
DEVICE, SIDE = ("cuda", 512) if CUDA else ("cpu", 128)
# On a CPU the smallest of each family, so that all of this takes a minute; `agln-fast bench` measures the large ones.
NETWORKS = DEFAULT_NETWORKS if CUDA else ("fpn_nano", "agln_nano", "agln_lite_nano")
ENTRIES, _ = choose_entries(DEVICE)
NUM_CLASSES = 12


@pytest.fixture(scope="module")
def workshop(network: str, tmp_path_factory: pytest.TempPathFactory) -> RaceWorkshop:
    folder: Path = tmp_path_factory.mktemp("workshop")
    threads = check_threads(None) or torch.get_num_threads()
    return RaceWorkshop(random_network(network, NUM_CLASSES), IOContract(SIDE, SIDE), folder, threads, DEVICE)


@pytest.mark.parametrize("network", NETWORKS, scope="module")
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_networks(network: str, entry: Entry, workshop: RaceWorkshop, benchmark: Any) -> None:
    recipe, _ = contestant(entry.contestant).make(workshop, entry.precision)
    image = np.random.default_rng(0).integers(0, 256, (1, SIDE, SIDE, 3), np.uint8)
    opened = recipe.open()
    benchmark.group = f"{network} {SIDE}x{SIDE} {'fp32' if entry.precision == 'fp32' else 'reduced precision'}"
    benchmark.extra_info.update(settings=recipe.settings, plan=str(recipe.rewrites))
    benchmark.pedantic(opened.run, (image,), rounds=5, warmup_rounds=1)
    opened.close()
