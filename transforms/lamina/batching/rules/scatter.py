"""Batching rules of ops that write elements by index, out of place.

As for reading (see `indexing`), an index that differs between examples is joined by the numbers of
the examples, so that no index reaches into another example.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.advanced import (
    block_rank,
    example_numbers,
    is_mask,
    masks_to_numbers,
    place_of_block,
)
from lamina.batching.bounds import require, require_all
from lamina.batching.dims import (
    at_least_1d,
    batch_first,
    behind_batch,
    ensure_batched,
    logical_rank,
    logical_shape,
    pad_rank,
)
from lamina.batching.table import batching_rule
from lamina_core.dispatch import followed
from lamina_core.errors import DataDependentError
from lamina_core.overloads import aten

# -- regions: x with a view of it replaced ---------------------------------------------------------


def _both(info: Any, in_dims: Any, x: Any, src: Any) -> Any:
    size = info.batch_size
    return ensure_batched(x, in_dims[0], size), ensure_batched(src, in_dims[1], size)


@batching_rule(aten.diagonal_scatter.default)
def diagonal_scatter(
    info: Any, in_dims: Any, x: Any, src: Any, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Any:
    """[B, *S], [B, *S without dim1 and dim2, diagonal] -> [B, *S]"""
    x, src = _both(info, in_dims, x, src)
    first, second = (behind_batch(dim, logical_rank(x, 0)) for dim in (dim1, dim2))
    return aten.diagonal_scatter(x, src, offset, first, second), 0


@batching_rule(aten.select_scatter.default)
def select_scatter(info: Any, in_dims: Any, x: Any, src: Any, dim: int, index: int) -> Any:
    """[B, *S], [B, *S without dim] -> [B, *S]"""
    x, src = _both(info, in_dims, x, src)
    at = behind_batch(dim, logical_rank(x, 0))
    return followed(aten.select_scatter.default, x, src, at, index), 0


@batching_rule(aten.slice_scatter.default)
def slice_scatter(
    info: Any,
    in_dims: Any,
    x: Any,
    src: Any,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Any:
    """[B, *S], [B, *S with dim sliced] -> [B, *S]"""
    src_rank = logical_rank(x, in_dims[0])
    x, src = ensure_batched(x, in_dims[0], info.batch_size), pad_rank(src, in_dims[1], src_rank)
    at = behind_batch(dim, src_rank)
    # ATen lets src broadcast to the slice, which it writes by copy.
    src = src.expand(aten.slice(x, at, start, end, step).shape)
    return followed(aten.slice_scatter.default, x, src, at, start, end, step), 0


# -- one index tensor as large as what is written --------------------------------------------------


def _spread(info: Any, in_dims: Any, x: Any, dim: int, index: Any, src: Any = None) -> Any:
    """Operands of a scatter op with the batch dim first, and its dim; scalars get a dim."""
    size, rank = info.batch_size, logical_rank(x, in_dims[0])
    xs = at_least_1d(ensure_batched(x, in_dims[0], size), 0)
    indices = ensure_batched(index, in_dims[2], size)
    if 0 in indices.shape[1:]:  # ATen then asks nothing of the ranks
        indices = indices.reshape(size, *[0] * (xs.dim() - 1))
        if src is not None:
            src = xs.new_empty(indices.shape, dtype=src.dtype)
    else:
        indices = at_least_1d(indices, 0)
        if src is not None:
            src = at_least_1d(ensure_batched(src, in_dims[3], size), 0)
    return xs, behind_batch(dim, rank), indices, src


def _restore(info: Any, in_dims: Any, x: Any, out: Any) -> Any:
    return (out.squeeze(-1) if logical_rank(x, in_dims[0]) == 0 else out), 0


def _scatter_source(op: Any) -> Any:
    def rule(
        info: Any, in_dims: Any, x: Any, dim: int, index: Any, src: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """[B, *S], [B, *I], [B, *src] -> [B, *S]"""
        xs, at, indices, source = _spread(info, in_dims, x, dim, index, src)
        return _restore(info, in_dims, x, op(xs, at, indices, source, *args, **kwargs))

    return rule


def _scatter_number(op: Any) -> Any:
    def rule(
        info: Any, in_dims: Any, x: Any, dim: int, index: Any, value: Any, **kwargs: Any
    ) -> Any:
        """[B, *S], [B, *I], number -> [B, *S]"""
        xs, at, indices, _ = _spread(info, in_dims, x, dim, index)
        return _restore(info, in_dims, x, op(xs, at, indices, value, **kwargs))

    return rule


for _op in (
    aten.scatter.reduce,
    aten.scatter.src,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
):
    batching_rule(_op, state="family")(_scatter_source(_op))

for _op in (aten.scatter.value, aten.scatter.value_reduce):
    batching_rule(_op, state="family")(_scatter_number(_op))


# -- one index vector for a dim --------------------------------------------------------------------


def _rows(
    info: Any, in_dims: Any, x: Any, dim: int, index: Any, source: Any, source_bdim: int | None
) -> Any:
    """Operands with the batch dim first and `dim` behind it, and the place of `dim`."""
    size, rank = info.batch_size, logical_rank(x, in_dims[0])
    at = behind_batch(dim, rank)
    index = at_least_1d(index, in_dims[2])
    if in_dims[2] is not None:
        index = batch_first(index, in_dims[2])
    x = at_least_1d(ensure_batched(x, in_dims[0], size), 0)
    source = at_least_1d(ensure_batched(source, source_bdim, size), 0)
    return x, index, source, at


@batching_rule(aten.index_add.default)
def index_add(
    info: Any, in_dims: Any, x: Any, dim: int, index: Any, source: Any, *, alpha: Any = 1
) -> Any:
    """[B, *S], [B, I], [B, *S with I at dim] -> [B, *S]"""
    rows, numbers, added, at = _rows(info, in_dims, x, dim, index, source, in_dims[3])
    if in_dims[2] is None:
        out = aten.index_add(rows, at, numbers, added, alpha=alpha)
    else:
        added = added if alpha == 1 else (added * alpha).to(added.dtype)
        out = _put_rows(rows, numbers, added, at, accumulate=True)
    return _restore(info, in_dims, x, out)


@batching_rule(aten.index_copy.default)
def index_copy(info: Any, in_dims: Any, x: Any, dim: int, index: Any, source: Any) -> Any:
    """[B, *S], [B, I], [B, *S with I at dim] -> [B, *S]"""
    rows, numbers, copied, at = _rows(info, in_dims, x, dim, index, source, in_dims[3])
    if in_dims[2] is None:
        out = aten.index_copy(rows, at, numbers, copied)
    else:
        out = _put_rows(rows, numbers, copied, at, accumulate=False)
    return _restore(info, in_dims, x, out)


def _put_rows(x: Any, index: Any, source: Any, at: int, *, accumulate: bool) -> Any:
    if source.dim() < x.dim():  # a 0-d source that is written to one place of a vector
        source = source.unsqueeze(at)
    require(index, 0, x.shape[at])  # what writes below counts negative ones from the end
    moved, source = x.movedim(at, 1), source.movedim(at, 1)
    out = aten.index_put(moved, [example_numbers(x, 1), index], source, accumulate)
    return out.movedim(1, at)


@batching_rule(aten.index_fill.int_Scalar)
def index_fill(info: Any, in_dims: Any, x: Any, dim: int, index: Any, value: Any) -> Any:
    """[B, *S], [B, I], number -> [B, *S]"""
    if in_dims[2] is None:
        at = behind_batch(dim, logical_rank(x, in_dims[0]))
        rows = at_least_1d(batch_first(x, in_dims[0]), 0)
        return _restore(info, in_dims, x, aten.index_fill(rows, at, index, value))
    number = torch.full((), value, dtype=x.dtype, device=x.device)
    return index_fill_tensor(info, (*in_dims[:3], None), x, dim, index, number)


@batching_rule(aten.index_fill.int_Tensor)
def index_fill_tensor(info: Any, in_dims: Any, x: Any, dim: int, index: Any, value: Any) -> Any:
    """[B, *S], [B, I], [B] -> [B, *S]"""
    if in_dims[2] is None and in_dims[3] is None:
        return index_fill(info, in_dims, x, dim, index, value)
    rows, numbers, value, at = _rows(info, in_dims, x, dim, index, value, in_dims[3])
    if in_dims[2] is None:
        numbers = numbers.unsqueeze(0)
    # A mask, as a place that is named twice is filled once, with one derivative.
    mask = torch.zeros((numbers.shape[0], rows.shape[at]), dtype=torch.bool, device=x.device)
    mask = aten.index_put(mask, [example_numbers(mask, 1), numbers], mask.new_ones(()))
    ones = [1] * (rows.dim() - at - 1)
    mask = mask.reshape(mask.shape[0], *[1] * (at - 1), mask.shape[1], *ones)
    value = value.to(x.dtype).reshape(-1, *[1] * (rows.dim() - 1))
    return _restore(info, in_dims, x, torch.where(mask, value, rows))


@batching_rule(aten.index_reduce.default)
def index_reduce(
    info: Any,
    in_dims: Any,
    x: Any,
    dim: int,
    index: Any,
    source: Any,
    reduce: str,
    *,
    include_self: bool = True,
) -> Any:
    """[B, *S], [B, I], [B, *S with I at dim] -> [B, *S]"""
    rows, numbers, source, at = _rows(info, in_dims, x, dim, index, source, in_dims[3])
    if in_dims[2] is None:
        out = aten.index_reduce(rows, at, numbers, source, reduce, include_self=include_self)
    else:
        ones = [1] * (source.dim() - at - 1)
        numbers = numbers.reshape(numbers.shape[0], *[1] * (at - 1), numbers.shape[1], *ones)
        out = aten.scatter_reduce(
            rows, at, numbers.expand_as(source), source, reduce, include_self=include_self
        )
    return _restore(info, in_dims, x, out)


# -- advanced indexing -----------------------------------------------------------------------------


@batching_rule(aten._index_put_impl.default, aten._unsafe_index_put.default, aten.index_put.default)
def index_put(
    info: Any,
    in_dims: Any,
    x: Any,
    indices: Any,
    values: Any,
    accumulate: bool = False,
    unsafe: bool = False,
) -> Any:
    """[B, *S], list of [B, *I], [B, *values] -> [B, *S]

    The indexed dims are brought to the front, so that the block stands behind the batch dim.
    """
    x_bdim, index_bdims, values_bdim = in_dims[:3]
    size = info.batch_size
    x = ensure_batched(x, x_bdim, size)
    at = _lone_mask(indices)
    if at is not None:
        filled = _fill_by_mask(x, at, indices[at], index_bdims[at], values, values_bdim, accumulate)
        if filled is not None:
            return filled, 0
    if any(d is not None and is_mask(i) for i, d in zip(indices, index_bdims, strict=True)):
        raise info.interpreter.error(
            DataDependentError,
            "x[mask] = values with a mask that differs between examples needs one value, as each "
            "example has a number of places of its own",
            "to fix: use torch.where(mask, values, x), or masked_scatter",
        )
    indices, index_bdims = masks_to_numbers(indices, index_bdims)
    used = [at for at, index in enumerate(indices) if index is not None]
    block = block_rank(indices, index_bdims)
    front = place_of_block(indices)
    moved = x.movedim([behind_batch(at, x.dim() - 1) for at in used], list(_after(0, len(used))))
    numbers = [
        pad_rank(indices[at], index_bdims[at], block if index_bdims[at] is not None else 0)
        for at in used
    ]
    if all(index_bdims[at] is None for at in used):
        head: Any = None
    else:
        head = example_numbers(x, block)
    # values: [front dims, *I, rest] -> [*I, front dims, rest], each behind the batch dim
    values = pad_rank(values, values_bdim, block + x.dim() - 1 - len(used))
    if values_bdim is None:
        values = pad_rank(values.unsqueeze(0), 0, block + x.dim() - 1 - len(used))
    if front:
        values = values.movedim(list(_after(front, block)), list(_after(0, block)))
    out = aten.index_put(moved, [head, *numbers], values, accumulate)
    return (
        out.movedim(list(_after(0, len(used))), [behind_batch(at, x.dim() - 1) for at in used]),
        0,
    )


def _after(start: int, count: int) -> range:
    """`count` dims from logical dim `start` on, of a value with its batch dim first."""
    return range(start + 1, start + count + 1)


def _lone_mask(indices: Any) -> int | None:
    """The place of the only index, if it is a mask."""
    used = [at for at, index in enumerate(indices) if index is not None]
    return used[0] if len(used) == 1 and is_mask(indices[used[0]]) else None


def _fill_by_mask(
    x: Any,
    at: int,
    mask: Any,
    mask_bdim: int | None,
    values: Any,
    values_bdim: int | None,
    accumulate: bool,
) -> Any:
    """`x[:, mask] = values` by `where`, if the values do not run over the places of the mask."""
    mask_rank = logical_rank(mask, mask_bdim)
    behind = x.dim() - 1 - at - mask_rank
    shape = list(logical_shape(values, values_bdim))
    block = len(shape) - 1 - behind  # where the values have the dim that runs over the places
    values = batch_first(values, values_bdim)
    if block >= 0:
        if shape[block] != 1:
            return None
        shape[block : block + 1] = [1] * mask_rank
        values = values.reshape(shape if values_bdim is None else [values.shape[0], *shape])
    values = pad_rank(values, None if values_bdim is None else 0, x.dim() - 1).to(x.dtype)
    mask = batch_first(mask.to(torch.bool), mask_bdim)
    size = mask.shape[:1] if mask_bdim is not None else (1,)
    mask = mask.reshape(*size, *[1] * at, *mask.shape[mask.dim() - mask_rank :], *[1] * behind)
    return torch.where(mask, x + values if accumulate else values, x)


@batching_rule(aten.put.default)
def put(info: Any, in_dims: Any, x: Any, index: Any, source: Any, accumulate: bool = False) -> Any:
    """[B, *S], [B, *I], [B, *I] -> [B, *S], with x written as a vector."""
    size = info.batch_size
    x = ensure_batched(x, in_dims[0], size)
    flat = x.reshape(size, torch.Size(x.shape[1:]).numel())
    index = ensure_batched(index, in_dims[1], size)
    index = index.reshape(size, torch.Size(index.shape[1:]).numel())
    source = ensure_batched(source, in_dims[2], size).reshape(index.shape)
    out = aten.index_put(flat, [example_numbers(flat, 1), index], source, accumulate)
    return out.reshape(x.shape), 0


# -- masks -----------------------------------------------------------------------------------------


@batching_rule(aten.masked_fill.Scalar)
def masked_fill(info: Any, in_dims: Any, x: Any, mask: Any, value: Any) -> Any:
    """[B, *S], [B, *M], number -> [B, *S broadcast with M]"""
    rank = max(logical_rank(x, in_dims[0]), logical_rank(mask, in_dims[1]))
    x, mask = pad_rank(x, in_dims[0], rank), pad_rank(mask, in_dims[1], rank)
    return aten.masked_fill(x, mask, value), 0


@batching_rule(aten.masked_fill.Tensor)
def masked_fill_tensor(info: Any, in_dims: Any, x: Any, mask: Any, value: Any) -> Any:
    """[B, *S], [B, *M], [B] -> [B, *S broadcast with M]"""
    if in_dims[2] is None:
        return masked_fill(info, in_dims, x, mask, value)
    rank = max(logical_rank(x, in_dims[0]), logical_rank(mask, in_dims[1]))
    x, mask = pad_rank(x, in_dims[0], rank), pad_rank(mask, in_dims[1], rank)
    return torch.where(mask, pad_rank(value.to(x.dtype), in_dims[2], rank), x), 0


@batching_rule(aten.masked_scatter.default)
def masked_scatter(info: Any, in_dims: Any, x: Any, mask: Any, source: Any) -> Any:
    """[B, *S], [B, *M], [B, *source] -> [B, *S]. Place k of the mask takes element k of source."""
    size = info.batch_size
    shape = torch.broadcast_shapes(logical_shape(x, in_dims[0]), logical_shape(mask, in_dims[1]))
    count = torch.Size(shape).numel()
    x = _flat(x, in_dims[0], shape, size)
    mask = _flat(mask, in_dims[1], shape, size)
    source = ensure_batched(source, in_dims[2], size)
    length = torch.Size(source.shape[1:]).numel()
    if not count or not length:
        require_all(~mask, "Number of elements of source < number of ones in mask")
        return x.reshape(size, *shape), 0
    place = (mask.cumsum(1) - 1).clamp(min=0)
    taken = source.reshape(size, length).gather(1, place)
    return torch.where(mask, taken, x).reshape(size, *shape), 0


@batching_rule(aten.masked_scatter_backward.default)
def masked_scatter_backward(info: Any, in_dims: Any, grad: Any, mask: Any, sizes: Any) -> Any:
    """[B, *S], [B, *S] -> [B, *sizes]: element k is that at place k of the mask, or 0."""
    size = info.batch_size
    shape = torch.broadcast_shapes(logical_shape(grad, in_dims[0]), logical_shape(mask, in_dims[1]))
    grad = _flat(grad, in_dims[0], shape, size)
    mask = _flat(mask, in_dims[1], shape, size)
    count = torch.Size(sizes).numel()
    place = mask.cumsum(1) - 1
    spare = torch.full_like(place, count)  # one slot more, for what the mask leaves out
    slot = torch.where(mask, place, spare)
    out = grad.new_zeros((size, count + 1)).scatter(1, slot, grad)
    return out[:, :count].reshape(size, *sizes), 0


def _flat(x: Any, x_bdim: int | None, shape: Any, size: int) -> Any:
    """[B, *S] -> [B, n], broadcast to the logical shape first."""
    x = pad_rank(ensure_batched(x, x_bdim, size), 0, len(shape)).expand(size, *shape)
    return x.reshape(size, torch.Size(shape).numel())
