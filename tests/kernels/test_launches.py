"""How many kernels a run of the fused network launches, and that the table in the docs says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from agln_fast.bench.kernels import launches as module
from agln_fast.bench.kernels.launches import count_launches, deployed, to_markdown
from agln_fast.kernels.registration import OPS

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "matmul", "linear"}
MOST = {"agln_release_resnet50": 106, "agln_resnet50": 118, "fpn_resnet50": 79, "agln_lite_resnet50": 118}


@pytest.mark.parametrize("name", MOST)
def test_a_run_launches_no_more_than_this(name):
    rows = count_launches(deployed(name))
    assert sum(row.launches for row in rows) <= MOST[name]
    assert not {row.what for row in rows} & PRODUCTS, "what cuBLAS would do"
    maps = 512 * 512 * (3 + 1)
    assert sum(row.bytes for row in rows if row.what.startswith("copy")) == maps


def test_the_docs_have_this_table():
    page = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    written = page.partition("<!-- launches: begin -->")[2].partition("<!-- launches: end -->")[0]
    assert written.strip() == to_markdown(count_launches(deployed("agln_release_resnet50")))


def test_an_op_counts_as_often_as_its_launcher_launches():
    """Two kernels of `attention_pool`, whose sums lie in memory of its own."""
    x, w = torch.empty(1, 16, 8, 8).to(memory_format=torch.channels_last), torch.empty(4, 16)
    with module._launches() as found:
        OPS["attention_pool"].launch((x, w, torch.empty(16, 16), torch.empty(16)), {}, ("sm90", 132))
    assert len(found) == 2
    assert any(each.data_ptr() == x.data_ptr() for each in found[0])
    assert not any(each.data_ptr() == x.data_ptr() for each in found[1])
