"""Batching rules of ops that read elements by index.

An index that differs between examples is joined by the numbers of the examples as one more index:
`out[b, i] = x[b, index[b, i]]`. So every index is checked against the dim of its own example.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lamina.batching.advanced import (
    block_rank,
    example_numbers,
    is_mask,
    masks_to_numbers,
    place_of_block,
)
from lamina.batching.agreement import common_number
from lamina.batching.bounds import require, require_all
from lamina.batching.dims import (
    at_least_1d,
    batch_first,
    behind_batch,
    ensure_batched,
    logical_rank,
    logical_shape,
    normalize,
    pad_rank,
    physical,
    physical_size,
)
from lamina.batching.table import batching_rule
from lamina_core.errors import DataDependentError
from lamina_core.overloads import aten


@batching_rule(aten.gather.default)
def gather(
    info: Any, in_dims: Any, x: Any, dim: int, index: Any, *, sparse_grad: bool = False
) -> Any:
    """[B, *S], [B, *I] -> [B, *I]"""
    x_bdim, _, index_bdim = in_dims[:3]
    shape = logical_shape(index, index_bdim)
    size = info.batch_size
    if 0 in shape:  # ATen then asks nothing of the ranks
        return x.new_empty((size, *shape)), 0
    xs = at_least_1d(ensure_batched(x, x_bdim, size), 0)
    indices = at_least_1d(ensure_batched(index, index_bdim, size), 0)
    at = behind_batch(dim, logical_rank(x, x_bdim))
    return aten.gather(xs, at, indices, sparse_grad=sparse_grad).reshape(size, *shape), 0


@batching_rule(aten._unsafe_index.Tensor, aten.index.Tensor)
def index(info: Any, in_dims: Any, x: Any, indices: Any) -> Any:
    """[B, *S], list of [B, *I] -> [B, *S with I for the indexed dims].

    I stands where the indexed dims stood if they are neighbours, and in front otherwise.
    """
    x_bdim, index_bdims = in_dims
    for i, bdim in zip(indices, index_bdims, strict=True):
        if bdim is not None and is_mask(i):
            raise info.interpreter.error(
                DataDependentError,
                "a mask that differs between examples would give each a result of its own shape",
                "to fix: use torch.where, a masked reduction or torch.nonzero_static",
            )
    if all(bdim is None for bdim in index_bdims):
        return _index_batched(x, x_bdim, indices)
    indices, index_bdims = masks_to_numbers(indices, index_bdims)
    rank = block_rank(indices, index_bdims)
    front = place_of_block(indices)
    padded = [
        None if i is None else pad_rank(i, d, rank)
        for i, d in zip(indices, index_bdims, strict=True)
    ]
    if x_bdim is None:
        return aten.index(x, padded), front
    x = batch_first(x, x_bdim)
    out = aten.index(x, [example_numbers(x, rank), *padded])
    # [B, *I, front dims, ...] unless the numbers and the first index are neighbours already
    block = tuple(range(1, rank + 1))
    return out.movedim(block, tuple(at + front for at in block)) if front else out, 0


def _index_batched(x: Any, x_bdim: int, indices: Any) -> Any:
    """Index a batched tensor by indices that are the same for every example."""
    x = batch_first(x, x_bdim)
    out = aten.index(x, [None, *indices])
    used = [at for at, i in enumerate(indices) if i is not None]
    if used[-1] - used[0] == len(used) - 1:
        return out, 0
    ranks = [1 if is_mask(i) else i.dim() for i in indices if i is not None]
    return out, max(ranks)


@batching_rule(aten.index_select.default)
def index_select(info: Any, in_dims: Any, x: Any, dim: int, index: Any) -> Any:
    """[B, *S], [B, I] -> [B, *S with I at dim]. A 0-d index counts as one number."""
    x_bdim, _, index_bdim = in_dims[:3]
    rank = logical_rank(x, x_bdim)
    scalar = rank == 0
    x = at_least_1d(x, x_bdim)
    index = at_least_1d(index, index_bdim)
    at = physical(dim, x, x_bdim)
    if index_bdim is None:
        out = x.index_select(at, index)
        return (out.squeeze(at) if scalar else out), x_bdim
    require(index, 0, x.shape[at])  # what reads below counts negative ones from the end
    index = batch_first(index, index_bdim)
    if x_bdim is None:
        out, bdim = aten.index(x, [*[None] * at, index]), at
        return (out.squeeze(at + 1) if scalar else out), bdim
    x = batch_first(x, x_bdim)
    at = behind_batch(dim, rank)
    out = aten.index(x.movedim(at, 1), [example_numbers(x, 1), index]).movedim(1, at)
    return (out.squeeze(at) if scalar else out), 0


@batching_rule(aten.masked_select.default)
def masked_select(info: Any, in_dims: Any, x: Any, mask: Any) -> Any:
    """[B, *S], [*S] -> [B, n]. Only a mask that all examples share has one count."""
    x_bdim, mask_bdim = in_dims
    if mask_bdim is not None:
        raise info.interpreter.error(
            DataDependentError,
            "aten.masked_select.default would give each example an output of its own shape",
            "to fix: use torch.where, a masked reduction or torch.nonzero_static",
        )
    shape = torch.broadcast_shapes(logical_shape(x, x_bdim), mask.shape)
    x = pad_rank(x, x_bdim, len(shape)).expand(-1, *shape)
    x = x.reshape(info.batch_size, math.prod(shape))
    return x[:, mask.expand(shape).reshape(-1)], 0


@batching_rule(aten.narrow.Tensor)
def narrow_tensor(info: Any, in_dims: Any, x: Any, dim: int, start: Any, length: int) -> Any:
    """[B, *S], [B] -> [B, *S with length at dim]. Examples that start elsewhere share no view."""
    x_bdim, _, start_bdim = in_dims[:3]
    if start_bdim is None:
        at = physical(dim, x, x_bdim)
        return aten.narrow.Tensor(x, at, start, length), x_bdim
    if logical_rank(x, x_bdim) == 0:
        raise RuntimeError("narrow() cannot be applied to a 0-dim tensor.")
    if start.dim() != 1 or start.dtype.is_floating_point or start.dtype is torch.bool:
        raise RuntimeError(f"narrow() starts at one integer, not at {start.dtype} of mapped dims.")
    numbers = start.unsqueeze(1).to(torch.int64)
    size = logical_shape(x, x_bdim)[dim]
    require(numbers, -size, size + 1, "start")
    first = torch.where(numbers < 0, numbers + size, numbers)
    numbers = first + torch.arange(length, device=x.device) if length != 1 else first
    return index_select(info, (x_bdim, None, 0), x, dim, numbers)


@batching_rule(aten.nonzero_static.default)
def nonzero_static(info: Any, in_dims: Any, x: Any, *, size: int, fill_value: int = -1) -> Any:
    """[B, *S] -> [B, size, rank]. Slots of the result are found by counting nonzeros."""
    x = batch_first(x, in_dims[0])
    shape = x.shape[1:]
    flat = (x != 0).reshape(x.shape[0], torch.Size(shape).numel())
    slot = flat.cumsum(1) - 1
    spare = torch.full_like(slot, size)
    slot = torch.where(flat & (slot < size), slot, spare)
    numbers = torch.arange(flat.shape[1], device=x.device).expand_as(flat)
    found = numbers.new_full((x.shape[0], size + 1), -1).scatter(1, slot, numbers)[:, :size]
    columns, stride = [], 1
    for length in reversed(shape):
        columns.append((found // stride) % max(length, 1))
        stride *= max(length, 1)
    if not columns:
        return found.new_empty((*found.shape, 0)), 0
    out = torch.stack(columns[::-1], -1)
    return torch.where((found < 0).unsqueeze(-1), torch.full_like(out, fill_value), out), 0


@batching_rule(aten.one_hot.default)
def one_hot(info: Any, in_dims: Any, x: Any, num_classes: int = -1) -> Any:
    """[B, *S] -> [B, *S, num_classes]. A number too large for its class raises in the scatter."""
    if num_classes == -1:  # the largest number of an example says how many
        num_classes = common_number(
            info,
            at_least_1d(batch_first(x, in_dims[0]), 0).flatten(1).amax(1) + 1,
            "aten.one_hot.default",
            "to fix: pass num_classes",
        )
    zeros = x.new_zeros((*x.shape, num_classes))
    return zeros.scatter(-1, x.unsqueeze(-1), 1), in_dims[0]


@batching_rule(aten.repeat_interleave.Tensor)
def repeat_interleave(
    info: Any, in_dims: Any, repeats: Any, *, output_size: int | None = None
) -> Any:
    """[B, N] -> [B, output_size]: the number of the first running total above each place."""
    if output_size is None:
        raise info.interpreter.error(
            DataDependentError,
            "aten.repeat_interleave.Tensor would give each example an output of its own shape",
            "to fix: pass output_size, which says how many elements each example has",
        )
    repeats = batch_first(repeats, in_dims[0])
    require_all(repeats >= 0, "repeats can not be negative")
    totals = repeats.cumsum(1)
    require_all(
        repeats.sum(1) == output_size, "allocated size does not match required size: output_size"
    )
    places = torch.arange(output_size, device=repeats.device, dtype=totals.dtype)
    places = places.expand(info.batch_size, output_size).contiguous()
    return torch.searchsorted(totals, places, right=True).to(repeats.dtype), 0


@batching_rule(aten.take.default)
def take(info: Any, in_dims: Any, x: Any, index: Any) -> Any:
    """[B, *S], [B, *I] -> [B, *I], with x read as a vector."""
    x_bdim, index_bdim = in_dims
    if x_bdim is None:
        return x.take(index), index_bdim
    x = batch_first(x, x_bdim).flatten(1) if x.dim() > 1 else x.unsqueeze(-1)
    if index_bdim is None:
        return aten.index(x, [None, index]), 0
    index = batch_first(index, index_bdim)
    return aten.index(x, [example_numbers(x, index.dim() - 1), index]), 0


# -- searching in sorted sequences -----------------------------------------------------------------


@batching_rule(aten.bucketize.Tensor)
def bucketize(
    info: Any,
    in_dims: Any,
    x: Any,
    boundaries: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
) -> Any:
    """[B, *S], [B, N] -> [B, *S]"""
    return searchsorted(info, in_dims[::-1], boundaries, x, out_int32=out_int32, right=right)


@batching_rule(aten.bucketize.Scalar)
def bucketize_scalar(
    info: Any,
    in_dims: Any,
    x: Any,
    boundaries: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
) -> Any:
    """[B, N] -> [B]"""
    return searchsorted_scalar(info, in_dims[1:], boundaries, x, out_int32=out_int32, right=right)


@batching_rule(aten.searchsorted.Tensor)
def searchsorted(
    info: Any, in_dims: Any, sequence: Any, x: Any, *, sorter: Any = None, **options: Any
) -> Any:
    """[B, *S, N], [B, *S, M] -> [B, *S, M]. One logical sequence [N] serves an x of any rank."""
    bdim, x_bdim = in_dims[:2]
    sorter_bdim = info.kwarg_dims.get("sorter")
    if bdim is None and sorter_bdim is None and sequence.dim() == 1:
        return aten.searchsorted(sequence, x, sorter=sorter, **options), x_bdim
    size = info.batch_size
    sequence = ensure_batched(sequence, bdim, size).contiguous()
    x = ensure_batched(x, x_bdim, size).contiguous()
    if sorter is not None:
        sorter = ensure_batched(sorter, sorter_bdim, size).contiguous()
    shape = x.shape
    if sequence.dim() == 2:
        x = x.reshape(size, torch.Size(shape[1:]).numel())
    return aten.searchsorted(sequence, x, sorter=sorter, **options).reshape(shape), 0


@batching_rule(aten.searchsorted.Scalar)
def searchsorted_scalar(info: Any, in_dims: Any, sequence: Any, x: Any, **options: Any) -> Any:
    """[B, N] -> [B]"""
    bdim = in_dims[0]
    dtype = torch.result_type(sequence, x)
    number = torch.full((), x, dtype=dtype, device=sequence.device)
    return searchsorted(info, (bdim, None), sequence.to(dtype), number, **options)


# -- backward --------------------------------------------------------------------------------------


@batching_rule(aten.diagonal_backward.default)
def diagonal_backward(
    info: Any, in_dims: Any, grad: Any, input_sizes: Any, offset: int, dim1: int, dim2: int
) -> Any:
    """[B, *S without dim1 and dim2, diagonal] -> [B, *S]"""
    grad, rank = batch_first(grad, in_dims[0]), len(input_sizes)
    first, second = behind_batch(dim1, rank), behind_batch(dim2, rank)
    sizes = physical_size(input_sizes, 0, info.batch_size)
    return aten.diagonal_backward(grad, sizes, offset, first, second), 0


@batching_rule(aten.select_backward.default)
def select_backward(
    info: Any, in_dims: Any, grad: Any, input_sizes: Any, dim: int, index: int
) -> Any:
    """[B, *S without dim] -> [B, *S]"""
    grad, at = batch_first(grad, in_dims[0]), behind_batch(dim, len(input_sizes))
    sizes = physical_size(input_sizes, 0, info.batch_size)
    return aten.select_backward(grad, sizes, at, index), 0


@batching_rule(aten.slice_backward.default)
def slice_backward(
    info: Any, in_dims: Any, grad: Any, input_sizes: Any, dim: int, start: int, end: int, step: int
) -> Any:
    """[B, *S with dim sliced] -> [B, *S]"""
    grad, at = batch_first(grad, in_dims[0]), behind_batch(dim, len(input_sizes))
    sizes = physical_size(input_sizes, 0, info.batch_size)
    return aten.slice_backward(grad, sizes, at, start, end, step), 0


@batching_rule(aten.unfold_backward.default)
def unfold_backward(
    info: Any, in_dims: Any, grad: Any, input_sizes: Any, dim: int, size: int, step: int
) -> Any:
    """[B, *S with dim counting windows, size] -> [B, *S]"""
    grad = batch_first(grad, in_dims[0])
    if not input_sizes:  # a scalar has one window: itself
        return grad.reshape(grad.shape[0], size).sum(1), 0
    sizes = physical_size(input_sizes, 0, info.batch_size)
    at = behind_batch(normalize(dim, len(input_sizes)), len(input_sizes))
    return aten.unfold_backward(grad, sizes, at, size, step), 0
