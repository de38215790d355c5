"""`load_network`: a checkpoint or a network in memory, between the same steps as the engines of a bundle."""

from __future__ import annotations

import os

from agln_fast.contract import IOContract, Resize
from agln_fast.data.classes import ClassSet, default_class_set
from agln_fast.engines import REFERENCE, check_device, check_network_precision, check_threads, network_kinds
from agln_fast.errors import ConfigError
from agln_fast.forking import use_threads
from agln_fast.manifest import EngineRecord
from agln_fast.models.checkpoint import load_checkpoint
from agln_fast.models.networks import SegmentationNetwork
from agln_fast.runtime.segmenter import Segmenter

__all__ = ["load_network"]


def load_network(
    network: SegmentationNetwork | str | os.PathLike[str],
    *,
    size: tuple[int, int] = (480, 480),
    resize: Resize = "slide",
    backend: str = REFERENCE,
    precision: str = "fp32",
    class_set: ClassSet | None = None,
    device: str | None = None,
    threads: int | None = None,
    max_batch: int = 8,
) -> Segmenter:
    """Open a network for segmentation without a bundle, between the same steps before and after.

    Args:
        network: a checkpoint's path, or a network, which is used as it is, on `device` and in eval mode.
        size: (height, width) of the network's input, pixels.
        resize: how images get there; with "slide" the input is a window.
        backend: "torch", the network as it is, in eager PyTorch; "fused", rewritten, and on CUDA with fused kernels.
        precision: "fp32", "bf16" or "fp16"; with "torch" the latter two under `torch.autocast`.
        class_set: what the labels mean; None for what the checkpoint says, or else by their number.
        device: "cpu", "cuda", "cuda:1"; None for "cpu", or with "fused" for "cuda" where there is one.
        threads: CPU threads; None for `AGLN_FAST_THREADS`, and without it PyTorch's own choice.
        max_batch: the most windows, or images, that go through the network at once.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        BackendError: the device cannot be used.
        ConfigError: an unknown backend or precision, an impossible size, or a class set of another number of classes.
    """
    kinds = network_kinds()
    if backend not in kinds:
        raise ConfigError(f"backend {backend!r}: a network in memory runs on {' or '.join(kinds)}")
    checked = check_network_precision(precision)
    threads = check_threads(threads)
    check_device(device)
    use_threads(threads)
    contract = IOContract(*size, max_batch=max_batch, output="logits", resize=resize)
    if not isinstance(network, SegmentationNetwork):
        network = load_checkpoint(network)
    num_classes = network.config.num_classes
    class_set = class_set or network.class_set or default_class_set(num_classes)
    if len(class_set.classes) != num_classes:
        raise ConfigError(
            f"class set {class_set.name!r} has {len(class_set.classes)} classes, the network {num_classes}: "
            "give the one that it was trained on"
        )
    opened = kinds[backend].open_network(network, contract, precision=checked, device=device, threads=threads)
    record = EngineRecord(f"{backend}-{checked}", backend, checked, "", "cpu")
    return Segmenter(record, opened, contract, class_set, align_corners=network.config.align_corners)
