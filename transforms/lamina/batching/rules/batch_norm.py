"""Batching rules of batch norm: the batch dim joins the channels, normalised one by one."""

from __future__ import annotations

import math
from typing import Any

import torch

from lamina.batching.dims import batch_first, fold, logical_shape, unfold
from lamina.batching.rules.norm import affine, statistics_dtype
from lamina.batching.table import batching_rule, decomposition
from lamina_core.dispatch import followed
from lamina_core.half import widened
from lamina_core.overloads import aten


@decomposition(aten._batch_norm_impl_index.default)
def _batch_norm_impl_index(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any
) -> Any:
    """Batch norm as below, with the backend's reserve and index, which are not used here."""
    momentum, eps = rest[:2]
    outs = native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    return *outs, x.new_empty([0], dtype=torch.uint8), 0


@decomposition(aten.batch_norm.default)
def batch_norm(
    x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *rest: Any
) -> Any:
    """Writes to the running statistics, which its schema does not say."""
    if not x.numel():  # then PyTorch asks for no channels, and takes no statistics
        out = x.clone() if weight is None else x * weight[0]
        return out if bias is None else out + bias[0]
    momentum, eps = rest[:2]
    return native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)[0]


@decomposition(aten.native_batch_norm.default)
def native_batch_norm(
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Writes to the running statistics, which its schema does not say; another op's schema does."""
    affine = (weight, bias)
    if not training and mean is not None:
        return aten._native_batch_norm_legit_no_training(x, *affine, mean, var, momentum, eps)
    if mean is None:
        return aten._native_batch_norm_legit.no_stats(x, *affine, training, momentum, eps)
    return aten._native_batch_norm_legit(x, *affine, mean, var, training, momentum, eps)


@batching_rule(aten._native_batch_norm_legit.no_stats)
def batch_norm_no_stats(
    info: Any,
    in_dims: Any,
    x: Any,
    weight: Any,
    bias: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """[B, N, C, *S] -> [B, N, C, *S], [B, C], [B, C]"""
    dims = (*in_dims[:3], None, None)
    return _batch_norm(info, dims, x, weight, bias, None, None, training, momentum, eps)


@batching_rule(aten._native_batch_norm_legit_functional.default)
def batch_norm_functional(
    info: Any,
    in_dims: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """[B, N, C, *S] -> [B, N, C, *S], [B, C], twice, and the new running statistics."""
    if not training:
        outs, dims = _batch_norm(info, in_dims, x, weight, bias, mean, var, False, momentum, eps)
        return (*outs, mean, var), (*dims, *in_dims[3:5])
    dims = (*in_dims[:3], None, None)
    if weight is None and mean.dtype is not x.dtype:
        # The op is told by its parameters in which dtype to keep statistics.
        weight = mean.new_ones(logical_shape(x, in_dims[0])[1])
    outs, dims = _batch_norm(info, dims, x, weight, bias, None, None, True, momentum, eps)
    # The statistics are taken from the saved ones: the op itself would write to what it is given.
    shape = logical_shape(x, in_dims[0])
    count = math.prod(shape) // max(shape[1], 1)
    batch_mean, batch_var = outs[1], (widened(outs[2]).pow(-2) - eps).clamp(min=0)
    batch_var = batch_var * (count / max(count - 1, 1))
    new = [
        _lerp(old, bdim, seen, dims[1], momentum)
        for old, bdim, seen in zip((mean, var), in_dims[3:5], (batch_mean, batch_var), strict=True)
    ]
    places = [None if dims[1] is None and d is None else 0 for d in in_dims[3:5]]
    return (*outs, *new), (*dims, *places)


def _lerp(old: Any, old_bdim: Any, new: Any, new_bdim: Any, momentum: float) -> Any:
    dtype = old.dtype
    old, new = widened(batch_first(old, old_bdim)), batch_first(new, new_bdim)
    return (old * (1 - momentum) + new.to(old.dtype) * momentum).to(dtype)


@batching_rule(aten._native_batch_norm_legit_no_training.default)
def batch_norm_no_training(
    info: Any,
    in_dims: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    momentum: float,
    eps: float,
) -> Any:
    """[B, N, C, *S] -> [B, N, C, *S], and two empty tensors."""
    return _batch_norm(info, in_dims, x, weight, bias, mean, var, False, momentum, eps)


def _batch_norm(
    info: Any,
    in_dims: Any,
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Normalise with given statistics or with those of the input, without writing to any."""
    size = info.batch_size
    x_bdim = in_dims[0]
    rest = (training, momentum, eps)
    parameters = list(zip((weight, bias, mean, var), in_dims[1:5], strict=True))
    if all(d is None for _, d in parameters) and not training:
        given = (fold(x, x_bdim, 0, size), weight, bias, mean, var, *rest)
        outs = followed(aten.native_batch_norm.default, *given)
        return (unfold(outs[0], 0, size), *outs[1:]), (0, None, None)
    if x_bdim is None and all(d is None for _, d in parameters[2:]):
        wide = [widened(v) for v in (mean, var)]
        given = (widened(x), None, None, *wide, *rest)
        out, *saved = followed(aten.native_batch_norm.default, *given)
        out, out_bdim = affine(out, None, *parameters[:2], x.dtype)
        dtype = statistics_dtype(x, weight, bias, mean)
        return (out, *[stat.to(dtype) for stat in saved]), (out_bdim, None, None)
    folded = [None if v is None else fold(v, d, 0, size) for v, d in parameters]
    outs = followed(aten.native_batch_norm.default, fold(x, x_bdim, 1, size), *folded, *rest)
    if not training:
        return (unfold(outs[0], 1, size), *outs[1:]), (1, None, None)
    return tuple(unfold(out, at, size) for out, at in zip(outs, (1, 0, 0), strict=True)), (1, 0, 0)


@batching_rule(aten.native_batch_norm_backward.default)
def native_batch_norm_backward(
    info: Any,
    in_dims: Any,
    ct: Any,
    x: Any,
    weight: Any,
    mean: Any,
    var: Any,
    save_mean: Any,
    save_rstd: Any,
    train: bool,
    eps: float,
    output_mask: Any,
) -> Any:
    """[B, N, C, *S], [B, N, C, *S] -> [B, N, C, *S], [B, C], [B, C]"""
    size = info.batch_size
    ct, x = (fold(v, d, 1, size) for v, d in zip((ct, x), in_dims[:2], strict=True))
    stats = zip((weight, mean, var, save_mean, save_rstd), in_dims[2:7], strict=True)
    folded = [None if v is None else fold(v, d, 0, size) for v, d in stats]
    given = (ct, x, *folded, train, eps, output_mask)
    outs = followed(aten.native_batch_norm_backward.default, *given)
    kept = [out if wanted else None for out, wanted in zip(outs, output_mask, strict=True)]
    return tuple(
        None if out is None else unfold(out, at, size)
        for out, at in zip(kept, (1, 0, 0), strict=True)
    ), (1, 0, 0)
