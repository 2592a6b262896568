"""Batching rules of ops that copy, convert or make a tensor after the likeness of another.

`*_like` results are batched like their model and laid out like it, for they are mostly made to be
written to; `new_*` results are the same for every example until a batched value is written.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import batch_first, ensure_batched, logical_rank, logical_shape, pad_rank
from lamina.batching.table import batching_rule, decomposition
from lamina_core.dispatch import copied, followed
from lamina_core.errors import MutationError
from lamina_core.overloads import aten

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

# The copy of a view: of what.
OF_VIEWS = {
    aten._conj_copy.default: aten._conj.default,
    aten._fw_primal_copy.default: aten._fw_primal.default,
    aten._neg_view_copy.default: aten._neg_view.default,
    aten._reshape_alias_copy.default: aten._reshape_alias.default,
    aten.detach_copy.default: aten.detach.default,
    aten.select_copy.int: aten.select.int,
    aten.slice_copy.Tensor: aten.slice.Tensor,
    aten.split_copy.Tensor: aten.split.Tensor,
    aten.view_as_complex_copy.default: aten.view_as_complex.default,
    aten.view_as_real_copy.default: aten.view_as_real.default,
}

_CHANNELS_LAST = (torch.channels_last, torch.channels_last_3d)


def _same_dims(op: Any) -> Any:
    def rule(info: Any, in_dims: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        """[B, *S] -> [B, *S], the batch dim where it was."""
        return followed(op, x, *args, **kwargs), in_dims[0]

    return rule


def _channels_last(x: Any, x_bdim: int) -> tuple[Any, int]:
    """Examples whose channels are the last dim in memory; the value itself if they are already."""
    moved = batch_first(x, x_bdim).movedim(2, -1)
    return (x, x_bdim) if moved.is_contiguous() else (moved.contiguous().movedim(-1, 2), 0)


def _layout(op: Any) -> Any:
    may_be_itself = op._schema.name == "aten::to"

    def rule(
        info: Any, in_dims: Any, x: Any, *args: Any, memory_format: Any = None, **kwargs: Any
    ) -> Any:
        """[B, *S] -> [B, *S]. No layout puts the channels last behind a batch dim, so they move."""
        if args and isinstance(args[-1], torch.memory_format):  # `to` has it positional
            *args, memory_format = args
        if memory_format in _CHANNELS_LAST:
            if may_be_itself:
                return _channels_last(op(x, *args, **kwargs), in_dims[0])
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


def _register_copy(op: Any, view: Any) -> None:
    @decomposition(op)
    def copy_of_view(*args: Any, **kwargs: Any) -> Any:
        """The view, copied."""
        out = view(*args, **kwargs)
        return [o.clone() for o in out] if isinstance(out, (list, tuple)) else out.clone()


for _op, _view in OF_VIEWS.items():
    _register_copy(_op, _view)
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
        return _channels_last(x, in_dims[0])
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
    return copied(ensure_batched(x, x_bdim, info.batch_size), src, non_blocking), 0


@batching_rule(aten.fill.Scalar)
def fill(info: Any, in_dims: Any, x: Any, value: Any) -> Any:
    """[B, *S] -> [B, *S]"""
    return aten.fill.Scalar(x, value), in_dims[0]


@batching_rule(aten.fill.Tensor)
def fill_tensor(info: Any, in_dims: Any, x: Any, value: Any) -> Any:
    """[B, *S], [B] -> [B, *S]"""
    return copy(info, in_dims, x, value)


@batching_rule(aten.resize.default)
def resize(info: Any, in_dims: Any, x: Any, size: Any, *, memory_format: Any = None) -> Any:
    """[B, *S] -> [B, *S]. The memory of an example has no end of its own to be moved."""
    shape = logical_shape(x, in_dims[0])
    if list(size) != list(shape):
        raise info.interpreter.error(
            MutationError,
            f"aten.resize.default would change the shape of an example, {list(shape)}, to "
            f"{list(size)}",
            "to fix: use reshape, narrow or torch.nn.functional.pad",
        )
    return x.clone(), in_dims[0]


@batching_rule(aten.is_pinned.default)
def is_pinned(info: Any, in_dims: Any, x: Any, device: Any = None) -> Any:
    """[B, *S] -> bool: examples share their memory."""
    return x.is_pinned(), None
