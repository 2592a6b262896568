"""Batching rules of view ops: shift the dims past the batch dim, keep the memory.

The batch dim stays where it is. A logical view that is no view of the value (the batch dim lies
between two dims that are merged) is copied; writes through it are the business of NOTE [Writes].
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import (
    batch_first,
    ensure_batched,
    infer_size,
    logical_rank,
    logical_shape,
    normalize,
    physical,
    physical_dims,
    physical_size,
    without,
)
from lamina.batching.table import batching_rule
from lamina_core.dispatch import followed
from lamina_core.overloads import aten
from lamina_core.schema import resolved

# Views that change no dim: the value is viewed as it is.
SAME_DIMS = (
    aten._conj.default,
    aten._neg_view.default,
    aten.alias.default,
    aten.detach.default,  # concerns the levels below as well, so it is passed on
    aten.imag.default,  # of a lazily conjugated value too, which `view_as_real` refuses
    aten.real.default,
)


def _same_dims(op: Any) -> Any:
    def rule(info: Any, in_dims: Any, x: Any) -> Any:
        """[B, *S] -> [B, *S], the batch dim where it was."""
        return op(x), in_dims[0]

    return rule


for _op in SAME_DIMS:
    batching_rule(_op, state="family")(_same_dims(_op))


@batching_rule(aten.as_strided.default)
def as_strided(
    info: Any, in_dims: Any, x: Any, size: Any, stride: Any, storage_offset: int | None = None
) -> Any:
    """[B, *S] -> [B, *size]. Strides and offset are those of one example."""
    x = _example_strides(x, in_dims[0])
    offset = x.storage_offset() + (storage_offset or 0)
    return x.as_strided([x.shape[0], *size], [x.stride(0), *stride], offset), 0


def _example_strides(x: Any, x_bdim: int) -> Any:
    """The batch dim first, and each example laid out as its wrapper shows it."""
    dense = x.is_contiguous()
    x = batch_first(x, x_bdim)
    # A wrapper of a contiguous value shows contiguous strides, wherever the batch dim is.
    return x.contiguous() if dense else x


@batching_rule(aten.as_strided_scatter.default)
def as_strided_scatter(
    info: Any,
    in_dims: Any,
    x: Any,
    src: Any,
    size: Any,
    stride: Any,
    storage_offset: int | None = None,
) -> Any:
    """[B, *S], [B, *size] -> [B, *S]. An expanded batch dim has to be laid out before."""
    bdim, src_bdim = (*in_dims, None)[:2]
    if bdim is None:
        x = ensure_batched(x, None, info.batch_size).contiguous()
    else:
        x = _example_strides(x, bdim)
        x = x.contiguous() if x.stride(0) == 0 else x
    src = ensure_batched(src, src_bdim, info.batch_size)
    offset = x.storage_offset() + (storage_offset or 0)
    strides = [x.stride(0), *stride]
    sizes = [x.shape[0], *size]
    return followed(aten.as_strided_scatter.default, x, src, sizes, strides, offset), 0


@batching_rule(aten.chunk.default)
def chunk(info: Any, in_dims: Any, x: Any, chunks: int, dim: int = 0) -> Any:
    """[B, *S] -> list of [B, *S with dim cut]."""
    if logical_rank(x, in_dims[0]) == 0:
        raise RuntimeError("chunk expects at least a 1-dimensional tensor")
    return list(x.chunk(chunks, physical(dim, x, in_dims[0]))), in_dims[0]


@batching_rule(aten.diagonal.default)
def diagonal(info: Any, in_dims: Any, x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    """[B, *S] -> [B, *S without dim1 and dim2, diagonal]."""
    first, second = physical_dims((dim1, dim2), x, in_dims[0])
    return x.diagonal(offset, first, second), without(in_dims[0], first, second)


@batching_rule(aten.expand.default)
def expand(info: Any, in_dims: Any, x: Any, size: Any, *, implicit: bool = False) -> Any:
    """[B, *S] -> [new dims, B, *size]: new dims go in front, so the batch dim moves back."""
    bdim = in_dims[0] + len(size) - logical_rank(x, in_dims[0])
    if bdim < in_dims[0]:
        raise RuntimeError(
            f"expand: {list(size)} has fewer dims than {list(logical_shape(x, in_dims[0]))}"
        )
    return x.expand(physical_size(size, bdim, -1)), bdim


@batching_rule(aten.permute.default)
def permute(info: Any, in_dims: Any, x: Any, dims: Any) -> Any:
    """[B, *S] -> [B, *S permuted]."""
    bdim = in_dims[0]
    order = [physical(dim, x, bdim) for dim in dims]
    order.insert(bdim, bdim)
    return x.permute(order), bdim


@batching_rule(aten.select.int)
def select(info: Any, in_dims: Any, x: Any, dim: int, index: int) -> Any:
    """[B, *S] -> [B, *S without dim]."""
    bdim = in_dims[0]
    if x.dim() == 1:
        raise IndexError("select() cannot be applied to a 0-dim tensor.")
    at = physical(dim, x, bdim)
    return x.select(at, index), bdim - 1 if at < bdim else bdim


@batching_rule(aten.slice.Tensor)
def slice_(
    info: Any,
    in_dims: Any,
    x: Any,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    """[B, *S] -> [B, *S with dim sliced]."""
    if logical_rank(x, in_dims[0]) == 0:
        raise RuntimeError("slice() cannot be applied to a 0-dim tensor.")
    return aten.slice(x, physical(dim, x, in_dims[0]), start, end, step), in_dims[0]


@batching_rule(aten.split.Tensor)
def split(info: Any, in_dims: Any, x: Any, split_size: int, dim: int = 0) -> Any:
    """[B, *S] -> list of [B, *S with dim cut]."""
    return aten.split.Tensor(x, split_size, physical(dim, x, in_dims[0])), in_dims[0]


@batching_rule(aten.split_with_sizes.default)
def split_with_sizes(info: Any, in_dims: Any, x: Any, split_sizes: Any, dim: int = 0) -> Any:
    """[B, *S] -> list of [B, *S with dim cut]."""
    return aten.split_with_sizes(x, split_sizes, physical(dim, x, in_dims[0])), in_dims[0]


@batching_rule(aten.squeeze.default)
def squeeze(info: Any, in_dims: Any, x: Any) -> Any:
    """[B, *S] -> [B, *S without its 1s]. A batch of one keeps its dim."""
    return _squeeze(x, in_dims[0], range(logical_rank(x, in_dims[0])))


@batching_rule(aten.squeeze.dim)
def squeeze_dim(info: Any, in_dims: Any, x: Any, dim: int) -> Any:
    """[B, *S] -> [B, *S without dim, if it is 1]."""
    bdim = in_dims[0]
    if x.dim() == 1:
        return _squeeze(x, bdim, [dim])
    at = physical(dim, x, bdim)
    return x.squeeze(at), bdim - 1 if at < bdim and x.shape[at] == 1 else bdim


@batching_rule(aten.squeeze.dims)
def squeeze_dims(info: Any, in_dims: Any, x: Any, dim: Any) -> Any:
    """[B, *S] -> [B, *S without those of dim that are 1]. An empty dim squeezes nothing."""
    return _squeeze(x, in_dims[0], dim)


def _squeeze(x: Any, x_bdim: int, dims: Any) -> Any:
    rank = logical_rank(x, x_bdim)
    dims = [normalize(dim, rank) for dim in dims]  # complains about dims out of range
    gone = [at for at in physical_dims(dims, x, x_bdim) if x.shape[at] == 1] if rank else []
    return aten.squeeze.dims(x, gone), without(x_bdim, *gone)


@batching_rule(aten.t.default)
def t(info: Any, in_dims: Any, x: Any) -> Any:
    """[B, M, N] -> [B, N, M]; vectors and scalars stay."""
    rank = logical_rank(x, in_dims[0])
    if rank > 2:
        raise RuntimeError(f"t() expects a tensor with <= 2 dimensions, but self is {rank}D")
    if rank < 2:
        return aten.alias(x), in_dims[0]
    return x.transpose(*physical_dims((0, 1), x, in_dims[0])), in_dims[0]


@batching_rule(aten.transpose.int)
def transpose(info: Any, in_dims: Any, x: Any, dim0: int, dim1: int) -> Any:
    """[B, *S] -> [B, *S with dim0 and dim1 swapped]."""
    bdim = in_dims[0]
    if x.dim() == 1:
        normalize(dim0, 0), normalize(dim1, 0)
        return aten.alias(x), bdim
    return x.transpose(physical(dim0, x, bdim), physical(dim1, x, bdim)), bdim


@batching_rule(aten.unbind.int)
def unbind(info: Any, in_dims: Any, x: Any, dim: int = 0) -> Any:
    """[B, *S] -> list of [B, *S without dim]."""
    if logical_rank(x, in_dims[0]) == 0:
        raise IndexError("unbind: a 0-dim tensor has no dim to unbind")
    at = physical(dim, x, in_dims[0])
    return list(x.unbind(at)), without(in_dims[0], at)


@batching_rule(aten.unflatten.int)
def unflatten(info: Any, in_dims: Any, x: Any, dim: int, sizes: Any) -> Any:
    """[B, *S] -> [B, *S with dim replaced by sizes]."""
    bdim = in_dims[0]
    at = physical(dim, x, bdim)
    return x.unflatten(at, sizes), bdim if at > bdim else bdim + len(sizes) - 1


@batching_rule(aten.unfold.default)
def unfold(info: Any, in_dims: Any, x: Any, dimension: int, size: int, step: int) -> Any:
    """[B, *S] -> [B, *S with dim counting windows, size]. A scalar has one window: itself."""
    bdim = in_dims[0]
    if logical_rank(x, bdim) == 0:
        return x.unsqueeze(-1).unfold(1, size, step).select(1, 0), bdim
    return x.unfold(physical(dimension, x, bdim), size, step), bdim


@batching_rule(aten.unfold_copy.default)
def unfold_copy(info: Any, in_dims: Any, x: Any, dimension: int, size: int, step: int) -> Any:
    """[B, *S] -> [B, *S with dim counting windows, size], copied."""
    out, bdim = unfold(info, in_dims, x, dimension, size, step)
    return out.clone(), bdim


@batching_rule(aten.unsqueeze.default)
def unsqueeze(info: Any, in_dims: Any, x: Any, dim: int) -> Any:
    """[B, *S] -> [B, *S with a 1 at dim]."""
    bdim = in_dims[0]
    at = normalize(dim, x.dim())  # the result has as many logical dims as the value has dims
    return (x.unsqueeze(at), bdim + 1) if at <= bdim else (x.unsqueeze(at + 1), bdim)


@batching_rule(
    aten._reshape_alias.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.view.default,
)
def view(info: Any, in_dims: Any, x: Any, size: Any, stride: Any = None) -> Any:
    """[B, *S] -> [B, *size]. Copies where the batch dim separates dims that are merged."""
    if in_dims[0] == x.dim() - 1 and x.is_contiguous() and x.numel():
        # The elements of an example are in order, and the wrapper goes on to show it.
        infer_size(size, x.shape[:-1].numel())
        return x.reshape(*size, x.shape[-1]), len(size)
    x = batch_first(x, in_dims[0])
    batch = x.shape[0]
    if batch:
        try:
            return x.reshape(batch, *size), 0
        except RuntimeError:
            pass  # said below in the sizes of one example
    return x.reshape(batch, *infer_size(size, x.shape[1:].numel())), 0


@batching_rule(aten.flatten.using_ints)
def flatten(info: Any, in_dims: Any, x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """[B, *S] -> [B, *S with the dims from start_dim to end_dim merged]."""
    bdim = in_dims[0]
    if x.dim() == 1:
        normalize(start_dim, 0), normalize(end_dim, 0)
        return x.unsqueeze(1), bdim
    first, last = physical(start_dim, x, bdim), physical(end_dim, x, bdim)
    if first > last:
        raise RuntimeError("flatten() has invalid args: start_dim cannot come after end_dim")
    if first < bdim < last:
        x, bdim, first = batch_first(x, bdim), 0, first + 1
    return x.flatten(first, last), bdim - (last - first) if last < bdim else bdim


@batching_rule(aten._reshape_copy.default)
def reshape_copy(info: Any, in_dims: Any, x: Any, size: Any) -> Any:
    """[B, *S] -> [B, *size], copied."""
    out, bdim = view(info, in_dims, x, size)
    return out.clone(), bdim


@batching_rule(aten.view.dtype)
def view_dtype(info: Any, in_dims: Any, x: Any, dtype: torch.dtype) -> Any:
    """[B, *S] -> [B, *S with the last dim resized]. The last dim must be that of the examples."""
    x, bdim = resolved(x), in_dims[0]
    if dtype.itemsize == x.dtype.itemsize:
        return x.view(dtype), bdim
    if logical_rank(x, bdim) == 0:
        raise RuntimeError(f"a 0-dim tensor of {x.dtype} cannot be viewed as {dtype}")
    x, bdim = _last_dense(x, bdim)
    return x.view(dtype), bdim


@batching_rule(aten.view_as_complex.default)
def view_as_complex(info: Any, in_dims: Any, x: Any) -> Any:
    """[B, *S, 2] -> [B, *S]."""
    if logical_rank(x, in_dims[0]) == 0:
        raise RuntimeError("view_as_complex: a 0-dim tensor has no last dim of size 2")
    x, bdim = _last_dense(x, in_dims[0])
    return aten.view_as_complex(x), bdim


@batching_rule(aten.view_as_real.default)
def view_as_real(info: Any, in_dims: Any, x: Any) -> Any:
    """[B, *S] -> [B, *S, 2]. The wrapper of a lazily conjugated value does not show that it is."""
    return aten.view_as_real(resolved(x)), in_dims[0]


def _last_dense(x: Any, x_bdim: int) -> Any:
    """The batch dim moved off the last place, and the last dim laid out densely there.

    So it is in what an example shows, if that shows as contiguous.
    """
    shown = x.is_contiguous() or x_bdim == x.dim() - 1
    if x_bdim == x.dim() - 1:
        x, x_bdim = batch_first(x, x_bdim), 0
    if shown and x.stride(-1) != 1:
        x, x_bdim = batch_first(x, x_bdim).contiguous(), 0
    return x, x_bdim
