"""Batching rules of sorting and order statistics along one dim.

A scalar counts as having one dim: it is given one, and its results lose it again.
"""

from __future__ import annotations

from typing import Any

from lamina.batching.dims import at_least_1d, batch_first, logical_rank, physical, without
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten


def _along(op: Any, x: Any, x_bdim: int, *before: Any, dim: int, keepdim: Any, **rest: Any) -> Any:
    """Run `op(x, *before, dim, ...)` along a logical dim; `keepdim` is None if it keeps the dim."""
    scalar = logical_rank(x, x_bdim) == 0
    x = at_least_1d(x, x_bdim)
    at = physical(dim, x, x_bdim)
    if keepdim is not None:
        outs = op(x, *before, dim=at, keepdim=keepdim and not scalar, **rest)
        return tuple(outs), x_bdim if keepdim and not scalar else without(x_bdim, at)
    outs = op(x, *before, dim=at, **rest)
    return tuple(out.squeeze(at) for out in outs) if scalar else tuple(outs), x_bdim


def _examples_flat(x: Any, x_bdim: int) -> Any:
    return at_least_1d(batch_first(x, x_bdim), 0).flatten(1)


@batching_rule(aten.kthvalue.default)
def kthvalue(info: Any, in_dims: Any, x: Any, k: int, dim: int = -1, keepdim: bool = False) -> Any:
    """[B, *S] -> [B, *S without dim], twice."""
    return _along(aten.kthvalue, x, in_dims[0], k, dim=dim, keepdim=keepdim)


@batching_rule(aten.median.default)
def median(info: Any, in_dims: Any, x: Any) -> Any:
    """[B, *S] -> [B]"""
    return _examples_flat(x, in_dims[0]).median(1).values, 0


@batching_rule(aten.median.dim)
def median_dim(info: Any, in_dims: Any, x: Any, dim: int, keepdim: bool = False) -> Any:
    """[B, *S] -> [B, *S without dim], twice."""
    return _along(aten.median.dim, x, in_dims[0], dim=dim, keepdim=keepdim)


@batching_rule(aten.mode.default)
def mode(info: Any, in_dims: Any, x: Any, dim: int = -1, keepdim: bool = False) -> Any:
    """[B, *S] -> [B, *S without dim], twice."""
    return _along(aten.mode, x, in_dims[0], dim=dim, keepdim=keepdim)


@batching_rule(aten.nanmedian.default)
def nanmedian(info: Any, in_dims: Any, x: Any) -> Any:
    """[B, *S] -> [B]"""
    return _examples_flat(x, in_dims[0]).nanmedian(1).values, 0


@batching_rule(aten.nanmedian.dim)
def nanmedian_dim(info: Any, in_dims: Any, x: Any, dim: int, keepdim: bool = False) -> Any:
    """[B, *S] -> [B, *S without dim], twice."""
    return _along(aten.nanmedian.dim, x, in_dims[0], dim=dim, keepdim=keepdim)


@batching_rule(aten.sort.default)
def sort(info: Any, in_dims: Any, x: Any, dim: int = -1, descending: bool = False) -> Any:
    """[B, *S] -> [B, *S], twice."""
    return _along(aten.sort.default, x, in_dims[0], dim=dim, keepdim=None, descending=descending)


@batching_rule(aten.sort.stable)
def sort_stable(
    info: Any,
    in_dims: Any,
    x: Any,
    *,
    stable: bool | None = None,
    dim: int = -1,
    descending: bool = False,
) -> Any:
    """[B, *S] -> [B, *S], twice."""
    return _along(
        aten.sort.stable,
        x,
        in_dims[0],
        dim=dim,
        keepdim=None,
        stable=stable,
        descending=descending,
    )


@batching_rule(aten.topk.default)
def topk(
    info: Any,
    in_dims: Any,
    x: Any,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,
) -> Any:
    """[B, *S] -> [B, *S with k at dim], twice."""
    # A scalar may be asked for no element at all, and then answers with itself.
    count = k if logical_rank(x, in_dims[0]) else 1
    return _along(
        aten.topk, x, in_dims[0], count, dim=dim, keepdim=None, largest=largest, sorted=sorted
    )
