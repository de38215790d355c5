"""A rewrite is known everywhere by its row in the table, a field of a class of plans; here is one more."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from importlib import import_module

import pytest
import torch
from torch import nn

from agln_fast.bench.race.ladder import cumulative
from agln_fast.builder import tune as module
from agln_fast.builder.tune import Candidate
from agln_fast.builder.workshop import Workshop
from agln_fast.contract import IOContract
from agln_fast.engines import KINDS
from agln_fast.engines.onnxruntime import OnnxRuntime
from agln_fast.errors import ConfigError
from agln_fast.plan import rewrites
from agln_fast.plan.network import InferenceNetwork
from agln_fast.plan.plan import ALGEBRA, FUSED, NO_PLAN, Plan, Rewrite
from agln_fast.plan.rewrites import rewrite


@dataclass(frozen=True)
class Wider(Plan):
    drop_identities: bool = Rewrite(turns=(8,), module=__name__).field()


def drop_identities(network: InferenceNetwork) -> InferenceNetwork:
    """Without what folding leaves in the place of BN. Exact because it is the identity."""
    rewritten = network.copy()
    found = [layers for layers in rewritten.modules() if isinstance(layers, nn.Sequential) and _identities(layers)]
    for layers in found:
        for place in reversed(_identities(layers)):
            del layers[place]
    return rewritten if found else network


def _identities(layers: nn.Sequential) -> list[int]:
    return [place for place, layer in enumerate(layers) if isinstance(layer, nn.Identity)]


class Race(module._Race):
    """Plans with the rewrite take half the time."""

    def prepare(self, plans):
        pass

    def fastest(self, plans):
        for plan in plans:
            self.candidates[plan] = Candidate(plan, 1.0 if plan.drop_identities else 2.0)
        return min(plans, key=lambda plan: self.candidates[plan].milliseconds)


def test_every_row_has_a_function_that_says_why_it_is_exact():
    for name, row in Plan.table().items():
        assert "Exact because" in inspect.getdoc(getattr(import_module(row.module), name)), name
    assert set(rewrites.__all__) - {"rewrite"} <= Plan.table().keys()


def test_what_only_leaves_work_out_is_not_decided_on():
    assert {name for name, _, _ in ALGEBRA.steps()} == {name for name, row in Plan.table().items() if row.everywhere}
    more = {name for name, _, _ in FUSED.steps()} - {name for name, _, _ in ALGEBRA.steps()}
    assert more == {"mix_before_upsample", "kernels"}


def test_a_plan_knows_it():
    plan = Wider.from_json('{"drop_identities": true, "fold_batchnorm": true}')
    assert str(plan) == "fold_batchnorm, drop_identities"
    assert Wider.from_json(plan.to_json()) == plan
    assert [name for name, _ in cumulative(plan)] == ["fold_batchnorm", "drop_identities"]
    with pytest.raises(ConfigError, match="drop_identities 1: must be true or false"):
        Wider.from_dict({"drop_identities": 1})


@torch.inference_mode()
def test_a_network_is_rewritten_by_it(small_network):
    model, image = small_network().double(), torch.randn(1, 3, 64, 64, dtype=torch.float64)
    rewritten = rewrite(model, Wider(fold_batchnorm=True, drop_identities=True))
    assert not any(_identities(layers) for layers in rewritten.modules() if isinstance(layers, nn.Sequential))
    torch.testing.assert_close(rewritten(image), model(image), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("start", [ALGEBRA, NO_PLAN], ids=["folded", "nothing to drop"])
def test_a_plan_is_chosen_with_it(start, small_network, tmp_path, monkeypatch):
    """Where it changes the network; elsewhere it is not even tried."""
    monkeypatch.setattr(OnnxRuntime, "start", Wider(**asdict(start)))
    monkeypatch.setattr(module, "NO_PLAN", Wider())
    monkeypatch.setattr(module, "_Race", Race)
    workshop = Workshop(small_network("fcn8s_resnet18"), IOContract(64, 64), tmp_path)
    tuning = module.tune_engine(workshop, KINDS["onnxruntime"], "fp32", budget_s=60)
    assert tuning.plan.drop_identities == start.fold_batchnorm
    assert any(candidate.plan.drop_identities for candidate in tuning.candidates) == start.fold_batchnorm


def test_an_old_plan_is_read():
    """As bundles have it: every rewrite by the name that it had in their format."""
    old = {
        "fold_batchnorm": True,
        "pool_before_projection": True,
        "drop_attention_bias": True,
        "project_descriptors": True,
        "negate_energy": True,
        "drop_dead_branches": True,
        "distribute_before_upsample": False,
        "energy_before_upsample": False,
        "pixel_major_attention": False,
        "mix_before_upsample": ["none", "none", "none"],
        "winograd": 0,
        "low_resolution_labels": False,
    }
    assert Plan.from_dict(old) == ALGEBRA
    assert Plan.from_dict({name: not value if isinstance(value, bool) else value for name, value in old.items()}) == (
        Plan(
            distribute_before_upsample=True,
            energy_before_upsample=True,
            pixel_major_attention=True,
            low_resolution_labels=True,
        )
    )
    assert NO_PLAN.to_dict().keys() - old.keys() == {"kernels"}, "what came since"


def test_kernels_come_after_folding_and_without_winograd():
    assert Plan(fold_batchnorm=True, kernels=True).kernels
    with pytest.raises(ConfigError, match="kernels needs fold_batchnorm"):
        Plan(kernels=True)
    with pytest.raises(ConfigError, match="kernels and winograd exclude each other"):
        Plan(fold_batchnorm=True, kernels=True, winograd=1)
