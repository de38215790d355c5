"""Fixtures that several folders share: small networks whose every branch carries signal, and a bundle of one."""

from __future__ import annotations

import fcntl
import functools
import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import agln_fast
from agln_fast.cli import main
from agln_fast.engines.denormals import denormals_are_zero
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.plan import rates
from agln_fast.runtime import turns

# Triton decides when it is imported whether it interprets or compiles, for the whole process.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")
# The plans of engines come from the cost model, and nothing is remembered from one run to the next.
os.environ["AGLN_FAST_TUNE_SECONDS"] = "0"
os.environ["AGLN_FAST_CACHE"] = os.devnull
turns._REST_S = 0.0  # nothing is concluded from times


@functools.wraps(rates._measure)
def _known_rates(dtype: torch.dtype) -> rates.Rates:
    """The cost model knows the same machine everywhere: two cores with AVX-512."""
    arithmetic = 2.2e11 if dtype == torch.float32 else 4.4e11
    return rates.Rates(arithmetic, arithmetic, 4e10)


rates._measure = _known_rates

_NEEDS = {
    "gpu": (torch.cuda.is_available, "needs a CUDA device"),
    "interpreter": (lambda: os.environ["TRITON_INTERPRET"] == "1", "needs TRITON_INTERPRET=1"),
    "openvino": (lambda: find_spec("openvino") is not None, "needs the package openvino"),
    "tensorrt_rtx": (lambda: find_spec("tensorrt_rtx") is not None, "needs the package tensorrt_rtx"),
    "video": (lambda: find_spec("av") is not None, "needs the package av"),
}


@pytest.hookimpl(tryfirst=True)  # before pytest itself deselects by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, and say why; float16 in the interpreter is slow, and bfloat16 is not."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if item.get_closest_marker("interpreter") and parameters.get("dtype") == torch.float16:
            item.add_marker(pytest.mark.slow)
    for marker, (available, reason) in _NEEDS.items():
        if not available():
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _same_arithmetic() -> Iterator[None]:
    """A library that switched denormals off in this thread would change the arithmetic of all tests after it, and so
    would another number of PyTorch's threads, which sum in another order."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    assert not denormals_are_zero()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """The command line, run in this process: `cli("run", …)` returns exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["agln-fast", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


SMALL = {"width": 0.25, "channels": 16}


@pytest.fixture(scope="session")
def small_network() -> Callable[..., SegmentationNetwork]:
    """`small_network(name, **overrides)`: a preset at a fraction of its width, with α, β, γ away from 0 and 1."""

    def create(name: str = "agln_release_resnet18", num_classes: int = 5, **overrides: object) -> SegmentationNetwork:
        torch.manual_seed(0)
        network = agln_fast.create_model(name, num_classes, **{**SMALL, **overrides})
        with torch.no_grad():
            for key, parameter in network.named_parameters():
                if key.endswith(("alpha", "beta", "gamma")):
                    parameter.uniform_(0.3, 0.9)
            for key, buffer in network.named_buffers():
                if key.endswith("running_var"):
                    buffer.uniform_(0.5, 1.5)
            # Untrained networks see one class everywhere, and then equal labels prove nothing.
            network.eval()
            logits = network(torch.randn(1, 3, 64, 96)).flatten(2)[0]
            classifier = network.classifier[4]
            classifier.bias.sub_(logits.mean(1)).div_(logits.std(1))
            classifier.weight.div_(logits.std(1)[:, None, None, None])
        return network

    return create


@pytest.fixture(scope="session")
def small_checkpoint(
    small_network: Callable[..., SegmentationNetwork], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "small.safetensors"
    agln_fast.save_checkpoint(small_network(), path)
    return path


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the processes of a run keep what they share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def bundle(small_checkpoint: Path, shared_folder: Path) -> agln_fast.Bundle:
    """A bundle of a small network for the CPU, 64x96, labels. Do not change it."""
    path = shared_folder / "small.agln"
    with (shared_folder / "small.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return agln_fast.open_bundle(path)
        return agln_fast.build(small_checkpoint, path, size=(64, 96), precision="fp32")
