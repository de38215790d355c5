"""The op `agln::label_upsample`: NumPy on a CPU, the Triton kernel on CUDA, shapes alone for tracing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import SymInt, Tensor

from agln_fast.decode import upsample_labels
from agln_fast.kernels.arguments import check_tensor
from agln_fast.kernels.label_upsample import reference
from agln_fast.kernels.launch import choose, load_configs, regular
from agln_fast.kernels.registration import register

__all__ = ["CONFIGS", "label_upsample"]

CONFIGS = load_configs(__package__)


def label_upsample(logits: Tensor, size: tuple[int, int]) -> Tensor:
    _check(logits, size)
    labels: Tensor = _op(logits, size)
    return labels


label_upsample.__doc__ = reference.label_upsample.__doc__


def _check(logits: Tensor, size: Sequence[int]) -> None:
    check_tensor("logits", logits, ("B", "K", "h", "w"))
    sides = isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, int | SymInt) for side in size)
    if not sides:
        raise TypeError(f"size: needs two integers (H, W), got {size!r}")
    if min(size) < 1:
        raise ValueError(f"size: needs H and W of at least 1, got {size}")


def _cpu(logits: Tensor, size: Sequence[int]) -> Tensor:
    _check(logits, size)
    labels = reference.empty_labels(logits, (size[0], size[1]))
    for image, labels_of_image in zip(logits.detach(), labels, strict=True):
        labels_of_image.numpy()[:] = upsample_labels(image.float().numpy(), (size[0], size[1]))
    return labels


def _cuda(logits: Tensor, size: Sequence[int]) -> Tensor:
    _check(logits, size)
    if logits.dtype == torch.float64:  # exists for proofs; no configuration is kept for it
        return reference.label_upsample(logits, (size[0], size[1]))
    from agln_fast.kernels.label_upsample import kernel

    return kernel.label_upsample(logits, (size[0], size[1]), choose(CONFIGS, logits, regular(logits)))


def _fake(logits: Tensor, size: Sequence[int]) -> Tensor:
    _check(logits, size)
    return reference.empty_labels(logits, (size[0], size[1]))


_op = register("label_upsample", _cpu, _cuda, _fake)
