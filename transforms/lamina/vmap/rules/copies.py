"""Batching rules of ops that copy, convert or make a tensor after the likeness of another.

`*_like` results are batched like their model and laid out like it, for they are mostly made to be
written to; `new_*` results are the same for every example until a batched value is written.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.vmap.dims import batch_first, ensure_batched, logical_rank, logical_shape, pad_rank
from lamina.vmap.table import batching_rule

aten = torch.ops.aten

# The value is copied as it is.
SAME_DIMS = (
    aten._pin_memory.default,
    aten.lift.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    aten.zero.default,
)

# (x, ..., memory_format)
LAYOUTS = (
    aten._to_copy.default,
    aten.clone.default,
    aten.empty_like.default,
    aten.full_like.default,
    aten.ones_like.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.zeros_like.default,
)

# (x, size, ...): a tensor of its own size, with the dtype and device of x.
NEW = (
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.new_full.default,
    aten.new_ones.default,
    aten.new_zeros.default,
)

_CHANNELS_LAST = (torch.channels_last, torch.channels_last_3d)


def _same_dims(op: Any) -> Any:
    def rule(info: Any, in_dims: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """[B, *S] -> [B, *S], the batch dim where it was."""
        return op(x, *args, **kwargs), in_dims[0]

    return rule


def _layout(op: Any) -> Any:
    def rule(
        info: Any, in_dims: Any, x: Any, *args: Any, memory_format: Any = None, **kwargs: Any
    ) -> Any:
        """[B, *S] -> [B, *S]. No layout puts the channels last behind a batch dim, so they move."""
        if args and isinstance(args[-1], torch.memory_format):  # `to` has it positional
            *args, memory_format = args
        if memory_format in _CHANNELS_LAST:
            x = batch_first(x, in_dims[0]).movedim(2, -1)
            out = op(x, *args, memory_format=torch.contiguous_format, **kwargs)
            return out.movedim(-1, 2), 0
        if memory_format is not None:
            kwargs["memory_format"] = memory_format
        return op(x, *args, **kwargs), in_dims[0]

    return rule


def _new(op: Any) -> Any:
    def rule(info: Any, in_dims: Any, x: Any, size: Any, *args: Any, **kwargs: Any) -> Any:
        """[B, *S] -> [*size]"""
        return op(x, size, *args, **kwargs), None

    return rule


for _ops, _make in ((SAME_DIMS, _same_dims), (LAYOUTS, _layout), (NEW, _new)):
    for _op in _ops:
        batching_rule(_op, state="family")(_make(_op))


@batching_rule(aten._has_same_storage_numel.default)
def has_same_storage_numel(info: Any, in_dims: Any, x: Any, other: Any) -> Any:
    """[B, *S], [B, *S2] -> bool: whether the examples have as many elements."""
    first, second = logical_shape(x, in_dims[0]), logical_shape(other, in_dims[1])
    return torch.Size(first).numel() == torch.Size(second).numel(), None


@batching_rule(aten._new_zeros_with_same_feature_meta.default)
def new_zeros_with_same_feature_meta(
    info: Any, in_dims: Any, x: Any, other: Any, *, self_num_batch_dims: int = 0
) -> Any:
    """[B, *S], [B, *S2] -> [B, *S2]. It is made to be written to by C++, hence batched."""
    leading = logical_shape(x, in_dims[0])[:self_num_batch_dims]
    size = [info.batch_size, *leading, *logical_shape(other, in_dims[1])]
    return x.new_zeros(size, dtype=other.dtype, device=other.device), 0


@batching_rule(aten.contiguous.default)
def contiguous(
    info: Any, in_dims: Any, x: Any, *, memory_format: Any = torch.contiguous_format
) -> Any:
    """[B, *S] -> [B, *S]. It is the examples that have to be contiguous."""
    if memory_format in _CHANNELS_LAST:
        return batch_first(x, in_dims[0]).movedim(2, -1).contiguous().movedim(-1, 2), 0
    return (x if batch_first(x, in_dims[0]).is_contiguous() else x.contiguous()), in_dims[0]


@batching_rule(aten.copy.default)
def copy(info: Any, in_dims: Any, x: Any, src: Any, non_blocking: bool = False) -> Any:
    """[B, *S], [B, *src] -> [B, *S]"""
    x_bdim, src_bdim = in_dims[:2]
    rank = logical_rank(x, x_bdim)
    src = pad_rank(src, src_bdim, rank)
    first = src_bdim is not None
    extra = src.dim() - first - rank
    if extra > 0:  # as an assignment may have it: 1s in front
        src = src.squeeze(tuple(range(first, first + extra)))
    return aten.copy(ensure_batched(x, x_bdim, info.batch_size), src, non_blocking), 0


@batching_rule(aten.fill.Scalar)
def fill(info: Any, in_dims: Any, x: Any, value: Any) -> Any:
    """[B, *S] -> [B, *S]"""
    return aten.fill.Scalar(x, value), in_dims[0]


@batching_rule(aten.fill.Tensor)
def fill_tensor(info: Any, in_dims: Any, x: Any, value: Any) -> Any:
    """[B, *S], [B] -> [B, *S]"""
    return copy(info, in_dims, x, value)
