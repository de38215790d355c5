"""Checks of an op's arguments before a launch: one line that names the argument, what came and what is needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor

__all__ = ["FLOATS", "check_affinity", "check_number", "check_size", "check_tensor"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(
    name: str, value: Any, shape: tuple[int | str, ...], *, like: Tensor | None = None, floats: bool = False
) -> None:
    """Check that `value` is a floating-point tensor without empty dimensions, of the given shape.

    Args:
        name: of the argument, for the message.
        shape: a number where the size is given, a letter where it is free.
        like: a tensor whose device, and unless `floats` whose dtype, it must share.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: of another rank, size or device, or empty.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: needs a tensor, got {type(value).__name__}")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: needs float16, bfloat16, float32 or float64, got {value.dtype}")
    if like is not None and not floats and value.dtype != like.dtype:
        raise TypeError(f"{name}: needs {like.dtype} like the other arguments, got {value.dtype}")
    wanted = f"({', '.join(map(str, shape))})"
    fits = value.ndim == len(shape) and all(
        came > 0 and (isinstance(need, str) or came == need) for came, need in zip(value.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name}: needs shape {wanted}, none of them 0, got {tuple(value.shape)}")
    if like is not None and value.device != like.device:
        raise ValueError(f"{name}: needs device {like.device} like the other arguments, got {value.device}")


def check_affinity(name: str, value: Any, x: Tensor) -> None:
    """Check that `value` can mix the channels of `x` (B, C, H, W): (B, C, C), of its dtype or at least float32.

    Raises:
        TypeError: not a tensor, or of another dtype.
        ValueError: of another rank, size or device.
    """
    channels = x.shape[1]
    check_tensor(name, value, (x.shape[0], channels, channels), like=x, floats=True)
    if value.dtype not in (x.dtype, torch.promote_types(x.dtype, torch.float32)):
        raise TypeError(f"{name}: needs {x.dtype} like the other arguments, or float32, got {value.dtype}")


def check_number(name: str, value: Any) -> None:
    """Check that `value` is a finite or infinite real number, no tensor.

    Raises:
        TypeError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: needs a number, got {type(value).__name__}")


def check_size(size: Any) -> None:
    """Check that `size` is two integers of at least 1, the sides (H, W) of a map.

    Raises:
        TypeError: it is something else.
        ValueError: a side is below 1.
    """
    sides = isinstance(size, tuple | list) and len(size) == 2 and all(isinstance(side, int | SymInt) for side in size)
    if not sides:
        raise TypeError(f"size: needs two integers (H, W), got {size!r}")
    if min(size) < 1:
        raise ValueError(f"size: needs H and W of at least 1, got {size}")
