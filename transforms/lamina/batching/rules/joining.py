"""Batching rules of ops that put tensors together, or put their elements in another order."""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.dims import (
    align,
    at_least_1d,
    batch_first,
    behind_batch,
    fold,
    logical_rank,
    logical_shape,
    normalize,
    physical,
    physical_dims,
    physical_size,
    unfold,
)
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten


@batching_rule(aten.block_diag.default)
def block_diag(info: Any, in_dims: Any, tensors: Any) -> Any:
    """List of [B, M, N] -> [B, sum of M, sum of N]. Vectors are rows, scalars are 1 by 1."""
    xs, bdim = align(tensors, in_dims[0], info.batch_size, to=0)
    xs = [x.reshape(x.shape[0], *([1] * (3 - x.dim())), *x.shape[1:]) for x in xs]
    width, left, rows = sum(x.shape[2] for x in xs), 0, []
    for x in xs:
        rows.append(aten.constant_pad_nd(x, [left, width - left - x.shape[2]]))
        left += x.shape[2]
    return torch.cat(rows, 1), bdim


@batching_rule(aten.cat.default)
def cat(info: Any, in_dims: Any, tensors: Any, dim: int = 0) -> Any:
    """List of [B, *S] -> [B, *S joined at dim].

    ATen skips tensors of shape [0] whatever the rank of the others; batched, they have two dims.
    """
    shapes = [logical_shape(x, bdim) for x, bdim in zip(tensors, in_dims[0], strict=True)]
    kept = [i for i, shape in enumerate(shapes) if shape != (0,)] or [0]
    xs = [tensors[i] for i in kept]
    bdims = [in_dims[0][i] for i in kept]
    if len(kept) < len(tensors):
        dtype = _promoted(tensors)
        xs = [x.to(dtype) for x in xs]
    if all(bdim is None for bdim in bdims):
        return torch.cat(xs, dim), None
    xs, bdim = align(xs, bdims, info.batch_size)
    return torch.cat(xs, physical(dim, xs[0], bdim)), bdim


def _promoted(tensors: Any) -> torch.dtype:
    dtype = tensors[0].dtype
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


@batching_rule(aten._stack.default, aten.stack.default)
def stack(info: Any, in_dims: Any, tensors: Any, dim: int = 0) -> Any:
    """List of [B, *S] -> [B, *S with the list at dim]."""
    xs, bdim = align(tensors, in_dims[0], info.batch_size)
    at = normalize(dim, xs[0].dim())
    return (torch.stack(xs, at), bdim + 1) if at <= bdim else (torch.stack(xs, at + 1), bdim)


@batching_rule(aten.constant_pad_nd.default)
def constant_pad_nd(info: Any, in_dims: Any, x: Any, pad: Any, value: Any = 0) -> Any:
    """[B, *S] -> [B, *S padded]. The padded dims are the last ones, so the batch dim makes way."""
    bdim = in_dims[0]
    padded = len(pad) // 2
    if padded > logical_rank(x, bdim):
        raise RuntimeError(
            f"a pad of {len(pad)} numbers is too long for a tensor of shape "
            f"{list(logical_shape(x, bdim))}"
        )
    if bdim >= x.dim() - padded:
        x, bdim = batch_first(x, bdim), 0
    return aten.constant_pad_nd(x, pad, value), bdim


@batching_rule(aten.pad.default)
def pad(
    info: Any, in_dims: Any, x: Any, pad: Any, mode: str = "constant", value: Any = None
) -> Any:
    """[B, *S] -> [B, *S padded]. What is not constant has one dim or two in front: B joins them."""
    if mode == "constant":
        return constant_pad_nd(info, in_dims, x, pad, 0 if value is None else value)
    rank = logical_rank(x, in_dims[0]) - len(pad) // 2
    if rank == 2:
        out = aten.pad(fold(x, in_dims[0], 0, info.batch_size), pad, mode, value)
        return unfold(out, 0, info.batch_size), 0
    return (
        (aten.pad(batch_first(x, in_dims[0]), pad, mode, value), 0) if rank == 1 else NotImplemented
    )


@batching_rule(aten.diag_embed.default)
def diag_embed(
    info: Any, in_dims: Any, x: Any, offset: int = 0, dim1: int = -2, dim2: int = -1
) -> Any:
    """[B, *S, N] -> [B, *S with dim1 and dim2, of size N + |offset|]."""
    x = batch_first(x, in_dims[0])
    first, second = (behind_batch(dim, x.dim()) for dim in (dim1, dim2))
    return aten.diag_embed(x, offset, first, second), 0


@batching_rule(aten.flip.default)
def flip(info: Any, in_dims: Any, x: Any, dims: Any) -> Any:
    """[B, *S] -> [B, *S]"""
    if logical_rank(x, in_dims[0]) == 0:
        return x.clone(), in_dims[0]
    return x.flip(physical_dims(dims, x, in_dims[0])), in_dims[0]


@batching_rule(aten.repeat.default)
def repeat(info: Any, in_dims: Any, x: Any, repeats: Any) -> Any:
    """[B, *S] -> [new dims, B, *S repeated]: new dims go in front, so the batch dim moves back."""
    bdim = in_dims[0] + len(repeats) - logical_rank(x, in_dims[0])
    if bdim < in_dims[0]:
        raise RuntimeError(
            "Number of dimensions of repeat dims can not be smaller than number of dimensions of "
            f"tensor: {list(repeats)} for shape {list(logical_shape(x, in_dims[0]))}"
        )
    return x.repeat(physical_size(repeats, bdim, 1)), bdim


@batching_rule(aten.roll.default)
def roll(info: Any, in_dims: Any, x: Any, shifts: Any, dims: Any = ()) -> Any:
    """[B, *S] -> [B, *S]. Without dims the elements roll in the order of their numbers."""
    bdim = in_dims[0]
    if dims:
        return _as_1d(x, bdim, lambda y: y.roll(shifts, physical_dims(dims, y, bdim))), bdim
    x = batch_first(x, bdim)
    return x.flatten(1).roll(shifts, 1).reshape(x.shape) if x.dim() > 1 else x.clone(), 0


def _as_1d(x: Any, x_bdim: int, function: Any) -> Any:
    """Apply a function that keeps the shape, with a scalar taken as a vector of one."""
    return function(at_least_1d(x, x_bdim)).reshape(x.shape)


@batching_rule(aten.rot90.default)
def rot90(info: Any, in_dims: Any, x: Any, k: int = 1, dims: Any = (0, 1)) -> Any:
    """[B, *S] -> [B, *S with the two dims swapped if k is odd]."""
    return x.rot90(k, physical_dims(dims, x, in_dims[0])), in_dims[0]


@batching_rule(aten.tril.default)
def tril(info: Any, in_dims: Any, x: Any, diagonal: int = 0) -> Any:
    """[B, *S, M, N] -> [B, *S, M, N]"""
    x, bdim = _matrices(x, in_dims[0])
    return x.tril(diagonal), bdim


@batching_rule(aten.triu.default)
def triu(info: Any, in_dims: Any, x: Any, diagonal: int = 0) -> Any:
    """[B, *S, M, N] -> [B, *S, M, N]"""
    x, bdim = _matrices(x, in_dims[0])
    return x.triu(diagonal), bdim


def _matrices(x: Any, x_bdim: int) -> Any:
    """The batch dim moved out of the last two dims."""
    if logical_rank(x, x_bdim) < 2:
        raise RuntimeError(f"a matrix is wanted, got shape {list(logical_shape(x, x_bdim))}")
    return (x, x_bdim) if x_bdim < x.dim() - 2 else (batch_first(x, x_bdim), 0)
