"""The op `agln::label_upsample`: on CPUs in NumPy, as everything else makes labels of logits."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from agln_fast.decode import upsample_labels
from agln_fast.kernels.arguments import check_size, check_tensor
from agln_fast.kernels.label_upsample import reference
from agln_fast.kernels.registration import register

__all__ = ["label_upsample"]


def _check(logits: Tensor, size: Sequence[int], *, align_corners: bool = True) -> None:
    check_tensor("logits", logits, ("B", "K", "h", "w"))
    check_size(size)


def _cpu(logits: Tensor, size: Sequence[int], *, align_corners: bool = True) -> Tensor:
    labels = reference.empty_labels(logits, size)
    for image, labels_of_image in zip(logits.detach(), labels, strict=True):
        labels_of_image.numpy()[:] = upsample_labels(
            image.float().numpy(), (size[0], size[1]), align_corners=align_corners
        )
    return labels


label_upsample = register(
    __package__,
    reference.label_upsample,
    check=_check,
    tiles=lambda logits, size, *, align_corners=True: (logits,),
    fake=lambda logits, size, *, align_corners=True: reference.empty_labels(logits, size),
    cpu=_cpu,
)
