"""Batching rules of reductions and of cumulative ops.

A reduction without dims becomes one over all logical dims. ATen reads an empty list of dims as
"all", so a scalar is first given a dim of size 1 to reduce: an empty list would eat the batch dim.
"""

from __future__ import annotations

from typing import Any

import torch

from lamina.batching.agreement import common_answer
from lamina.batching.dims import (
    at_least_1d,
    batch_first,
    behind_batch,
    logical_dims,
    logical_rank,
    pad_rank,
    physical,
    physical_dims,
    unfold,
    without,
)
from lamina.batching.table import batching_rule
from lamina_core.overloads import aten


def _over(op: Any, x: Any, x_bdim: int, dim: Any, keepdim: bool, *before: Any, **rest: Any) -> Any:
    """Run `op(x, *before, dim, keepdim)` over logical dims; None and [] are all of them."""
    scalar = logical_rank(x, x_bdim) == 0
    x = at_least_1d(x, x_bdim)
    if isinstance(dim, int):
        at: Any = physical(dim, x, x_bdim)
        gone = [at]
    else:
        at = gone = physical_dims(dim, x, x_bdim) if dim else logical_dims(x, x_bdim)
    keepdim = keepdim and not scalar
    out = op(x, *before, at, keepdim=keepdim, **rest)
    return (tuple(out) if isinstance(out, (tuple, list)) else out), (
        x_bdim if keepdim else without(x_bdim, *gone)
    )


# One op a line: (x, dim list, keepdim=False), with the op for the whole tensor if it is another.
_OVER_LIST = [
    (aten.all.dims, aten.all.default),
    (aten.amax.default, aten.max.default),  # ties share the derivative in both
    (aten.amin.default, aten.min.default),
    (aten.any.dims, aten.any.default),
    (aten.logsumexp.default, None),
    (aten.mean.dim, aten.mean.default),
    (aten.nansum.default, None),
    (aten.sum.dim_IntList, aten.sum.default),
]
# (x, dim, keepdim=False): one dim, one output or values and indices.
_OVER_ONE = [
    aten._aminmax.dim,
    aten.all.dim,
    aten.any.dim,
    aten.max.dim,
    aten.min.dim,
    aten.prod.dim_int,
]
# (x, dim): the dim stays.
_ALONG = [
    aten._logcumsumexp.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.cumprod.default,
    aten.cumsum.default,
    aten.logcumsumexp.default,
]


def _register_over_list(op: Any, whole: Any) -> None:
    @batching_rule(op, state="family")
    def over_list(
        info: Any, in_dims: Any, x: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any
    ) -> Any:
        """[B, *S] -> [B, *S without dim]. For `all` and `any`, dim=[] means no dim."""
        if dim is not None and not dim and op in (aten.all.dims, aten.any.dims):
            return op(x, [], keepdim), in_dims[0]
        return _over(op, x, in_dims[0], dim, keepdim, **kwargs)

    if whole is None:
        return

    @batching_rule(whole, state="family")
    def over_all(info: Any, in_dims: Any, x: Any, **kwargs: Any) -> Any:
        """[B, *S] -> [B]"""
        return _over(op, x, in_dims[0], None, False, **kwargs)


def _register_over_one(op: Any) -> None:
    @batching_rule(op, state="family")
    def over_one(
        info: Any, in_dims: Any, x: Any, dim: int, keepdim: bool = False, **kwargs: Any
    ) -> Any:
        """[B, *S] -> [B, *S without dim]"""
        return _over(op, x, in_dims[0], dim, keepdim, **kwargs)


def _register_along(op: Any) -> None:
    @batching_rule(op, state="family")
    def along(info: Any, in_dims: Any, x: Any, dim: int, **kwargs: Any) -> Any:
        """[B, *S] -> [B, *S]"""
        bdim = in_dims[0]
        scalar = logical_rank(x, bdim) == 0
        x = at_least_1d(x, bdim)
        at = physical(dim, x, bdim)
        out = op(x, at, **kwargs)
        if isinstance(out, (tuple, list)):
            return tuple(o.squeeze(at) if scalar else o for o in out), bdim
        return (out.squeeze(at) if scalar else out), bdim


for _op, _whole in _OVER_LIST:
    _register_over_list(_op, _whole)
for _op in _OVER_ONE:
    _register_over_one(_op)
for _op in _ALONG:
    _register_along(_op)


@batching_rule(aten._aminmax.default)
def _aminmax(info: Any, in_dims: Any, x: Any) -> Any:
    """[B, *S] -> [B], twice."""
    return tuple(aten._aminmax.dim(batch_first(x, in_dims[0]).flatten(1), 1)), 0


@batching_rule(aten.aminmax.default)
def aminmax(info: Any, in_dims: Any, x: Any, *, dim: Any = None, keepdim: bool = False) -> Any:
    """[B, *S] -> [B, *S without dim], twice."""
    low, to = _over(aten.amin, x, in_dims[0], [] if dim is None else [dim], keepdim)
    high, _ = _over(aten.amax, x, in_dims[0], [] if dim is None else [dim], keepdim)
    return (low, high), to


@batching_rule(aten.argmax.default)
def argmax(info: Any, in_dims: Any, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """[B, *S] -> [B, *S without dim]. Without dim the index counts in the flattened example."""
    return _arg(aten.argmax, x, in_dims[0], dim, keepdim)


@batching_rule(aten.argmin.default)
def argmin(info: Any, in_dims: Any, x: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """[B, *S] -> [B, *S without dim]. Without dim the index counts in the flattened example."""
    return _arg(aten.argmin, x, in_dims[0], dim, keepdim)


def _arg(op: Any, x: Any, x_bdim: int, dim: Any, keepdim: bool) -> Any:
    if dim is not None:
        return _over(op, x, x_bdim, dim, keepdim)
    rank = logical_rank(x, x_bdim)
    out = op(batch_first(at_least_1d(x, x_bdim), x_bdim).flatten(1), 1)
    return out.reshape(-1, *[1] * rank) if keepdim else out, 0


@batching_rule(aten.count_nonzero.default)
def count_nonzero(info: Any, in_dims: Any, x: Any, dim: Any = None) -> Any:
    """[B, *S] -> [B, *S without dim]"""
    return _count_nonzero(x, in_dims[0], [] if dim is None else [dim])


@batching_rule(aten.count_nonzero.dim_IntList)
def count_nonzero_dims(info: Any, in_dims: Any, x: Any, dim: Any) -> Any:
    """[B, *S] -> [B, *S without dim]"""
    return _count_nonzero(x, in_dims[0], dim)


def _count_nonzero(x: Any, x_bdim: int, dim: Any) -> Any:
    x = at_least_1d(x, x_bdim)
    dims = physical_dims(dim, x, x_bdim) if dim else logical_dims(x, x_bdim)
    return aten.count_nonzero.dim_IntList(x, dims), without(x_bdim, *dims)


@batching_rule(aten.hash_tensor.default)
def hash_tensor(
    info: Any, in_dims: Any, x: Any, dim: Any = (), *, keepdim: bool = False, mode: int = 0
) -> Any:
    """[B, *S] -> [B, *S without dim]"""
    return _over(aten.hash_tensor, x, in_dims[0], dim, keepdim, mode=mode)


@batching_rule(aten.linalg__powsum.default)
def linalg__powsum(
    info: Any,
    in_dims: Any,
    x: Any,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Any:
    """[B, *S] -> [B, *S without dim]"""
    return _over(aten.linalg__powsum, x, in_dims[0], dim, keepdim, ord, dtype=dtype)


@batching_rule(aten.linalg_vector_norm.default)
def linalg_vector_norm(
    info: Any,
    in_dims: Any,
    x: Any,
    ord: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Any:
    """[B, *S] -> [B, *S without dim]"""
    return _over(torch.linalg.vector_norm, x, in_dims[0], dim, keepdim, ord, dtype=dtype)


@batching_rule(aten.norm.Scalar)
def norm(info: Any, in_dims: Any, x: Any, p: Any = 2) -> Any:
    """[B, *S] -> [B]"""
    return _over(aten.norm.ScalarOpt_dim, x, in_dims[0], None, False, p)


@batching_rule(aten.norm.ScalarOpt_dim)
def norm_dim(info: Any, in_dims: Any, x: Any, p: Any, dim: Any, keepdim: bool = False) -> Any:
    """[B, *S] -> [B, *S without dim]"""
    return _over(aten.norm.ScalarOpt_dim, x, in_dims[0], dim, keepdim, p)


@batching_rule(aten.norm.ScalarOpt_dim_dtype)
def norm_dim_dtype(
    info: Any, in_dims: Any, x: Any, p: Any, dim: Any, keepdim: bool, *, dtype: Any
) -> Any:
    """[B, *S] -> [B, *S without dim]"""
    return _over(aten.norm.ScalarOpt_dim_dtype, x, in_dims[0], dim, keepdim, p, dtype=dtype)


@batching_rule(aten.norm.ScalarOpt_dtype)
def norm_dtype(info: Any, in_dims: Any, x: Any, p: Any, *, dtype: Any) -> Any:
    """[B, *S] -> [B]"""
    return _over(aten.norm.ScalarOpt_dim_dtype, x, in_dims[0], None, False, p, dtype=dtype)


@batching_rule(aten.prod.default)
def prod(info: Any, in_dims: Any, x: Any, *, dtype: Any = None) -> Any:
    """[B, *S] -> [B]. ATen takes one dim at a time."""
    x = batch_first(at_least_1d(x, in_dims[0]), in_dims[0])
    return x.flatten(1).prod(1, dtype=dtype), 0


@batching_rule(aten.renorm.default)
def renorm(info: Any, in_dims: Any, x: Any, p: Any, dim: int, maxnorm: Any) -> Any:
    """[B, *S] -> [B, *S]. The norms are those of the slices at each index of dim, per example."""
    x = batch_first(x, in_dims[0])
    at = behind_batch(dim, logical_rank(x, 0))
    moved = x.movedim(at, 1)
    out = torch.renorm(moved.flatten(0, 1), p, 0, maxnorm)
    return unfold(out, 0, info.batch_size).movedim(1, at), 0


def _register_spread(op: Any) -> None:
    @batching_rule(op, state="family")
    def spread(
        info: Any,
        in_dims: Any,
        x: Any,
        dim: Any = None,
        *,
        correction: Any = None,
        keepdim: bool = False,
    ) -> Any:
        """[B, *S] -> [B, *S without dim], once or with the mean."""
        return _over(op, x, in_dims[0], dim, keepdim, correction=correction)


for _op in [
    aten.std.correction,
    aten.std_mean.correction,
    aten.var.correction,
    aten.var_mean.correction,
]:
    _register_spread(_op)


def _register_unbiased(op: Any) -> None:
    @batching_rule(op.dim, state="family")
    def unbiased(
        info: Any, in_dims: Any, x: Any, dim: Any, unbiased: bool = True, keepdim: bool = False
    ) -> Any:
        """[B, *S] -> [B, *S without dim], once or with the mean."""
        return _over(op.correction, x, in_dims[0], dim, keepdim, correction=int(unbiased))


for _op in [aten.std, aten.std_mean, aten.var, aten.var_mean]:
    _register_unbiased(_op)


@batching_rule(aten.trace.default)
def trace(info: Any, in_dims: Any, x: Any) -> Any:
    """[B, n, m] -> [B]"""
    return batch_first(x, in_dims[0]).diagonal(0, 1, 2).sum(-1), 0


@batching_rule(aten.allclose.default)
def allclose(info: Any, in_dims: Any, x: Any, y: Any, *rest: Any, **options: Any) -> Any:
    """[B, *S], [B, *S] -> one Python value for all examples."""
    rank = max(logical_rank(x, in_dims[0]), logical_rank(y, in_dims[1]))
    x, y = pad_rank(x, in_dims[0], rank), pad_rank(y, in_dims[1], rank)
    close = torch.isclose(x, y, *rest, **options)
    same = close.reshape(info.batch_size, close[:1].numel()).all(1)
    return common_answer(info, same, "allclose", "torch.isclose(...).all()"), None
