"""Where the fused network's ops go: to the Triton kernels on a CUDA device, to the references on the CPU."""

from __future__ import annotations

import inspect
from collections import Counter
from contextlib import suppress
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import agln_fast
from agln_fast.bench.kernels.calls import CALLS, Case
from agln_fast.kernels import label_upsample, registration
from agln_fast.kernels.registration import OPS

# How often AGLN-Lite and one label map call each op, by formulation: the release has no Ψ.
_BOTH = {"attention_pool": 3, "channel_affinity": 6, "upsample_bilinear": 3, "upsample_taps": 1, "label_upsample": 1}
ALL = {
    "paper": {**_BOTH, "semantic_distribution": 6, "channel_apply": 6, "separable_conv": 12},
    "release": {**_BOTH, "context_fusion": 6, "separable_conv": 6},
}
formulations = pytest.mark.parametrize("formulation", ALL)


class OnCuda(Tensor):
    """A tensor that says it is on a CUDA device; what it holds lies on the CPU, and is computed with there.

    Fused ops are the exception: they go to what is registered for CUDA.
    """

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=torch.device("cuda", 0)
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "agln":
            with torch._C._DisableTorchDispatch():
                return func(*args, **kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        result = func(*held(args), **held(kwargs))
        # Of what is written in place, the wrapper is there already.
        wrappers = {id(x.inner): x for x in args if isinstance(x, cls)}
        return tree_map_only(Tensor, lambda x: wrappers[id(x)] if id(x) in wrappers else cls(x), result)


def held(tree):
    return tree_map_only(OnCuda, lambda x: x.inner, tree)


class Calls(TorchDispatchMode):
    """Counts what is called of the fused ops, wherever it goes."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "agln":
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def kernel_of(op):
    return import_module(f"{OPS[op].package}.kernel")


@pytest.fixture
def launched(monkeypatch):
    """A counter of Triton's host wrappers that ran."""
    kernels = Counter()

    def spy(op, module):
        original = getattr(module, op)

        def counted(*args, **kwargs):
            kernels[op] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, op, counted)

    for op in OPS:
        spy(op, kernel_of(op))
    return kernels


@pytest.fixture
def simulated(monkeypatch):
    """Kernels that compute as the reference does, on what `OnCuda` tensors hold, for no device in particular."""

    def simulate(op):
        reference, parameters = OPS[op].reference, inspect.signature(getattr(kernel_of(op), op))

        def launch(*args, **kwargs):
            arguments = parameters.bind(*args, **kwargs).arguments
            assert arguments.pop("config") == "chosen"
            return tree_map_only(Tensor, OnCuda, reference(**held(arguments)))

        monkeypatch.setattr(kernel_of(op), op, launch)

    monkeypatch.setattr(registration, "choose", lambda configs, x, is_regular, *device: "chosen")
    for op in OPS:
        simulate(op)


def infer(network, image):
    logits = network.logits(image)
    return logits, label_upsample(logits, tuple(image.shape[2:]))


def fused(small_network, formulation):
    return agln_fast.fuse(small_network("agln_lite_resnet18", channels=128, formulation=formulation))


@formulations
@torch.inference_mode()
def test_kernels_on_a_simulated_device(formulation, simulated, launched, small_network):
    network, image = fused(small_network, formulation), torch.randn(2, 3, 40, 50)
    with Calls() as calls:
        expected = infer(network, image)
    assert (calls.counts, launched) == (ALL[formulation], {})

    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            module._parameters[name] = OnCuda(weight)
    results = infer(network, OnCuda(image))
    assert launched == ALL[formulation]
    for result, wanted in zip(results, expected, strict=True):
        assert result.is_cuda
        torch.testing.assert_close(result.inner, wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_cuda_has_the_kernel_for_all_but_float64(op, dtype, monkeypatch):
    """Triton's matrix products have no float64."""
    reached = []
    monkeypatch.setattr(registration, "choose", lambda configs, x, is_regular, *device: "chosen")
    monkeypatch.setattr(kernel_of(op), op, lambda *arguments, config, **keywords: reached.append(config))
    call, case = CALLS[op], Case(1, 3, dtype, channels=2, descriptors=2, classes=2)
    arguments = tree_map_only(Tensor, OnCuda, call.arguments(case))
    with suppress(Exception):  # neither gives what the op should: the stand-in nothing, the reference no CUDA tensor
        getattr(torch.ops.agln, op)(*arguments, **call.keywords(case))
    assert reached == ([] if dtype == torch.float64 else ["chosen"])


@pytest.mark.gpu
@formulations
@torch.inference_mode()
def test_kernels_on_the_gpu(formulation, launched, small_network):
    network, image = fused(small_network, formulation), torch.randn(2, 3, 40, 50)
    expected = infer(network, image)
    assert launched == {}

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits, labels = infer(network.cuda(), image.cuda())
    assert launched == ALL[formulation]
    torch.testing.assert_close(logits.cpu(), expected[0], rtol=1e-3, atol=1e-3)
    assert (labels.cpu() == expected[1]).float().mean() > 0.99
