"""Small facts of operands that rule files share, most of shapes and dtypes."""

from __future__ import annotations

from typing import Any

import torch

from lamina_core.mode import thread_mode
from lamina_core.tensors import needs_guard
from lamina_core.torch_hooks.autograd import forward_ad
from lamina_core.wrapper import plain_of

__all__ = [
    "asked_outside",
    "count_of",
    "dims_of",
    "in_dtype",
    "keep_dims",
    "restored",
    "stand_in",
]


def asked_outside(*values: Any) -> bool:
    """Whether the user's own autograd is to differentiate what is made of the values.

    For rules that use a fused op which PyTorch has no formula for: they then use others.
    """
    outer = thread_mode().outer
    enabled = torch.is_grad_enabled() if outer is None else outer.grad_enabled
    if not enabled and forward_ad._current_level < 0:
        return False
    return any(value is not None and needs_guard(plain_of(value)) for value in values)


def in_dtype(ct: Any, dtype: Any) -> Any:
    """A cotangent in the dtype of its primal: the real part where that is real."""
    if ct.dtype is dtype:
        return ct
    if ct.is_complex() and not dtype.is_complex:
        ct = ct.real
    return ct if ct.dtype is dtype else ct.to(dtype)


def dims_of(rank: int, dim: Any) -> list[int]:
    """The dims that a reduction reduces, from 0; None and the empty list are all of them."""
    if dim is None:
        return list(range(rank))
    if isinstance(dim, int):
        return [dim % rank] if rank else []
    return sorted({d % rank for d in dim}) if len(dim) and rank else list(range(rank))


def count_of(shape: Any, dim: Any) -> Any:
    """How many elements go into one result of a reduction over `dim`."""
    count = 1
    for d in dims_of(len(shape), dim):
        count = count * shape[d]
    return count


def keep_dims(x: Any, rank: int, dim: Any, keepdim: bool) -> Any:
    """Give a reduced tensor its reduced dims back, with size 1."""
    if keepdim or rank == 0:
        return x
    for d in dims_of(rank, dim):
        x = x.unsqueeze(d)
    return x


def restored(ct: Any, x_shape: Any, dim: Any, keepdim: bool) -> Any:
    """Expand a reduced tensor to the shape of what was reduced: the transpose of a sum."""
    return keep_dims(ct, len(x_shape), dim, keepdim).expand(x_shape)


def stand_in(like: Any, shape: Any) -> Any:
    """A tensor that shows a shape to an op which reads nothing else of it: one element."""
    return like.new_empty(()).expand(shape)
