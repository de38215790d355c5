"""Where the fused network's ops go: to the Triton kernels on a CUDA device, to the references on the CPU."""

from __future__ import annotations

import inspect
from collections import Counter
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import agln_fast
from agln_fast.kernels import label_upsample

# Op: its folder, and how often AGLN-Lite and one label map call it.
OPS = {
    "attention_pool": ("attention_pool", 3),
    "semantic_distribution": ("semantic_distribution", 6),
    "channel_affinity": ("channel_resample", 6),
    "channel_apply": ("channel_resample", 6),
    "separable_conv": ("separable_conv", 12),
    "label_upsample": ("label_upsample", 1),
}
ALL = {op: count for op, (_, count) in OPS.items()}
ON_CPU = {**ALL, "label_upsample": 2}  # in NumPy, one image after the other


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


def part(op, name):
    return import_module(f"agln_fast.kernels.{OPS[op][0]}.{name}")


@pytest.fixture
def reached(monkeypatch):
    """Counters of what the ops reach: Triton's host wrappers, and what computes on the CPU."""
    kernels, references = Counter(), Counter()

    def spy(op, module, counter, name=None):
        original = getattr(module, name or op)

        def counted(*args, **kwargs):
            counter[op] += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name or op, counted)

    for op in OPS:
        spy(op, part(op, "kernel"), kernels)
        if op != "label_upsample":
            spy(op, part(op, "reference"), references)
    spy("label_upsample", part("label_upsample", "op"), references, "upsample_labels")
    return kernels, references


@pytest.fixture
def simulated(monkeypatch):
    """Kernels that compute as the reference does, on what `OnCuda` tensors hold, for no device in particular."""

    def simulate(op):
        reference, parameters = getattr(part(op, "reference"), op), inspect.signature(getattr(part(op, "kernel"), op))

        def launch(*args):
            arguments = parameters.bind(*args).arguments
            assert arguments.pop("config") == "chosen"
            return tree_map_only(Tensor, OnCuda, reference(**held(arguments)))

        monkeypatch.setattr(part(op, "kernel"), op, launch)
        monkeypatch.setattr(part(op, "op"), "choose", lambda configs, x, is_regular: "chosen")

    for op in OPS:
        simulate(op)


def infer(network, image):
    logits = network.logits(image)
    return logits, label_upsample(logits, tuple(image.shape[2:]))


@torch.inference_mode()
def test_kernels_on_a_simulated_device(simulated, reached, small_network):
    kernels, references = reached
    network, image = agln_fast.fuse(small_network("agln_lite_resnet18")), torch.randn(2, 3, 40, 50)
    expected = infer(network, image)
    assert (kernels, references) == ({}, ON_CPU)

    references.clear()
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            module._parameters[name] = OnCuda(weight)
    results = infer(network, OnCuda(image))
    assert (kernels, references) == (ALL, {})
    for result, wanted in zip(results, expected, strict=True):
        assert result.is_cuda
        torch.testing.assert_close(result.inner, wanted)


@pytest.mark.gpu
@torch.inference_mode()
def test_kernels_on_the_gpu(reached, small_network):
    kernels, references = reached
    network, image = agln_fast.fuse(small_network("agln_lite_resnet18")), torch.randn(2, 3, 40, 50)
    expected = infer(network, image)
    assert (kernels, references) == ({}, ON_CPU)

    references.clear()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        logits, labels = infer(network.cuda(), image.cuda())
    assert (kernels, references) == (ALL, {})
    torch.testing.assert_close(logits.cpu(), expected[0], rtol=1e-3, atol=1e-3)
    assert (labels.cpu() == expected[1]).float().mean() > 0.99
